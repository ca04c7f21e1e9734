"""Job runners with only the part that runs responses in the background, in the test's own event loop."""

import asyncio
import functools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta

from lmaas.app import build_inferences
from lmaas.errors import Unavailable
from lmaas.inference.cache import Changes
from lmaas.inference.observers import UNOBSERVED, Observers
from lmaas.jobs.background import BackgroundRuns
from lmaas.jobs.keys import Keys
from lmaas.jobs.metrics import JobMetrics
from lmaas.observability import GatewayMetrics
from lmaas.protocols.responses.background import BackgroundResponses
from lmaas.protocols.responses.stored import StoredState
from lmaas.store.changes import change_number
from lmaas.store.database import Database
from lmaas.store.rights import DatabaseRole
from lmaas.store.runners import end, free_lost, register, seen
from lmaas.store.scopes import SYSTEM
from tests.integration.gateway.stack import Stack

MONTH = timedelta(days=30)


@dataclass
class Runner:
    """A runner that sends beats until it is killed or stopped."""

    id: str
    runs: BackgroundRuns
    db: Database
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    tasks: list["asyncio.Task[None]"] = field(default_factory=list)

    async def stop(self) -> None:
        """Stop the runner as SIGTERM does."""
        self.stopping.set()
        await self.tasks[0]
        self.tasks[1].cancel()
        await end(self.db, self.id)

    async def kill(self) -> None:
        """End the runner without giving anything back, and have the others notice at once."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        async with self.db.begin(SYSTEM) as connection:
            await connection.exec_driver_sql("UPDATE job_runners SET seen_at = now() - interval '1 hour' WHERE id = %s", (self.id,))
        await free_lost(self.db)


async def _beat(db: Database, runner_id: str) -> None:
    while True:
        with suppress(Unavailable):
            await seen(db, runner_id)
        await asyncio.sleep(1)


@asynccontextmanager
async def runner(stack: Stack, observers: Observers = UNOBSERVED) -> AsyncIterator[Runner]:
    """Run a runner with its database login until the end of the block."""
    db = stack.database(DatabaseRole.JOBS)
    changes, metrics = Changes(functools.partial(change_number, db)), GatewayMetrics()
    inferences = build_inferences(stack.settings, replace(stack.services, db=db), changes, metrics)

    protocol = BackgroundResponses(StoredState(db))
    runs = BackgroundRuns(db, inferences, protocol, Keys(db, 1, changes), JobMetrics(), MONTH, observers)
    made = Runner(await register(db), runs, db)
    async with inferences.client:
        keepers = [asyncio.create_task(inferences.leases.run()), asyncio.create_task(changes.run())]
        made.tasks = [
            asyncio.create_task(made.runs.run(made.id, made.stopping), name="background"),
            asyncio.create_task(_beat(db, made.id), name="beat"),
        ]
        try:
            yield made
        finally:
            for task in made.tasks:
                task.cancel()
            with suppress(asyncio.CancelledError):
                await made.tasks[0]
            await inferences.leases.drained()
            for keeper in keepers:
                keeper.cancel()
            await asyncio.gather(*made.tasks, *keepers, return_exceptions=True)
