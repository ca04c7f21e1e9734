"""A virtual clock that jumps from one event to the next, so that hours take seconds and every run is the same."""

import heapq
from collections.abc import Callable


class Clock:
    """Runs callbacks in the order of their time, and those of the same time in the order in which they were scheduled."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._asked = 0

    def at(self, when_s: float, what: Callable[[], None]) -> None:
        """Schedule a callback for a time, or for now if the time has passed."""
        self._asked += 1
        heapq.heappush(self._due, (max(when_s, self.now_s), self._asked, what))

    def after(self, delay_s: float, what: Callable[[], None]) -> None:
        """Schedule a callback after a number of seconds."""
        self.at(self.now_s + delay_s, what)

    def run(self) -> None:
        """Run until no callback is left."""
        while self._due:
            self.now_s, _, what = heapq.heappop(self._due)
            what()
