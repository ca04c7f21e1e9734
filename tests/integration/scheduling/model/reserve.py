"""The reserve of free slots that background tickets leave to interactive ones, in plain Python. See reserve.lua."""

from dataclasses import dataclass
from math import floor

TRAFFIC_MS = 60_000
BOOST_MS = 60_000


@dataclass
class Reserve:
    """The time of the last interactive ticket, and the slots of background tickets that were put back lately. Times are the pool's, in
    ms."""

    arrived: int | None = None
    boost: float = 0
    boost_at: int = 0

    def is_busy(self, now: int) -> bool:
        """Return whether interactive tickets came lately."""
        return self.arrived is not None and now - self.arrived < TRAFFIC_MS

    def put_back_lately(self, now: int) -> float:
        """Return how many slots were put back. After BOOST_MS, half of them count."""
        return self.boost * BOOST_MS / (BOOST_MS + max(0, now - self.boost_at))

    def see_yield(self, now: int, slots: int) -> None:
        """Note that a background ticket was put back."""
        self.boost, self.boost_at = self.put_back_lately(now) + slots, now

    def slots(self, now: int, open_slots: int) -> int:
        """Return the reserve, of a pool with that many slots on replicas that get work."""
        return min(open_slots // 2, floor(self.put_back_lately(now) + 0.5)) if self.is_busy(now) else 0
