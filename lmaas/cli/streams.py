"""The standard streams, which may be closed: Python then has None in their place."""

import sys
from typing import BinaryIO, TextIO

from lmaas.errors import SettingsError


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream is a terminal. One that is closed is none."""
    return stream is not None and stream.isatty()


def binary_output() -> BinaryIO:
    """Return standard output for bytes. Raises SettingsError if it is closed."""
    if sys.stdout is None:
        raise SettingsError("Standard output is closed, so there is no place for the output.")
    return sys.stdout.buffer
