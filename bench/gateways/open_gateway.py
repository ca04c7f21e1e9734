"""A gateway without admission, with a gateway's settings: `python -m bench.gateways.open_gateway ENGINE_URL`.

It has no limits, queue or leases: every request is sent to one engine immediately. Everything else is the same, including metering: the
same code writes the usage event of each request to Redis at its end.
"""

import asyncio
import functools
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from lmaas import app
from lmaas.cli import main
from lmaas.scheduling.client import Scheduler
from lmaas.scheduling.leases import Lease, Leases, Settlement
from lmaas.types import TokenCounts


class OpenDoor:
    """A ticket that has a lease from the start."""

    settled = yielded = False

    def __init__(self, ticket: Any, usage: Any, lease: Lease) -> None:
        self.ticket, self.usage, self.lease = ticket, usage, lease
        #: The rest of each limit. Empty, because limits are not counted.
        self.left: dict[str, Any] = {}

    async def wait(self, _: float) -> Lease:
        """Return the lease."""
        return self.lease

    def wake(self) -> None:
        """Do nothing, because no request waits."""

    def on_revoked(self, callback: Callable[[], None]) -> None:
        """Do nothing, because no lease is revoked."""

    def on_yielded(self, callback: Callable[[], None]) -> None:
        """Do nothing, because no slot is taken back."""

    async def retry(self, lost: Lease, reason: str) -> None:
        """Raise RuntimeError, because the engine of a benchmark does not fail."""
        raise RuntimeError(f"{lost.url}: {reason}")


class EventsOnly(Scheduler):
    """Writes usage events, and releases nothing."""

    def send_release(self, ticket: Any, event: str, run_ms: int | None, used: TokenCounts | None) -> "asyncio.Future[Any]":
        """Write the usage event to the pool's stream."""
        return self._pipelined.send("XADD", f"lmaas:{{{ticket.pool}}}:usage", "*", "event", event)

    def released(self, ticket: Any, reply: Any) -> bool:
        """Ignore the reply, which has no facts about the pool."""
        return True


class OpenDoors(Leases):
    """A replacement for `Leases` that grants everything, on one replica."""

    def __init__(self, engine_url: str, scheduler: Scheduler, gateway: str) -> None:
        super().__init__(EventsOnly(scheduler.redis), gateway)
        self._lease = Lease("rep_bench", engine_url, 0, 0)

    @asynccontextmanager
    async def open(self, ticket: Any, usage: Any, *_: Any, **__: Any) -> AsyncIterator[Any]:
        """Return a granted ticket."""
        door = OpenDoor(ticket, usage, self._lease)
        yield door
        if not door.settled:
            await asyncio.wait({self.settle(door)})

    def settle(self, opened: Any) -> "asyncio.Future[Any]":
        """Write the usage event."""
        opened.settled = True
        return self._send_end(Settlement(opened.ticket, opened.usage.event(), opened.usage.run_ms, opened.usage.progress()))


if __name__ == "__main__":
    # The gateway's own command builds the application, so that only its leases differ.
    vars(app)["Leases"] = functools.partial(OpenDoors, sys.argv.pop(1))
    sys.argv.append("gateway")
    main()
