"""Carries an engine's output from a named pipe to its log."""

import asyncio
import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lmaas.engine.log.seal import make_mark, write_seal
from lmaas.engine.log.sieve import NOTE_S, Sieve

log = logging.getLogger(__name__)

#: The size at which a log is rotated. One predecessor is kept.
ROTATE_BYTES = 4 << 20
#: The capacity of the pipe. A large pipe keeps a busy supervisor from blocking its engine.
PIPE_BYTES = 1 << 20
CHUNK_BYTES = 1 << 16
#: The number of chunks that are read before control returns to the event loop. A flood of output must not delay heartbeats.
CHUNKS_AT_ONCE = 4
#: More chunks than a full pipe contains.
CHUNKS_TO_DRAIN = 2 * PIPE_BYTES // CHUNK_BYTES


class EngineLog:
    """The log of one engine at `path`, with its predecessor at `path`.1. The engine writes into the named pipe `pipe`.

    The pipe has a name because an engine that the zygote forks opens its output by name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.predecessor = path.with_name(path.name + ".1")
        self.pipe = path.with_suffix(".pipe")
        self.seal_path = path.with_suffix(".sealed")
        self._sieve = Sieve()
        self._fd = -1
        self._file_fd = -1
        self._size = 0
        self._failing = False
        self._mark = make_mark()
        self._noting = False
        self._timers: list[asyncio.TimerHandle] = []

    @contextmanager
    def opened(self) -> Iterator["EngineLog"]:
        """Read the pipe while the block runs, in the running event loop. Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for stale in (self.pipe, self.seal_path):
            stale.unlink(missing_ok=True)
        self._open_file()
        os.mkfifo(self.pipe, 0o600)
        # Also open for writing. The pipe then has no end of file when an engine exits, and opening it never blocks.
        self._fd = os.open(self.pipe, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        with contextlib.suppress(PermissionError):  # the machine may limit pipes to a smaller size
            fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._fd, self._pump, CHUNKS_AT_ONCE)
        try:
            yield self
        finally:
            loop.remove_reader(self._fd)
            self.settle()
            for timer in self._timers:
                timer.cancel()
            os.close(self._fd)
            os.close(self._file_fd)
            self._fd = self._file_fd = -1
            self.pipe.unlink(missing_ok=True)

    def writer(self) -> int:
        """Return a file descriptor for a process to write into. The caller closes it."""
        return os.open(self.pipe, os.O_WRONLY | os.O_CLOEXEC)

    def seal(self) -> None:
        """Keep only log records without tenants' text, and crashes, from now on."""
        if self._sieve.sealed:
            return
        self._pump(CHUNKS_TO_DRAIN)
        self._sieve.seal(self._mark, time.monotonic())
        self._tell_engine()

    def _tell_engine(self) -> None:
        try:
            write_seal(self.seal_path, self._mark)
        except OSError as error:
            # Until the engine marks its records, they are left out. That loses lines, but no tenant's text reaches the log.
            log.warning("the engine's log records are left out for now", extra={"action": "log", "detail": repr(error)})
            self._timers.append(asyncio.get_running_loop().call_later(NOTE_S, self._tell_engine))

    def settle(self) -> None:
        """Write all output of the engine so far to the log, including the last lines over the limit."""
        if self._fd >= 0:
            self._pump(CHUNKS_TO_DRAIN)
            self._write(self._sieve.end(time.monotonic()))

    def tail(self, size: int) -> bytes:
        """Return the last `size` bytes of the log, also right after a rotation."""
        self.settle()
        text = b""
        for path in (self.path, self.predecessor):
            with contextlib.suppress(OSError), path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - (size - len(text))))
                text = file.read() + text
            if len(text) >= size:
                break
        return text

    def contains(self, text: str) -> bool:
        """Return whether a line of the log contains this text."""
        self.settle()
        for path in (self.predecessor, self.path):
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                if any(text.encode() in line for line in file):
                    return True
        return False

    def _pump(self, chunks: int) -> None:
        for _ in range(chunks):
            try:
                data = os.read(self._fd, CHUNK_BYTES)
            except BlockingIOError:
                break
            self._write(self._sieve.feed(data, time.monotonic()))
        if self._sieve.owes_note and not self._noting:
            self._noting = True
            self._timers[:] = [timer for timer in self._timers if timer.when() > asyncio.get_running_loop().time()]
            self._timers.append(asyncio.get_running_loop().call_later(NOTE_S, self._note))

    def _note(self) -> None:
        self._noting = False
        self._write(self._sieve.note(time.monotonic()))

    def _write(self, data: bytes) -> None:
        if not data:
            return
        try:
            if self._size and self._size + len(data) > ROTATE_BYTES:
                os.close(self._file_fd)
                self._file_fd = -1
                self.path.replace(self.predecessor)
            if self._file_fd < 0:
                self._open_file()
            self._size += os.write(self._file_fd, data)
            self._failing = False
        except OSError as error:
            # The engine must not wait for a full disk. These lines are lost; the next ones are tried again.
            if not self._failing:
                log.warning("the engine's log cannot be written", extra={"action": "log", "detail": repr(error)})
            self._failing = True

    def _open_file(self) -> None:
        self._file_fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._size = os.fstat(self._file_fd).st_size
