"""How far a zygote has come: what it reports of its imports, and what others see of it from outside."""

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

#: Files in a zygote's folder: its last report, what the last imports on this machine took, and what its owner intends.
REPORT, IMPORTS, INTENT = "progress.json", "imports.json", "owner.json"
#: A folder with a note for each engine that was started plainly: its process id, and where its marks are.
PLAIN = "plain"
#: How many imports are remembered, and what one takes as long as none is: seconds of processor time.
REMEMBERED, FIRST_IMPORT_S = 5, 10.0
#: A process is taken to have had a whole processor for so long before it began: the first moments say little about its share.
PRIOR_S = 1.0


@dataclass(frozen=True, slots=True)
class Sight:
    """What is seen of the zygote of a home folder.

    `pid` is 0 if no zygote runs. It has finished `done` of its `stages`; all of them: it serves. `used_s` is the processor time that it has
    used in `age_s`, `usual_s` what an import usually uses. `still_s` and `stage_used_s` are those of activity.Standstill. Without a
    process, `absent_s` is for how long there has been none, `next_s` in how many seconds its owner may start the next one (None without
    an owner), and `wants` the digest of the facts with which it will.
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
        """Whether it has imported everything and should answer."""
        return self.pid != 0 and 0 < self.stages <= self.done

    @property
    def share(self) -> float:
        """The share of a processor that it gets."""
        return min(1.0, (PRIOR_S + self.used_s) / (PRIOR_S + self.age_s))


class Watch:
    """Looks at the zygote of `home` again and again. `clock` gives seconds that go forward."""

    def __init__(self, home: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._home, self._clock = home, clock
        self._standstill, self._pid = Standstill(), 0
        self._last_seen = clock()

    def answered(self) -> None:
        """The zygote has just answered, so that it does not stand still."""
        self._standstill, self._pid = Standstill(), 0

    def look(self) -> Sight:
        """Look at it now."""
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
        # While it imports, helpers of it may do the work. Once it serves, it does all by itself, and this is asked every two seconds.
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
    """Writes the zygote's own reports: `stages` stages are to come."""

    def __init__(self, home: Path) -> None:
        self._folder = wire.folder(home)

    def report(self, done: int, stages: int) -> None:
        """So many stages are done. A report that cannot be written is left out: it must not stop an import."""
        with contextlib.suppress(OSError):
            _write(self._folder / REPORT, {"pid": os.getpid(), "done": done, "stages": stages})

    def imported(self, used_s: float) -> None:
        """All is imported, with so much processor time."""
        with contextlib.suppress(OSError):
            path = self._folder / IMPORTS
            _write(path, {"used_s": [*_known(path), used_s][-REMEMBERED:]})


def usual_import_s(home: Path) -> float:
    """The processor time that an import usually takes in this home folder."""
    known = _known(wire.folder(home) / IMPORTS)
    return statistics.median(known) if known else FIRST_IMPORT_S


def _known(path: Path) -> list[float]:
    try:
        return [float(used) for used in _read(path).get("used_s", [])]
    except (TypeError, ValueError):
        return []


def intend(home: Path, next_s: float, wants: str) -> None:
    """As the owner of the zygote: if there is none, another is started in so many seconds or soon after, with facts of this digest. Raises
    OSError."""
    _write(wire.folder(home) / INTENT, {"pid": os.getpid(), "next": time.monotonic() + next_s, "wants": wants})


def _next(intent: Mapping[str, Any]) -> float | None:
    with contextlib.suppress(OSError, KeyError, TypeError, ValueError):
        age_s(int(intent["pid"]))  # an owner that is gone starts nothing
        return max(0.0, float(intent["next"]) - time.monotonic())
    return None


@contextmanager
def importing_plainly(home: Path, pid: int, marks_path: Path) -> Iterator[None]:
    """Note during the block that an engine with this process id was started plainly, so that no zygote imports beside it. Without a note,
    which a full disk prevents, both are slower."""
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
    """The process ids of engines of this home folder that were started plainly and still import."""
    found = []
    with contextlib.suppress(OSError):
        for note in (wire.folder(home) / PLAIN).iterdir():
            with contextlib.suppress(OSError, ValueError):
                age_s(int(note.name))
                if marks.LOADING not in marks.read(Path(note.read_text())):
                    found.append(int(note.name))
    return found


def running(home: Path) -> int:
    """The process id of the zygote of a home folder, whether it listens already or not; 0 if none runs."""
    # The one that holds the lock; or else the one that was started last, which may not have come so far.
    folder = wire.folder(home)
    return next((pid for pid in (_number(folder / wire.LOCK), _number(folder / wire.PROCESS)) if pid and is_zygote(pid, home)), 0)


def _number(path: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return 0


def is_zygote(pid: int, home: Path) -> bool:
    """Whether that is what the process's command line says; not if it is gone, and its number belongs to another."""
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
