"""The reserve of free slots that background tickets leave to interactive ones, in plain Python. See reserve.lua."""

from dataclasses import dataclass
from math import floor

TRAFFIC_MS = 60_000
PEAK_MS = 5000
BOOST_MS = 60_000


def faded(value: float, since_ms: int, half_ms: int) -> float:
    """Return a value as it has faded. After `half_ms`, half of it is left."""
    return value * half_ms / (half_ms + max(0, since_ms))


@dataclass
class Reserve:
    """What interactive work did lately: when the last ticket came, the latest peak of its load, and the slots of background tickets that
    were put back for it. The times are those of the pool, in ms."""

    arrived: int | None = None
    peak: float = 0
    peak_at: int = 0
    boost: float = 0
    boost_at: int = 0

    def is_busy(self, now: int) -> bool:
        """Return whether interactive tickets came lately."""
        return self.arrived is not None and now - self.arrived < TRAFFIC_MS

    def above(self, now: int, taken: int) -> float:
        """Return by how much the latest peak is above the slots that interactive tickets have now, as it has faded."""
        return faded(max(0, self.peak - taken), now - self.peak_at, PEAK_MS)

    def see_growth(self, now: int, taken: int, slots: int) -> None:
        """Note that an interactive ticket takes slots."""
        self.peak, self.peak_at = max(taken + self.above(now, taken), taken + slots), now

    def see_yield(self, now: int, slots: int) -> None:
        """Note that a background ticket was put back."""
        self.boost, self.boost_at = faded(self.boost, now - self.boost_at, BOOST_MS) + slots, now

    def slots(self, now: int, taken: int, open_slots: int) -> int:
        """Return the reserve, of a pool with that many slots on replicas that get work."""
        if not self.is_busy(now):
            return 0
        needed = max(self.above(now, taken), 1 + faded(self.boost, now - self.boost_at, BOOST_MS))
        return min(open_slots // 2, floor(needed + 0.5))
