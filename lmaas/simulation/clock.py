"""A clock that jumps from one event to the next: hours take seconds, and every run is the same."""

import heapq
from collections.abc import Callable


class Clock:
    """Runs what is due in the order of time; what is due at the same moment, in the order in which it was asked for."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._asked = 0

    def at(self, when_s: float, what: Callable[[], None]) -> None:
        """Do this at that time; now, if it has passed."""
        self._asked += 1
        heapq.heappush(self._due, (max(when_s, self.now_s), self._asked, what))

    def after(self, delay_s: float, what: Callable[[], None]) -> None:
        """Do this so many seconds from now."""
        self.at(self.now_s + delay_s, what)

    def run(self) -> None:
        """Go on until nothing is due any more."""
        while self._due:
            self.now_s, _, what = heapq.heappop(self._due)
            what()
