"""The limits of reading tenants' responses and conversations, which costs nothing and may be much."""

import asyncio
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from lmaas.errors import OverLimit, Unavailable

#: The requests of a tenant whose earlier items are read at a time, and those that wait for that. So one tenant cannot take all connections.
AT_ONCE = 2
MAX_WAITING = 64
#: The time for which a request waits for its earlier items, its turn included.
READ_S = 10.0
#: Work with more bytes or parts runs in a thread. Less work costs less than the thread.
BYTES_IN_PLACE = 64 * 1024
PARTS_IN_PLACE = 500

T = TypeVar("T")


class _Tenant:
    """The turns of one tenant."""

    def __init__(self) -> None:
        self.free, self.waiting = asyncio.Semaphore(AT_ONCE), 0


class Turns:
    """Has the readings of one gateway's tenants wait for each other, and end in time."""

    def __init__(self) -> None:
        # An entry disappears with the last reading.
        self._tenants: weakref.WeakValueDictionary[str, _Tenant] = weakref.WeakValueDictionary()
        self._alone = asyncio.Lock()

    async def take(self, tenant_id: str, reading: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Read when it is the tenant's turn, and return the result.

        Raises OverLimit if too many of the tenant's requests wait, and Unavailable if it takes too long. A reading to which Postgres does
        not respond cannot be ended: it continues without the request, and the turn is over with it.
        """
        tenant = self._tenants.setdefault(tenant_id, _Tenant())
        if tenant.waiting >= MAX_WAITING:
            raise OverLimit(
                f"You have {MAX_WAITING} requests that wait for earlier responses to be read, the maximum. Retry after 1 s.",
                code="queue_full",
                retry_after_s=1,
            )
        try:
            async with asyncio.timeout(READ_S):
                tenant.waiting += 1
                try:
                    await tenant.free.acquire()
                finally:
                    tenant.waiting -= 1
                task = asyncio.create_task(reading(), name="earlier-items")

                def done(task: "asyncio.Task[T]") -> None:
                    tenant.free.release()
                    if not task.cancelled():
                        task.exception()  # the request receives it; without one, it must not be logged as unretrieved

                task.add_done_callback(done)
                return await asyncio.shield(task)
        except TimeoutError:
            raise Unavailable(
                f"The database did not answer within {READ_S:g} s. Retry after 2 s.", code="database_unavailable", retry_after_s=2
            ) from None

    async def apart(self, work: Callable[[], T], *, is_large: bool) -> T:
        """Do what needs the CPU. If it is large, other requests run meanwhile, and other work of this kind waits."""
        if not is_large:
            return work()
        async with self._alone:
            return await asyncio.to_thread(work)
