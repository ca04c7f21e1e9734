"""Notes of the running compilations of grammars. An engine's processes write them to shared memory, and its supervisor reads them.

Grammars are compiled in a few threads, which all tenants share. A compilation that never ends delays every request with a grammar. The
engine still generates tokens for other requests, so other checks do not detect this.
"""

import contextlib
import mmap
import os
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

#: The environment variable of an engine with the folder of its notes. Without it, nothing is noted.
VARIABLE = "LMAAS_COMPILING"
#: A compilation counts as stalled after this much processor time of its thread, or after this much elapsed time. On a busy machine a thread
#: may get little processor time, and a thread that waits uses none.
CPU_LIMIT_S, WALL_LIMIT_S = 10.0, 60.0
#: The maximum number of compilations of one process that are noted at once. Engines have at most half as many threads as processors.
SLOTS = 256
#: The native thread id (0 in a free slot), the start by time.monotonic(), and the thread's processor time at the start. In seconds.
_SLOT = struct.Struct("<Qdd")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Compilation:
    """A running compilation: the elapsed time, and the processor time that its thread has used for it, in seconds."""

    wall_s: float
    cpu_s: float

    @property
    def stands_still(self) -> bool:
        """True if it has taken so much time that it will most likely never end."""
        return self.cpu_s > CPU_LIMIT_S or self.wall_s > WALL_LIMIT_S


class Notes:
    """The notes of this process, in its own file in `folder`. Raises OSError if the file cannot be created."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / str(os.getpid())).open("w+b") as file:
            file.truncate(SLOTS * _SLOT.size)
            self._memory = mmap.mmap(file.fileno(), 0)
        self._free = list(range(SLOTS))
        self._lock = threading.Lock()

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Note during the block that this thread is compiling."""
        with self._lock:
            slot = self._free.pop() if self._free else None
        if slot is None:
            yield
            return
        _SLOT.pack_into(self._memory, slot * _SLOT.size, threading.get_native_id(), time.monotonic(), time.thread_time())
        try:
            yield
        finally:
            _SLOT.pack_into(self._memory, slot * _SLOT.size, 0, 0.0, 0.0)
            with self._lock:
                self._free.append(slot)


def running(folder: Path, now: float) -> list[Compilation]:
    """Return the running compilations of an engine's processes, at `now` by time.monotonic()."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for path in folder.iterdir():
            for thread, since, cpu_before in _SLOT.iter_unpack(path.read_bytes()):
                if thread and (cpu_s := _thread_cpu_s(int(path.name), thread)) is not None:
                    found.append(Compilation(now - since, max(0.0, cpu_s - cpu_before)))
    return found


def _thread_cpu_s(process: int, thread: int) -> float | None:
    """Return the processor time of a thread, or None if it has ended."""
    try:
        stat = Path(f"/proc/{process}/task/{thread}/stat").read_text()
    except OSError:
        return None
    # User and system time are the 14th and 15th field; the second, the name in parentheses, can contain spaces.
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
