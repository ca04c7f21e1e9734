"""Writes the lines of a log in groups, from a thread of its own."""

import asyncio
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType

#: The time for which lines are gathered.
EVERY_S = 0.2
#: The lines that may wait while a write takes long. Later ones are dropped.
MAX_WAITING = 20_000
#: Up to this size, a write to a pipe is not mixed with those of other threads (PIPE_BUF).
PORTION_BYTES = 4096
#: The time that the last lines have to be written when the process ends.
CLOSE_S = 2.0


class LineWriter:
    """Writes lines to a file descriptor. Use as a context manager in a process with a running event loop.

    A line costs the event loop an append to a list. A log that is read slowly, or a disk that is full, delays no request: its lines are
    dropped, and counted in `dropped`.
    """

    def __init__(self, file: int | None = None, max_waiting: int = MAX_WAITING) -> None:
        self._file = sys.stderr.fileno() if file is None else file
        self._max_waiting = max_waiting
        self._lines: list[str] = []
        self._timer: asyncio.TimerHandle | None = None
        #: True while the thread has lines to write.
        self._is_writing = False
        self._groups: queue.SimpleQueue[list[str] | None] = queue.SimpleQueue()
        # A daemon: a process must be able to end although its log is not read.
        self._thread = threading.Thread(target=self._run, name="log-lines", daemon=True)
        self._dropped = self._lost = 0

    def __enter__(self) -> "LineWriter":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._groups.put(self._lines)
        self._groups.put(None)
        self._thread.join(CLOSE_S)

    @property
    def dropped(self) -> int:
        """The number of lines that were not written."""
        return self._dropped + self._lost

    def add(self, line: str) -> None:
        """Write a line, which ends with a newline character, soon."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(EVERY_S, self._hand_over)
        if len(self._lines) < self._max_waiting:
            self._lines.append(line)
        else:
            self._dropped += 1

    def _hand_over(self) -> None:
        self._timer = None
        if self._is_writing:
            self._timer = asyncio.get_running_loop().call_later(EVERY_S, self._hand_over)
            return
        self._is_writing = True
        lines, self._lines = self._lines, []
        self._groups.put(lines)

    def _run(self) -> None:
        get: Callable[[], list[str] | None] = self._groups.get
        for lines in iter(get, None):
            for portion in portions(lines or ()):
                try:
                    _write(self._file, portion)
                except OSError:
                    self._lost += portion.count(b"\n")
            self._is_writing = False


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
