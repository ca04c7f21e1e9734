"""What a light zygote forks: says what it is given, and stays if it is told to."""

import os
import signal
import sys


def main() -> None:
    """The process."""
    os.write(1, f"{sys.argv[1:]} {os.environ['SECRET']}\n".encode())
    if "stay" in sys.argv:
        signal.pause()
