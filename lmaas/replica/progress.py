"""The progress of an engine's start: the estimated remaining time, for waiting requests, and whether the start has stalled."""

import asyncio
import time
from collections.abc import Callable

from lmaas.engine.activity import Activity, Standstill, activity_of, family_of
from lmaas.engine.launch import EngineProcess
from lmaas.engine.zygote.policy import FIRST_START_S, import_left_s
from lmaas.engine.zygote.progress import Sight

#: The interval between checks of a starting engine's processes.
EVERY_S = 1.0
#: The time without progress after which a starting engine's processes count as stalled. Some wait for a file that another process downloads
#: or compiles.
STILL_S = 60.0


def stuck(standstill_s: float, used_s: float, elapsed_s: float, timeout_s: float) -> str:
    """Return the reason why a start counts as failed, because it has stalled or takes too long, or an empty string if it continues.

    A start takes too long if both its duration and its processor time exceed `timeout_s`. On a busy machine the duration alone proves
    nothing.
    """
    if standstill_s > STILL_S:
        return f"the engine stood still for {standstill_s:.0f} s while it started"
    if elapsed_s > timeout_s and used_s > timeout_s:
        return f"the engine was not ready within {timeout_s:.0f} s, in which it used {used_s:.0f} s of processor time"
    return ""


def start_left_s(usual_s: float, activity: Activity, elapsed_s: float) -> tuple[float, float]:
    """Return the remaining time of a start, and the time by which it is late, in seconds.

    The expected duration grows in proportion to the time that processes wait for a processor. A start that is late is estimated to need the
    same time again by which it is late.
    """
    expected_s = usual_s * (activity.wanted_s / activity.used_s if activity.used_s > 0 else 1.0)
    return max(min(1.0, expected_s), expected_s - elapsed_s, elapsed_s - expected_s), max(0.0, elapsed_s - expected_s)


class StartProgress:
    """The progress of one start. `clock` returns monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        #: The usual duration of such a start, from the fork or from the plain start, in seconds. None if it is not known.
        self.usual_s: float | None = None
        self._engine: EngineProcess | None = None
        self._seen: tuple[Sight, float] | None = None
        self._first_seen = self._began = 0.0
        self._activity = Activity()

    def saw(self, seen: Sight) -> None:
        """Record the state of the zygote that the start waits for."""
        now = self._clock()
        self._first_seen = now if self._seen is None else self._first_seen
        self._seen = (seen, now)

    def began(self, engine: EngineProcess) -> None:
        """Record that a process of the engine has started."""
        self._engine, self._began = engine, self._clock()

    @property
    def waited_s(self) -> float:
        """The seconds for which the start has waited for a zygote."""
        return 0.0 if self._seen is None else (self._began or self._clock()) - self._first_seen

    def left_ms(self) -> tuple[int, int]:
        """Return the remaining time of the start, and the time by which it is late, in milliseconds."""
        now = self._clock()
        usual_s = self.usual_s or FIRST_START_S["zygote" if self._engine is None else self._engine.by]
        if self._engine is not None:
            left_s, late_s = start_left_s(usual_s, self._activity, now - self._began)
        elif self._seen is not None:
            seen, at = self._seen
            left_s = max(0.0, import_left_s(seen) - (now - at)) + usual_s / seen.share
            late_s = max(0.0, seen.used_s - seen.usual_s) / seen.share
        else:
            left_s, late_s = usual_s, 0.0
        return round(1000 * left_s), round(1000 * late_s)

    async def until_stuck(self, engine: EngineProcess, timeout_s: float) -> str:
        """Watch a start, and return the reason once it counts as failed. Cancel this when the engine is ready."""
        standstill = Standstill()
        while True:
            self._activity = await asyncio.to_thread(lambda: activity_of(family_of(engine.pid)))
            now = self._clock()
            standstill.look(len(engine.marks()), self._activity, now)
            if reason := stuck(standstill.still_s, self._activity.used_s, now - self._began, timeout_s):
                return reason
            await asyncio.sleep(EVERY_S)
