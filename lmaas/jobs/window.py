"""The number of lines of a pool that a runner leases: as many as its engines have room for, and a few ahead, so that no engine waits for a
runner. Pure."""

from dataclasses import dataclass
from typing import NamedTuple

#: The lines that wait ahead of the engines: for so much time at the speed at which lines begin, within bounds.
AHEAD_S = 1.0
MIN_AHEAD, MAX_AHEAD = 2, 512
#: The most that wait because all lines that run may end in the same step.
MAX_TOGETHER = 256
#: The weight of the newest measurement of that speed.
NEWEST = 0.5


class Room(NamedTuple):
    """The scheduler's report about a pool: replicas that take work, their slots, background slots that could be granted now, and
    background tickets that wait."""

    ready: int
    slots: int
    room: int
    queued: int


@dataclass(slots=True)
class Window:
    """The window of one pool. `observe` adapts it to what the engines take, and `wanted` returns how many lines to lease."""

    #: Lines that begin to run per second.
    per_s: float = 0.0
    #: Until then, the pool need not be looked at unless it has lines.
    idle_until: float = 0.0
    #: True if lines were put back since lines last began without that.
    _is_closed: bool = False
    _observed_at: float | None = None
    _cold_since: float | None = None

    @property
    def ahead(self) -> int:
        """The number of lines that should wait ahead of the engines, by the speed at which lines begin."""
        return min(MAX_AHEAD, max(MIN_AHEAD, round(self.per_s * AHEAD_S)))

    def observe(self, begun: int, put_back: int, now: float) -> None:
        """Take into account how many lines began to run and how many were put back since the last observation."""
        if self._observed_at is not None and now > self._observed_at:
            newest = begun / (now - self._observed_at)
            # Interactive work needs its slots: what was begun and put back is no measure of what the engines take.
            self.per_s = 0.0 if put_back else NEWEST * newest + (1 - NEWEST) * self.per_s
            self._is_closed = bool(put_back) or (self._is_closed and not begun)
        self._observed_at = now

    def cold_s(self, room: Room, now: float) -> float:
        """Return for how long no engine of the pool has been ready."""
        self._cold_since = None if room.ready else now if self._cold_since is None else self._cold_since
        return 0.0 if self._cold_since is None else now - self._cold_since

    def wanted(self, room: Room, waiting: int) -> int:
        """Return how many lines to lease now. `waiting` are this runner's lines that do not run yet.

        Several are leased at a time: when half of those ahead are left, or an engine has room.
        """
        if room.ready == 0:
            return 0
        # Lines of the same length that began together end together.
        ahead = self.ahead if self._is_closed else max(self.ahead, min(room.slots, MAX_TOGETHER))
        waiting = max(waiting, room.queued)
        missing = room.room + ahead - waiting
        return max(0, missing) if room.room > waiting or 2 * waiting <= ahead else 0
