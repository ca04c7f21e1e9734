"""The progress of a zygote: its own reports about its imports, and what other processes observe."""

import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmaas.engine import marks
from lmaas.engine.activity import Standstill, activity_of, age_s, session_of
from lmaas.engine.zygote import wire

#: The files in a zygote's folder: its last report, the durations of the last imports on this machine, and its owner's intent.
REPORT, IMPORTS, INTENT = "progress.json", "imports.json", "owner.json"
#: A folder with a note for each engine that was started plainly. The name is its process id, the content the path of its marks.
PLAIN = "plain"
#: The number of imports that are remembered, and the assumed processor time of an import, in seconds, if none is.
REMEMBERED, FIRST_IMPORT_S = 5, 10.0
#: The share of a processor is computed as if the process had used a whole processor for this long before it started. The first measurements
#: alone are too short for an estimate.
PRIOR_S = 1.0


@dataclass(frozen=True, slots=True)
class Sight:
    """The observed state of the zygote of a home folder.

    `pid` is 0 if no zygote runs. `done` of its `stages` are finished; when all are, it serves. `used_s` is the processor time that it has
    used in `age_s`, and `usual_s` the usual processor time of an import. `still_s` and `stage_used_s` are those of activity.Standstill.
    Without a process, `absent_s` is the time since one was last seen. `next_s` is the time until its owner may start the next one (None
    without an owner), and `wants` is the digest of the facts for it.
    """

    pid: int = 0
    done: int = 0
    stages: int = 0
    used_s: float = 0.0
    age_s: float = 0.0
    usual_s: float = FIRST_IMPORT_S
    still_s: float = 0.0
    stage_used_s: float = 0.0
    absent_s: float = 0.0
    next_s: float | None = None
    wants: str = ""

    @property
    def serves(self) -> bool:
        """True if the zygote has imported everything and should respond."""
        return self.pid != 0 and 0 < self.stages <= self.done

    @property
    def share(self) -> float:
        """The share of a processor that the zygote gets."""
        return min(1.0, (PRIOR_S + self.used_s) / (PRIOR_S + self.age_s))


class Watch:
    """Observes the zygote of `home` repeatedly. `clock` returns monotonic seconds."""

    def __init__(self, home: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._home, self._clock = home, clock
        self._standstill, self._pid = Standstill(), 0
        self._last_seen = clock()

    def answered(self) -> None:
        """Record that the zygote has answered, so it has not stalled."""
        self._standstill, self._pid = Standstill(), 0

    def look(self) -> Sight:
        """Return the current state of the zygote."""
        now, intent = self._clock(), _read(wire.folder(self._home) / INTENT)
        pid = running(self._home)
        usual_s = usual_import_s(self._home)
        next_s = _next(intent)
        wants = "" if next_s is None else str(intent.get("wants", ""))
        if pid == 0:
            return Sight(usual_s=usual_s, absent_s=now - self._last_seen, next_s=next_s, wants=wants)
        if pid != self._pid:
            self._standstill, self._pid = Standstill(), pid
        self._last_seen = now
        report = _read(wire.folder(self._home) / REPORT)
        done, stages = (int(report.get("done", 0)), int(report.get("stages", 0))) if report.get("pid") == pid else (0, 0)
        # During the imports, its helper processes may do the work. Once it serves, it works alone, and is checked every two seconds.
        serves = 0 < stages <= done
        activity = activity_of([pid] if serves else session_of(pid))
        self._standstill.look((pid, done), activity, now)
        return Sight(
            pid=pid,
            done=done,
            stages=stages,
            used_s=activity.used_s,
            age_s=_age_s(pid),
            usual_s=usual_s,
            still_s=self._standstill.still_s,
            stage_used_s=self._standstill.stage_used_s,
            next_s=next_s,
            wants=wants,
        )


class Reporter:
    """Writes the zygote's reports about its progress."""

    def __init__(self, home: Path) -> None:
        self._folder = wire.folder(home)

    def report(self, done: int, stages: int) -> None:
        """Report that `done` of `stages` stages are finished. A write error is ignored, because it must not stop an import."""
        with contextlib.suppress(OSError):
            _write(self._folder / REPORT, {"pid": os.getpid(), "done": done, "stages": stages})

    def imported(self, used_s: float) -> None:
        """Record the processor time of a finished import."""
        with contextlib.suppress(OSError):
            path = self._folder / IMPORTS
            _write(path, {"used_s": [*_known(path), used_s][-REMEMBERED:]})


def usual_import_s(home: Path) -> float:
    """Return the usual processor time of an import in this home folder."""
    known = _known(wire.folder(home) / IMPORTS)
    return statistics.median(known) if known else FIRST_IMPORT_S


def _known(path: Path) -> list[float]:
    try:
        return [float(used) for used in _read(path).get("used_s", [])]
    except (TypeError, ValueError):
        return []


def intend(home: Path, next_s: float, wants: str) -> None:
    """Publish the intent of the zygote's owner: without a zygote, it starts another one in `next_s` seconds or soon after, with facts of
    the digest `wants`. Raises OSError."""
    _write(wire.folder(home) / INTENT, {"pid": os.getpid(), "next": time.monotonic() + next_s, "wants": wants})


def _next(intent: Mapping[str, Any]) -> float | None:
    with contextlib.suppress(OSError, KeyError, TypeError, ValueError):
        age_s(int(intent["pid"]))  # an owner that has ended starts nothing
        return max(0.0, float(intent["next"]) - time.monotonic())
    return None


@contextmanager
def importing_plainly(home: Path, pid: int, marks_path: Path) -> Iterator[None]:
    """Keep a note during the block that the engine with this process id was started plainly, so that no zygote imports at the same time. If
    the note cannot be written, as on a full disk, both are slower."""
    note = wire.folder(home) / PLAIN / str(pid)
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        note.write_text(str(marks_path))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            note.unlink(missing_ok=True)


def plain_imports(home: Path) -> list[int]:
    """Return the process ids of engines of this home folder that were started plainly and are still importing."""
    found = []
    with contextlib.suppress(OSError):
        for note in (wire.folder(home) / PLAIN).iterdir():
            with contextlib.suppress(OSError, ValueError):
                age_s(int(note.name))
                if marks.LOADING not in marks.read(Path(note.read_text())):
                    found.append(int(note.name))
    return found


def running(home: Path) -> int:
    """Return the process id of the zygote of a home folder, whether or not it listens already, or 0 if none runs."""
    # Either the process that holds the lock, or the one that was started last and may not have reached the lock.
    folder = wire.folder(home)
    return next((pid for pid in (_number(folder / wire.LOCK), _number(folder / wire.PROCESS)) if pid and is_zygote(pid, home)), 0)


def _number(path: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return 0


def is_zygote(pid: int, home: Path) -> bool:
    """Return whether the command line of the process is that of the zygote of `home`. False if the process has ended or its id was
    reused."""
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ") + b" "
        return f"lmaas.engine.zygote {home} ".encode() in command
    return False


def _age_s(pid: int) -> float:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return age_s(pid)
    return 0.0


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text())
        if isinstance(found, dict):
            return found
    return {}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content))
    partial.rename(path)
