"""Answers of the database that are good for a moment."""

import asyncio
import functools
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from lmaas.errors import Unavailable

#: How long a question may take, if there is an old answer, and if there is none.
KNOWN_WAIT_S = 1.0
UNKNOWN_WAIT_S = 10.0

Key = TypeVar("Key")
Value = TypeVar("Value")


class MomentCache(Generic[Key, Value]):
    """Keeps answers for `fresh_s` seconds; while the database is away, known ones for `grace_s`.

    What changed is seen after `fresh_s` at the latest. One question at a time for each key; None is not kept, so that something
    new is seen at once. At most `size` keys: the longest unused go first.
    """

    def __init__(
        self,
        ask: Callable[[Key], Awaitable[Value | None]],
        *,
        fresh_s: float,
        grace_s: float,
        size: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask, self._fresh_s, self._grace_s, self._size, self._clock = ask, fresh_s, grace_s, size, clock
        self._known: OrderedDict[Key, tuple[float, Value]] = OrderedDict()
        self._asking: dict[Key, asyncio.Task[Value | None]] = {}

    async def get(self, key: Key) -> Value | None:
        """The answer for `key`. Raises Unavailable if it is not known and cannot be asked for."""
        known = self._known.get(key)
        now = self._clock()
        if known is not None and now - known[0] < self._fresh_s:
            self._known.move_to_end(key)
            return known[1]
        asking = self._asking.get(key)
        if asking is None:
            asking = asyncio.create_task(self._refresh(key))
            self._asking[key] = asking
            asking.add_done_callback(functools.partial(self._answered, key))
        try:
            async with asyncio.timeout(UNKNOWN_WAIT_S if known is None else KNOWN_WAIT_S):
                return await asyncio.shield(asking)
        except (Unavailable, TimeoutError) as error:
            if known is not None and now - known[0] < self._grace_s:
                return known[1]
            raise Unavailable(
                "The database does not answer. Please try again shortly.", code="database_unavailable", retry_after_s=2
            ) from error

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
            raise Unavailable("The database does not answer.", code="database_unavailable", retry_after_s=2) from None
        if value is None:
            self._known.pop(key, None)
        else:
            self._known[key] = (asked, value)
            self._known.move_to_end(key)
            while len(self._known) > self._size:
                self._known.popitem(last=False)
        return value
