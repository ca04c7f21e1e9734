"""The log files of a stack, read from their ends and followed."""

import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from lmaas.cli.log_lines import Filter, LogLine, read_line

#: The part of a file's end that is read at first, unless lines are filtered.
TAIL_BYTES = 256 * 1024
CHUNK_BYTES = 64 * 1024
#: The longest line. What is beyond becomes a line of its own.
LINE_BYTES = 64 * 1024
#: Processes whose logs may come later, while a stack is followed.
PROCESSES = ("gateway", "controller", "jobs", "console", "postgres", "valkey", "zygote", "supervisor", "engine")


@dataclass(slots=True)
class LogFile:
    """One log that grows, is rotated, and may go."""

    path: Path
    process: str
    replica: str | None = None
    _file: int = -1
    _rest: bytes = b""
    _before: LogLine | None = None

    def past(self, wanted: Filter, most: int) -> list[LogLine]:
        """Return the last lines of the file and of its predecessor, at most `most`, and go to its end."""
        found: deque[LogLine] = deque(maxlen=most)
        older = LogFile(self.path.with_name(self.path.name + ".1"), self.process, self.replica)
        for each in (older, self):
            each._open()
            if each._file >= 0 and wanted.level is None and wanted.request is None:
                each._skip_to_tail()
            found.extend(line for line in each.new() if wanted.takes(line))
        older.close()
        return list(found)

    def new(self) -> Iterator[LogLine]:
        """Return the complete lines since the last call. After a rotation, those of the old file come first."""
        if self._file < 0:
            self._open()
        if self._file < 0:
            return
        yield from self._lines()
        if self._was_replaced():
            self.close()
            self._open()
            if self._file >= 0:
                yield from self._lines()

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
        self._file, self._rest = -1, b""

    def _open(self) -> None:
        with suppress(OSError):
            self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    def _skip_to_tail(self) -> None:
        size = os.fstat(self._file).st_size
        if size > TAIL_BYTES:
            os.lseek(self._file, size - TAIL_BYTES, os.SEEK_SET)
            # The first line is probably cut.
            while (chunk := os.read(self._file, CHUNK_BYTES)) and b"\n" not in chunk:
                pass
            self._rest = chunk.partition(b"\n")[2]

    def _was_replaced(self) -> bool:
        try:
            there = self.path.stat()
        except OSError:
            return False
        here = os.fstat(self._file)
        return (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino)

    def _lines(self) -> Iterator[LogLine]:
        status = os.fstat(self._file)
        if status.st_size < os.lseek(self._file, 0, os.SEEK_CUR):  # the file was emptied
            os.lseek(self._file, 0, os.SEEK_SET)
            self._rest = b""
        while chunk := os.read(self._file, CHUNK_BYTES):
            *whole, self._rest = (self._rest + chunk).split(b"\n")
            if len(self._rest) > LINE_BYTES:
                whole.append(self._rest)
                self._rest = b""
            for raw in whole:
                if text := raw.decode(errors="replace").rstrip():
                    self._before = read_line(text, self.process, self.replica, self._before, min(time.time(), status.st_mtime))
                    yield self._before


@dataclass(slots=True)
class LogFolder:
    """The logs under the home folder of a stack. New ones are found while they are followed."""

    home: Path
    wanted: Filter
    _files: dict[Path, LogFile] = field(default_factory=dict)

    def past(self, most: int) -> list[LogLine]:
        """Return the last lines of all logs by time, at most `most`."""
        self._find()
        lines = [line for file in self._files.values() for line in file.past(self.wanted, most)]
        lines.sort(key=lambda line: line.at)
        return lines[-most:] if most else []

    def new(self) -> list[LogLine]:
        """Return the lines that were written since the last call, by time."""
        self._find()
        lines = [line for file in self._files.values() for line in file.new() if self.wanted.takes(line)]
        return sorted(lines, key=lambda line: line.at)

    def has_logs(self) -> bool:
        """Return whether the home has any log."""
        return bool(self._paths())

    def names(self) -> set[str]:
        """Return the names of the processes and the ids of the replicas that have logs."""
        return {name for _, process, replica in self._paths() for name in (process, replica) if name is not None}

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

    def _find(self) -> None:
        there = {path: (process, replica) for path, process, replica in self._paths() if self.wanted.takes_source(process, replica)}
        for path in self._files.keys() - there.keys():
            # The folder of a replica that ended long ago is removed.
            self._files.pop(path).close()
        for path in there.keys() - self._files.keys():
            self._files[path] = LogFile(path, *there[path])

    def _paths(self) -> list[tuple[Path, str, str | None]]:
        found: list[tuple[Path, str, str | None]] = [(path, path.stem, None) for path in sorted((self.home / "logs").glob("*.log"))]
        found += [(path, "zygote", None) for path in self.home.glob("zygote/zygote.log")]
        for name in ("supervisor", "engine"):
            found += [(path, name, path.parent.name) for path in sorted(self.home.glob(f"replicas/*/{name}.log"))]
        return found
