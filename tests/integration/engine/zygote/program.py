"""The program that a light zygote forks: prints its input, and stays if an argument demands it."""

import os
import signal
import sys


def main() -> None:
    """Run the program."""
    os.write(1, f"{sys.argv[1:]} {os.environ['SECRET']}\n".encode())
    if "stay" in sys.argv:
        signal.pause()
