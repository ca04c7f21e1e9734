"""Usage events that another release wrote, or set aside."""

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis

from lmaas.config import Settings
from lmaas.control.controller import Controller
from lmaas.metering.writer import UNREADABLE, write_events
from lmaas.scheduling.client import Scheduler
from lmaas.store.database import Database
from lmaas.store.tenants import Tenant
from lmaas.store.usage import list_events
from tests.integration.control.test_controller import Names, record
from tests.integration.store.build import base_model, tenant
from tests.support.conditions import until


@pytest.fixture
async def acme(db: Database) -> Tenant:
    return await tenant(db, "acme")


async def test_what_a_newer_release_says_besides_is_ignored(
    scheduler: Scheduler, redis: Redis, db: Database, controller_db: Database, acme: Tenant
) -> None:
    newer = record("r1", acme)[:-1] + ', "energy_joules": 3, "charge_picousd": 9}'
    await scheduler.record_event("p", newer)
    await write_events(redis, controller_db, "p")
    assert [(event.request_id, event.charge_picousd) for event in await list_events(db, acme.id)] == [("r1", 0)]
    assert await redis.xlen("lmaas:{p}:usage:bad") == 0


async def test_what_an_older_release_could_not_read_is_read_by_the_next_controller(
    settings: Settings, scheduler: Scheduler, redis: Redis, db: Database, controller_db: Database, acme: Tenant
) -> None:
    model = await base_model(db)
    bad = f"lmaas:{{{model.id}}}:usage:bad"
    # One event is now readable, one is still unreadable, and one can be read but has no tenant.
    aside = [(record("r1", acme), UNREADABLE), ("nonsense", UNREADABLE), (record("r2", acme), "unrecordable")]
    for event, why in aside:
        await redis.xadd(bad, {"event": event, "why": why})
    running = asyncio.create_task(Controller(settings, controller_db, scheduler, Names()).run())

    async def recorded() -> bool:
        return [event.request_id for event in await list_events(db, acme.id)] == ["r1"]

    try:
        await until(recorded)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    left: Any = await redis.xrange(bad)
    assert [(fields["event"], fields["why"]) for _, fields in left] == aside[1:]
