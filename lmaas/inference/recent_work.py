"""The checks and counts that each tenant has caused in the last minute, outside of engines. Each gateway limits them."""

import asyncio
import math
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar

from lmaas.errors import OverLimit

#: The time for which a tenant's work counts, and the CPU time that it may take within that time.
WINDOW_S = 60.0
MAX_CPU_S = 20.0
#: The maximum number of tenants whose work is counted.
KNOWN_TENANTS = 10_000


@dataclass(slots=True)
class RecentWork:
    """A tenant's work of the last minute: the start of each piece, and its end with the CPU time. The pieces run one at a time."""

    #: The number of pieces that may begin in a minute, the code of the error beyond a limit, and the beginnings of its messages.
    most: ClassVar[int]
    code: ClassVar[str]
    too_many: ClassVar[str]
    too_long: ClassVar[str]
    #: A sentence of the messages that names the requests which do not count.
    exempt: ClassVar[str] = ""

    began: deque[float] = field(default_factory=deque)
    ended: deque[tuple[float, float]] = field(default_factory=deque)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    #: The number of requests that wait.
    waiting: int = 0

    def begin(self, now: float) -> None:
        """Count a piece that begins at `now`. Raises OverLimit if the tenant has reached a limit."""
        while self.began and self.began[0] <= now - WINDOW_S:
            self.began.popleft()
        if len(self.began) >= self.most:
            raise self._over(f"{self.too_many} in a minute, the maximum", self.began[0] + WINDOW_S - now)
        self.spend(now)
        self.began.append(now)

    def spend(self, now: float) -> None:
        """Raise OverLimit if the tenant's work has used up its CPU time in the minute before `now`."""
        while self.ended and self.ended[0][0] <= now - WINDOW_S:
            self.ended.popleft()
        spent = sum(cpu_s for _, cpu_s in self.ended)
        if spent >= MAX_CPU_S:
            words = f"{self.too_long} {spent:.0f} s of computing time within a minute, and {MAX_CPU_S:g} s are allowed"
            raise self._over(words, self.ended[0][0] + WINDOW_S - now)

    def _over(self, words: str, retry_after_s: float) -> OverLimit:
        message = f"{words}.{self.exempt} Retry after {max(1, math.ceil(retry_after_s))} s."
        return OverLimit(message, code=self.code, retry_after_s=retry_after_s)


Work = TypeVar("Work", bound=RecentWork)


class WorkOfTenants(Generic[Work]):
    """The recent work of the tenants that had some most recently."""

    def __init__(self, new: Callable[[], Work]) -> None:
        self._new = new
        self._tenants: OrderedDict[str, Work] = OrderedDict()

    def of(self, tenant_id: str) -> Work:
        """Return a tenant's work."""
        found = self._tenants.get(tenant_id)
        if found is None:
            found = self._tenants[tenant_id] = self._new()
        self._tenants.move_to_end(tenant_id)
        if len(self._tenants) > KNOWN_TENANTS:
            self._tenants.popitem(last=False)
        return found
