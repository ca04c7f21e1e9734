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
#: Less than this is not progress: a process that waits for ever may still wake up now and then to look at a clock.
LEAST_S, LEAST_FAULTS, LEAST_BYTES = 0.1, 10, 1 << 20
#: A gap between two looks counts for at most this long: the process that looks may have been stopped or starved itself.
MAX_GAP_S = 5.0


@dataclass(frozen=True, slots=True)
class Activity:
    """What some processes have done together since each of them began.

    `used_s` is processor time, `wanted_s` the same and the time in which they could have run while others ran. `faults` counts pages that
    were read from a disk, `read_bytes` what was read from files.
    """

    used_s: float = 0.0
    wanted_s: float = 0.0
    faults: int = 0
    read_bytes: int = 0

    def differs_from(self, before: "Activity") -> bool:
        """Whether more has happened in between than in a process that waits. A process that ended counts as well."""
        return (
            abs(self.wanted_s - before.wanted_s) >= LEAST_S
            or abs(self.used_s - before.used_s) >= LEAST_S
            or abs(self.faults - before.faults) >= LEAST_FAULTS
            or abs(self.read_bytes - before.read_bytes) >= LEAST_BYTES
        )


class Standstill:
    """Measures for how long something has made no progress, from looks at its stage and its activity.

    `still_s` is the time since the last progress, and `stage_used_s` the processor time used since the stage changed.
    """

    def __init__(self) -> None:
        self.still_s = self.stage_used_s = 0.0
        self._stage: object = None
        self._moved: Activity | None = None
        self._began_stage = 0.0
        self._looked = 0.0

    def look(self, stage: object, activity: Activity, now: float) -> None:
        """Take a look at `now`, in seconds of any clock that goes forward."""
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
    """The activity of these processes, and of the children that they have waited for. Processes that have ended count nothing."""
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
    """The processes of the session that this process leads."""
    found = []
    for name in os.listdir(_PROC):
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                if int(_stat(int(name))[3]) == leader:
                    found.append(int(name))
    return found


def family_of(pid: int) -> Sequence[int]:
    """A process and all that descend from it; empty if it is gone."""
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def age_s(pid: int) -> float:
    """How long ago a process began, to 10 ms. Raises OSError if it is gone."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(_stat(pid)[19]) / _TICKS_PER_S


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on: the second, a name in parentheses, may hold anything."""
    return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()


def _waited_s(thread: Path) -> float:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int((thread / "schedstat").read_text().split()[1]) / 1e9
    return 0.0  # a kernel that does not count it


def _read_bytes(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int((_PROC / str(pid) / "io").read_text().split()[1])
    return 0
