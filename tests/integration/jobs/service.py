"""A job runner's worker of lines in the test's own event loop, with fake engines."""

import asyncio
import dataclasses
import functools
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, LiteralString

from sqlalchemy.ext.asyncio import AsyncConnection

from lmaas.app import batch_protocols, build_inferences
from lmaas.errors import NotFound
from lmaas.inference.cache import Changes
from lmaas.inference.observers import UNOBSERVED, Observers
from lmaas.inference.serving import Inferences
from lmaas.jobs.keys import Keys
from lmaas.jobs.lines import LineWorker
from lmaas.jobs.metrics import JobMetrics
from lmaas.jobs.runner import Runner
from lmaas.observability import GatewayMetrics
from lmaas.protocols.responses.lines import LineResponses
from lmaas.protocols.responses.stored import StoredState
from lmaas.states import UsageStatus
from lmaas.store.batch_lines import NewLine
from lmaas.store.changes import change_number
from lmaas.store.database import Database
from lmaas.store.models import BaseModel
from lmaas.store.rights import DatabaseRole
from lmaas.store.scopes import AnyScope
from lmaas.store.usage import UsageEvent
from tests.integration.gateway.stack import Stack, Tenant
from tests.support.batches import batch_row, make_batch


@dataclass
class Texts:
    """Input files in memory: the bytes of each by its id."""

    texts: dict[str, bytes] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)

    async def get(self, _: str, file_id: str) -> str:
        """Return the file, which is its id. Raises NotFound."""
        if file_id in self.missing:
            raise NotFound("The file does not exist.")
        return file_id

    async def read(self, file: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return these ranges."""
        return [self.texts[file][offset : offset + length] for offset, length in ranges]


@dataclass
class Running:
    """A runner at work."""

    runner: Runner
    inferences: Inferences
    metrics: JobMetrics
    stopping: asyncio.Event
    task: "asyncio.Task[None]"

    async def stop(self) -> None:
        """Stop the runner as SIGTERM does."""
        self.stopping.set()
        await self.task


def chat(custom_id: str, model: str, **more: Any) -> bytes:
    """Return a line with a chat."""
    body = {"model": model, "messages": [{"role": "user", "content": f"say {custom_id}"}], "max_tokens": 4} | more
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}).encode()


async def batch_of(stack: Stack, texts: Texts, tenant: Tenant, model: BaseModel, lines: Sequence[bytes], **more: Any) -> str:
    """Store a batch of these lines, which are validated already."""
    rows, offset = [], 0
    for number, line in enumerate(lines):
        rows.append(NewLine(number + 1, offset, len(line), f"line-{number}", model.id, 20))
        offset += len(line) + 1
    file_id = f"file-{len(texts.texts)}"
    texts.texts[file_id] = b"\n".join(lines)
    return await make_batch(stack.db, tenant.id, rows, key_id=tenant.key_id, file_id=file_id, **more)


class Mortal(Database):
    """The database of a process that is killed before or after its transaction number `dies_at`: later transactions have no effect."""

    def __init__(self, url: str, dies_at: int, *, before: bool) -> None:
        super().__init__(url, DatabaseRole.JOBS)
        self._left, self._before = dies_at, before
        self.died = asyncio.Event()

    @asynccontextmanager
    async def _life(self) -> AsyncIterator[None]:
        self._left -= 1
        is_last = self._left == 0
        if self.died.is_set() or (is_last and self._before):
            await self._die()
        yield
        if is_last or self.died.is_set():
            await self._die()

    async def _die(self) -> None:
        self.died.set()
        await asyncio.Event().wait()

    @asynccontextmanager
    async def begin(self, scope: AnyScope) -> AsyncIterator[AsyncConnection]:
        """Provide a transaction, if the process still lives."""
        async with self._life(), super().begin(scope) as connection:
            yield connection

    async def execute_for_each(self, statement: LiteralString, values: Sequence[tuple[str, Sequence[Any]]]) -> None:
        """Execute a statement, if the process still lives."""
        async with self._life():
            await super().execute_for_each(statement, values)


@asynccontextmanager
async def runner(
    stack: Stack, texts: Texts, db: Database | None = None, observers: Observers = UNOBSERVED, **changes: Any
) -> AsyncIterator[Running]:
    """Run a job runner with a worker of lines. One with a database of its own is killed at the end instead of stopped."""
    settings = dataclasses.replace(stack.settings, **changes)
    services = dataclasses.replace(stack.services, db=db or stack.database(DatabaseRole.JOBS))
    known = Changes(functools.partial(change_number, services.db))
    inferences, metrics = build_inferences(settings, services, known, GatewayMetrics()), JobMetrics()
    responses = LineResponses(StoredState(services.db), timedelta(days=1))
    protocols = {protocol.path: protocol for protocol in batch_protocols(responses)}
    files: Any = texts
    keys = Keys(services.db, settings.auth_grace_s, known)
    drain_s = settings.drain_timeout_s
    worker = LineWorker(services.db, files, services.scheduler, inferences, protocols, keys, metrics, drain_s, observers)
    job = Runner(services.db, [worker], metrics.lost)
    stopping = asyncio.Event()
    async with inferences.client:
        keepers = [asyncio.create_task(inferences.leases.run()), asyncio.create_task(known.run())]
        running = Running(job, inferences, metrics, stopping, asyncio.create_task(job.run(stopping)))
        try:
            yield running
        finally:
            if db is None:
                await running.stop()
                await inferences.leases.drained()
            for task in (running.task, *keepers):
                task.cancel()
            await asyncio.gather(running.task, *keepers, return_exceptions=True)


async def has_status(stack: Stack, batch_id: str, status: str) -> bool:
    """Return whether a batch has this status."""
    return bool((await batch_row(stack.db, batch_id)).status == status)


async def charged(stack: Stack, model: BaseModel, tenant: Tenant) -> list[UsageEvent]:
    """Return the tenant's events in the ledger without wasted attempts, after those on their way have arrived."""
    return [event for event in await stack.ledger(model, tenant) if event.status != UsageStatus.WASTED]
