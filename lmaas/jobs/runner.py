"""The life of a job runner: its heartbeat, the work it does while it has one, and what it gives back at its end."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from lmaas.errors import Unavailable
from lmaas.store.database import Database
from lmaas.store.runners import RUNNER_LOST_S, LeaseLost, end, free_lost, register, seen

log = logging.getLogger(__name__)

#: The interval at which a runner renews its row, and looks for runners that are lost. Several of these fit into RUNNER_LOST_S.
BEAT_S = 2.0
#: The pause before a runner tries again to register itself.
AGAIN_S = 1.0


class Worker(Protocol):
    """One kind of durable work."""

    async def run(self, runner_id: str, stopping: asyncio.Event) -> None:
        """Lease work for this runner and do it, until `stopping` is set; then give back or finish what is leased, and return.

        It is cancelled when the runner has lost its leases. Then it must write nothing more. It may raise LeaseLost when it notices that
        itself, and must outlast a database and a queue that are away.
        """


@dataclass(slots=True)
class Beats:
    """Decides whether a runner may declare others lost. Pure.

    When no renewal succeeds for a while, Postgres may have been away for all runners. Then the rows of the others are old, too, although
    they live, and they need time to renew them.
    """

    #: When the latest renewal succeeded; before the first one, when the process began to try.
    succeeded_at: float
    _spares_until: float = float("-inf")

    def succeeded(self, now: float) -> bool:
        """Note a renewal that succeeded. Returns whether others may be declared lost now."""
        if now - self.succeeded_at > RUNNER_LOST_S / 2:
            self._spares_until = now + RUNNER_LOST_S
        self.succeeded_at = now
        return now >= self._spares_until


class Runner:
    """Does durable work with leases of its own. When it is declared lost, it drops its work and begins anew under another id."""

    def __init__(
        self, db: Database, workers: Sequence[Worker], on_lost: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._db, self._workers, self._on_lost, self._clock = db, workers, on_lost, clock
        self._beats = Beats(clock())
        #: None while it is not registered.
        self.id: str | None = None

    async def run(self, stopping: asyncio.Event) -> None:
        """Work until `stopping` is set."""
        while not stopping.is_set():
            try:
                self.id = runner_id = await register(self._db)
            except Unavailable as error:
                log.warning("a runner cannot register itself now", extra={"action": "lease", "detail": str(error)})
                await until_set(stopping, AGAIN_S)
                continue
            log.info("runner active", extra={"action": "lease", "detail": runner_id})
            try:
                async with asyncio.TaskGroup() as group:
                    beating = group.create_task(self._beat(runner_id), name="heartbeat")
                    working = [group.create_task(worker.run(runner_id, stopping), name=type(worker).__name__) for worker in self._workers]
                    await asyncio.gather(*working)
                    beating.cancel()
            except* LeaseLost:
                self._on_lost()
                log.warning("runner lost its leases; it begins anew", extra={"action": "lease", "detail": runner_id})
            finally:
                self.id = None
            # Its remaining leases are free at once, and not only when it counts as lost.
            with suppress(Unavailable):
                await end(self._db, runner_id)

    async def _beat(self, runner_id: str) -> None:
        while True:
            try:
                await seen(self._db, runner_id)
                may_free = self._beats.succeeded(self._clock())
                while may_free and (lost := await free_lost(self._db)) is not None:
                    log.warning("a runner was lost; its work is free", extra={"action": "lease", "detail": lost})
            except Unavailable as error:
                # While Postgres is away, nothing can be leased. `Beats` gives the others time to renew their rows afterwards.
                log.warning("the heartbeat is late", extra={"action": "lease", "detail": str(error)})
            await asyncio.sleep(BEAT_S)


async def until_set(event: asyncio.Event, timeout_s: float) -> None:
    """Wait until the event is set, at most for so long."""
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
