"""Our gateway without admission: `python -m bench.gateways.open_gateway ENGINE_URL`, with a gateway's settings.

Nothing is asked of Redis: no limits, no queue, no leases, no usage events. Every request goes to one engine at once. All else is as it is.
"""

import asyncio
import functools
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from lmaas import app
from lmaas.cli import main
from lmaas.scheduling.leases import Lease


class OpenDoor:
    """A ticket that has its lease already."""

    position = wait_ms = 0

    def __init__(self, ticket: Any, lease: Lease) -> None:
        self.ticket, self.lease = ticket, lease
        #: What is left of limits that nobody counts.
        self.left: dict[str, Any] = {}

    async def wait(self, _: float) -> Lease:
        """The lease."""
        return self.lease

    def wake(self) -> None:
        """Nobody waits."""

    def on_revoked(self, callback: Callable[[], None]) -> None:
        """Nothing is revoked."""

    async def retry(self, lost: Lease, reason: str) -> None:
        """Raises RuntimeError: the engine of a bench does not fail."""
        raise RuntimeError(f"{lost.url}: {reason}")


class OpenDoors:
    """In the place of `Leases`: grants everything, on one replica."""

    def __init__(self, engine_url: str, _: Any, gateway: str) -> None:
        self.gateway = gateway
        self._lease = Lease("rep_bench", engine_url, 0, 0)

    @asynccontextmanager
    async def open(self, ticket: Any, *_: Any, **__: Any) -> AsyncIterator[OpenDoor]:
        """Grant."""
        yield OpenDoor(ticket, self._lease)

    async def run(self) -> None:
        """Nothing is to be renewed."""
        await asyncio.Event().wait()

    async def drained(self) -> None:
        """Nothing is to be told."""


if __name__ == "__main__":
    # The gateway's own command builds it, so that it runs as any other; only its leases are not its own.
    vars(app)["Leases"] = functools.partial(OpenDoors, sys.argv.pop(1))
    sys.argv.append("gateway")
    main()
