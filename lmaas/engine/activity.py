"""Measures the activity of processes by the kernel's counters, to distinguish a slow process from a stalled one."""

import contextlib
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")
#: Smaller differences do not count as progress. A process that waits forever may still wake up occasionally to check a clock.
LEAST_S, LEAST_FAULTS, LEAST_BYTES = 0.1, 10, 1 << 20
#: A gap between two checks counts for at most this long, because the checking process may itself have been stopped or starved.
MAX_GAP_S = 5.0


@dataclass(frozen=True, slots=True)
class Activity:
    """The combined activity of some processes since each of them started.

    `used_s` is processor time. `wanted_s` adds the time in which they were ready to run while others ran. `faults` counts pages that were
    read from disk, `read_bytes` the bytes read from files.
    """

    used_s: float = 0.0
    wanted_s: float = 0.0
    faults: int = 0
    read_bytes: int = 0

    def differs_from(self, before: "Activity") -> bool:
        """Return whether more happened since `before` than in an idle process. The end of a process counts as well."""
        return (
            abs(self.wanted_s - before.wanted_s) >= LEAST_S
            or abs(self.used_s - before.used_s) >= LEAST_S
            or abs(self.faults - before.faults) >= LEAST_FAULTS
            or abs(self.read_bytes - before.read_bytes) >= LEAST_BYTES
        )


class Standstill:
    """Measures how long something has made no progress, from repeated checks of its stage and its activity.

    `still_s` is the time since the last progress, and `stage_used_s` the processor time used since the stage changed.
    """

    def __init__(self) -> None:
        self.still_s = self.stage_used_s = 0.0
        self._stage: object = None
        self._moved: Activity | None = None
        self._began_stage = 0.0
        self._looked = 0.0

    def look(self, stage: object, activity: Activity, now: float) -> None:
        """Record the stage and the activity at `now`, in seconds of any monotonic clock."""
        gap_s, self._looked = min(MAX_GAP_S, now - self._looked), now
        if self._moved is None or stage != self._stage:
            self._stage, self._began_stage = stage, activity.used_s
            self._moved, self.still_s = activity, 0.0
        elif activity.differs_from(self._moved):
            self._moved, self.still_s = activity, 0.0
        else:
            self.still_s += gap_s
        self.stage_used_s = activity.used_s - self._began_stage


def activity_of(pids: Iterable[int]) -> Activity:
    """Return the activity of these processes and of their reaped children. Processes that have ended are not counted."""
    used = wanted = 0.0
    faults = read_bytes = 0
    for pid in pids:
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = _stat(pid)
            mine = sum(int(fields[place]) for place in (11, 12, 13, 14)) / _TICKS_PER_S
            waited = sum(_waited_s(thread) for thread in (_PROC / str(pid) / "task").iterdir())
            used, wanted, faults = used + mine, wanted + mine + waited, faults + int(fields[9])
            read_bytes += _read_bytes(pid)
    return Activity(used, wanted, faults, read_bytes)


def session_of(leader: int) -> list[int]:
    """Return the processes of the session that this process leads."""
    found = []
    for name in os.listdir(_PROC):
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                if int(_stat(int(name))[3]) == leader:
                    found.append(int(name))
    return found


def family_of(pid: int) -> Sequence[int]:
    """Return a process and all its descendants. Empty if the process has ended."""
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def age_s(pid: int) -> float:
    """Return the age of a process in seconds, to 10 ms. Raises OSError if it has ended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(_stat(pid)[19]) / _TICKS_PER_S


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third on. The second field, a name in parentheses, may contain anything."""
    return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()


def _waited_s(thread: Path) -> float:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int((thread / "schedstat").read_text().split()[1]) / 1e9
    return 0.0  # this kernel does not record it


def _read_bytes(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int((_PROC / str(pid) / "io").read_text().split()[1])
    return 0
