"""A tenant with webhooks, a target, and job runners that send its events."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select, text, update

from lmaas.jobs.metrics import JobMetrics
from lmaas.jobs.webhooks import WebhookWorker
from lmaas.states import EventType
from lmaas.store import webhooks as rows
from lmaas.store.database import Database
from lmaas.store.events import add_event
from lmaas.store.paging import Part
from lmaas.store.runners import end, register
from lmaas.store.scopes import SYSTEM
from lmaas.store.tables import webhook_deliveries, webhooks
from lmaas.webhooks.sending import Sender
from lmaas.webhooks.signing import new_key
from lmaas.webhooks.targets import Targets, networks
from tests.integration.store.build import tenant
from tests.integration.webhooks.target import Target, target
from tests.support.conditions import until

LOCAL = Targets(networks("127.0.0.0/8"))


@dataclass(frozen=True)
class Running:
    """A job runner."""

    id: str
    stopping: asyncio.Event
    task: "asyncio.Task[None]"

    async def kill(self) -> None:
        """End the runner without a chance to store anything."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


@dataclass
class Events:
    """The events of one tenant."""

    db: Database
    jobs: Database
    tenant_id: str
    target: Target
    metrics: JobMetrics = field(default_factory=JobMetrics)

    async def webhook(self, url: str = "", event_types: list[str] | None = None, key: bytes = b"") -> str:
        """Create a webhook, and return its id."""
        secret = rows.Secret(key or new_key(), "whsec_…")
        given = ("", url or self.target.url, event_types, secret)
        return (await rows.create_webhook(self.db, self.tenant_id, *given, most_of=lambda _: 50)).id

    async def add(self, count: int = 1, type_: EventType = EventType.BATCH_COMPLETED) -> None:
        """Add events, as a job runner does."""
        for number in range(count):
            async with self.jobs.begin(self.tenant_id) as connection:
                await add_event(connection, self.tenant_id, type_, {"id": f"batch_{number}"})

    async def deliveries(self, webhook_id: str) -> list[rows.Delivery]:
        """Return the deliveries of a webhook, oldest first."""
        return (await rows.list_deliveries(self.db, self.tenant_id, webhook_id, Part(1000)))[::-1]

    async def delivery(self, webhook_id: str) -> rows.Delivery:
        """Return the only delivery of a webhook."""
        [found] = await self.deliveries(webhook_id)
        return found

    async def attempted(self, webhook_id: str, attempts: int = 1) -> rows.Delivery:
        """Wait for an attempt of the only delivery of a webhook, and return the delivery."""

        async def is_so() -> bool:
            return (await self.delivery(webhook_id)).attempts == attempts

        await until(is_so, timeout_s=20)
        return await self.delivery(webhook_id)

    async def shown(self, webhook_id: str) -> rows.Webhook:
        """Return a webhook."""
        return await rows.get_webhook(self.db, self.tenant_id, webhook_id)

    async def pass_time(self, days: float) -> None:
        """Move all times of the deliveries and webhooks into the past."""
        by = timedelta(days=days)
        async with self.db.begin(SYSTEM) as connection:
            await connection.execute(update(webhooks).values(failing_since=webhooks.c.failing_since - by))
            times = ("due_at", "created_at", "ended_at", "attempted_at")
            await connection.execute(update(webhook_deliveries).values({name: webhook_deliveries.c[name] - by for name in times}))

    async def column(self, name: str) -> list[Any]:
        """Return a column of all deliveries."""
        async with self.db.begin(SYSTEM) as connection:
            return list((await connection.execute(select(webhook_deliveries.c[name]))).scalars())

    async def execute(self, statement: str, **values: str) -> None:
        """Execute a statement as the superuser."""
        async with self.db.begin(SYSTEM) as connection:
            await connection.execute(text(statement), values)

    @asynccontextmanager
    async def runner(
        self, db: Database | None = None, targets: Targets = LOCAL, attempt_s: float = 5.0, off_after_s: float = 5 * 86400
    ) -> AsyncIterator[Running]:
        """Run a job runner with only the worker of webhooks until the end of the block."""
        own = db or self.jobs
        worker = WebhookWorker(own, Sender(targets, attempt_s=attempt_s), self.metrics, timedelta(seconds=off_after_s), chance=lambda: 0.0)
        stopping, runner_id = asyncio.Event(), await register(own)
        running = Running(runner_id, stopping, asyncio.create_task(worker.run(runner_id, stopping), name="webhooks"))
        try:
            yield running
        finally:
            stopping.set()
            with suppress(asyncio.CancelledError):
                await running.task
            await end(self.jobs, runner_id)


@pytest.fixture
async def events(monkeypatch: pytest.MonkeyPatch, db: Database, jobs_db: Database) -> AsyncIterator[Events]:
    """A tenant and a target. Runners look for due deliveries often."""
    monkeypatch.setattr("lmaas.jobs.webhooks.LOOK_S", 0.05)
    async with target() as found:
        yield Events(db, jobs_db, (await tenant(db, "acme")).id, found)
