"""Answers of the database that are good for a moment."""

import asyncio
import functools
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from lmaas.errors import Unavailable

#: How long a question may take, if there is an old answer, and if there is none.
KNOWN_WAIT_S = 1.0
UNKNOWN_WAIT_S = 10.0
#: Those with an old answer do not wait for a database that has answered nobody for KNOWN_WAIT_S, until nobody has asked for this long.
SILENT_S = 20.0
#: How often somebody asks whether anything has changed.
LOOK_EVERY_S = 0.2
#: An answer is asked for again after this long even so, should a change ever go unnoticed.
RECHECK_S = 300.0

Key = TypeVar("Key")
Value = TypeVar("Value")


class Changes:
    """Asks once for all keys whether anything has changed. Without it each key in use would be a question to the database every moment.

    `ask` gives a number that is another one after any change of what answers are made of. While nobody knows (`run` does not run, the
    database is away), answers age as if there were no such number: what changed is never seen later than without it.
    """

    def __init__(self, ask: Callable[[], Awaitable[int]], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._ask, self._clock = ask, clock
        self._number: int | None = None
        #: Answers asked for earlier may be wrong.
        self._changed = math.inf
        #: Changes that were made by then are known: the database was there.
        self.known = -math.inf

    def good_until(self, asked: float) -> float:
        """Up to when an answer that was asked for at `asked` is known to be right."""
        return max(asked, self.known) if asked >= self._changed else asked

    async def look(self) -> None:
        """Ask once."""
        since = self._clock()
        try:
            async with asyncio.timeout(KNOWN_WAIT_S):
                number = await self._ask()
        except (Unavailable, TimeoutError):
            return
        if number != self._number:
            # Whoever asked while we did may have asked too early.
            self._number, self._changed = number, self._clock()
        self.known = since

    async def run(self) -> None:
        """Ask again and again, until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_EVERY_S)


class MomentCache(Generic[Key, Value]):
    """Keeps answers for `fresh_s` seconds after they are known to be right; while the database is away, for `grace_s`.

    What changed is seen after `fresh_s` at the latest; `changes` knows how long an answer stays right. One question at a time for each
    key; None is not kept, so that something new is seen at once. At most `size` keys: the longest unused go first.
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
        #: When a question was asked last; the first one of those since when none was answered.
        self._asked_last, self._silent_since = -math.inf, math.inf

    async def get(self, key: Key) -> Value | None:
        """The answer for `key`. Raises Unavailable if it is not known and cannot be asked for."""
        known = self._known.get(key)
        now = self._clock()
        good_until = -math.inf if known is None else known[0] if self._changes is None else self._changes.good_until(known[0])
        if known is not None and now - good_until < self._fresh_s and now - known[0] < RECHECK_S:
            self._known.move_to_end(key)
            return known[1]
        if self._changes is not None and self._changes.known > self._silent_since:
            self._silent_since = math.inf  # it has answered somebody else
        asking = self._asking.get(key)
        if asking is None:
            if now - self._asked_last > SILENT_S:
                self._silent_since = math.inf
            self._asked_last, self._silent_since = now, min(self._silent_since, now)
            asking = asyncio.create_task(self._refresh(key))
            self._asking[key] = asking
            asking.add_done_callback(functools.partial(self._answered, key))
        wait_s = UNKNOWN_WAIT_S
        if known is not None and now - good_until < self._grace_s:
            # Once in all, not each time, nor for each key.
            wait_s = max(0.0, min(self._silent_since, now) + KNOWN_WAIT_S - now)
        try:
            async with asyncio.timeout(wait_s):
                return await asyncio.shield(asking)
        except (Unavailable, TimeoutError) as error:
            if known is not None and now - good_until < self._grace_s:
                return known[1]
            raise Unavailable("The database does not respond. Retry after 2 s.", code="database_unavailable", retry_after_s=2) from error

    def _answered(self, key: Key, asking: "asyncio.Task[Value | None]") -> None:
        del self._asking[key]
        if not asking.cancelled():
            asking.exception()  # whoever waits hears it; if nobody does any more, nothing is lost

    async def _refresh(self, key: Key) -> Value | None:
        asked = self._clock()
        # Given up at last: a connection that is dead would never answer, and nobody would ask again.
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
