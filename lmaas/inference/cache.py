"""Short-lived cache of database reads."""

import asyncio
import functools
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from lmaas.errors import Unavailable

#: The maximum time of a read if the key has a stale entry, and if it has none.
KNOWN_WAIT_S = 1.0
UNKNOWN_WAIT_S = 10.0
#: If the database has been silent for KNOWN_WAIT_S, stale entries are served at once. After this time without a read, the next one waits
#: again.
SILENT_S = 20.0
#: The interval between reads of the change number.
LOOK_EVERY_S = 0.2
#: An entry is read again after this time in any case, in case a change was missed.
RECHECK_S = 300.0

Key = TypeVar("Key")
Value = TypeVar("Value")


class Changes:
    """Polls for all keys together whether cached data has changed, so that keys in use need not be read again every half second.

    `ask` returns a number that changes whenever cached data changes. While the number is unknown (`run` does not run, or the database is
    unavailable), entries age as if there were no such number, so a change is never seen later than without it.
    """

    def __init__(self, ask: Callable[[], Awaitable[int]], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._ask, self._clock = ask, clock
        self._number: int | None = None
        #: Entries read before this time may be outdated.
        self._changed = math.inf
        #: All changes made before this time have been seen.
        self.known = -math.inf

    def good_until(self, asked: float) -> float:
        """Return the time up to which an entry read at `asked` is known to be current."""
        return max(asked, self.known) if asked >= self._changed else asked

    async def look(self) -> None:
        """Read the change number once."""
        since = self._clock()
        try:
            async with asyncio.timeout(KNOWN_WAIT_S):
                number = await self._ask()
        except (Unavailable, TimeoutError):
            return
        if number != self._number:
            # A read during this one may have seen the data before the change.
            self._number, self._changed = number, self._clock()
        self.known = since

    async def run(self) -> None:
        """Read the change number repeatedly, until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_EVERY_S)


class ReadCache(Generic[Key, Value]):
    """Serves entries for `fresh_s` seconds after they were known to be current; while the database is away, for `grace_s` seconds.

    A change is seen after `fresh_s` at the latest. `changes` extends the time for which an entry is known to be current. Each key has one
    read at a time. None is not cached, so that a new row is seen at once. The cache holds at most `size` keys and drops the least
    recently used ones.
    """

    def __init__(
        self,
        ask: Callable[[Key], Awaitable[Value | None]],
        *,
        fresh_s: float,
        grace_s: float,
        size: int = 10_000,
        changes: Changes | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask, self._fresh_s, self._grace_s, self._size, self._clock = ask, fresh_s, grace_s, size, clock
        self._changes = changes
        self._known: OrderedDict[Key, tuple[float, Value]] = OrderedDict()
        self._asking: dict[Key, asyncio.Task[Value | None]] = {}
        #: When the last read began, and when the first one began of those that have had no result since the last result.
        self._last_read, self._silent_since = -math.inf, math.inf

    @property
    def pending(self) -> int:
        """The number of reads that have no result yet."""
        return len(self._asking)

    async def get(self, key: Key) -> Value | None:
        """Return the value for `key`. Raises Unavailable if it is not cached and the database does not respond."""
        known = self._known.get(key)
        now = self._clock()
        good_until = -math.inf if known is None else known[0] if self._changes is None else self._changes.good_until(known[0])
        if known is not None and now - good_until < self._fresh_s and now - known[0] < RECHECK_S:
            self._known.move_to_end(key)
            return known[1]
        if self._changes is not None and self._changes.known > self._silent_since:
            self._silent_since = math.inf  # the change number was read since
        asking = self._asking.get(key)
        if asking is None:
            if now - self._last_read > SILENT_S:
                self._silent_since = math.inf
            self._last_read, self._silent_since = now, min(self._silent_since, now)
            asking = asyncio.create_task(self._refresh(key))
            self._asking[key] = asking
            asking.add_done_callback(functools.partial(self._read_ended, key))
        wait_s = UNKNOWN_WAIT_S
        if known is not None and now - good_until < self._grace_s:
            # The wait counts from the first read without a result, over all keys, so that callers do not wait one after the other.
            wait_s = max(0.0, min(self._silent_since, now) + KNOWN_WAIT_S - now)
        try:
            async with asyncio.timeout(wait_s):
                return await asyncio.shield(asking)
        except (Unavailable, TimeoutError) as error:
            if known is not None and now - good_until < self._grace_s:
                return known[1]
            raise Unavailable("The database does not respond. Retry after 2 s.", code="database_unavailable", retry_after_s=2) from error

    def _read_ended(self, key: Key, asking: "asyncio.Task[Value | None]") -> None:
        del self._asking[key]
        if not asking.cancelled():
            asking.exception()  # callers that still wait receive it; without any, it must not be logged as unretrieved

    async def _refresh(self, key: Key) -> Value | None:
        asked = self._clock()
        # The timeout covers dead connections, which would block the key forever.
        try:
            async with asyncio.timeout(UNKNOWN_WAIT_S):
                value = await self._ask(key)
        except TimeoutError:
            raise Unavailable("The database does not respond. Retry after 2 s.", code="database_unavailable", retry_after_s=2) from None
        self._silent_since = math.inf
        if value is None:
            self._known.pop(key, None)
        else:
            self._known[key] = (asked, value)
            self._known.move_to_end(key)
            while len(self._known) > self._size:
                self._known.popitem(last=False)
        return value
