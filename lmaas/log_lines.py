"""Writes lines of a log to a file descriptor."""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence

from lmaas.group_writer import GroupWriter

#: The lines that may wait.
MAX_WAITING = 20_000
#: Up to this size, a write to a pipe is not mixed with those of other threads (PIPE_BUF).
PORTION_BYTES = 4096


def line_writer(file: int | None = None, max_waiting: int = MAX_WAITING) -> GroupWriter[str]:
    """Return a writer of lines, each of which ends with a newline character, to this file descriptor or to standard error.

    A log that is read slowly, or a disk that is full, delays no request. It costs lines, which are counted.
    """
    descriptor = sys.stderr.fileno() if file is None else file

    def write(lines: Sequence[str]) -> int:
        lost = 0
        for portion in portions(lines):
            try:
                _write(descriptor, portion)
            except OSError:
                lost += portion.count(b"\n")
        return lost

    return GroupWriter(write, max_waiting, "log-lines")


def portions(lines: Iterable[str]) -> Iterator[bytes]:
    """Join lines to portions of at most PORTION_BYTES. A longer line is a portion of its own."""
    portion = bytearray()
    for line in lines:
        text = line.encode()
        if portion and len(portion) + len(text) > PORTION_BYTES:
            yield bytes(portion)
            portion.clear()
        portion += text
    if portion:
        yield bytes(portion)


def _write(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]
