"""The controller deletes what is past its day."""

import asyncio

import pytest
from sqlalchemy import text

from lmaas.config import Settings
from lmaas.control.controller import Controller
from lmaas.scheduling.client import Scheduler
from lmaas.store.database import Database
from lmaas.store.idempotency import ROWS_AT_ONCE, Answer, Claim, keep, take
from lmaas.store.scopes import SYSTEM
from tests.integration.control.test_controller import Names
from tests.integration.store.build import tenant
from tests.support.conditions import until


async def test_answers_past_their_day_go_and_others_stay(
    settings: Settings, db: Database, controller_db: Database, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmaas.control.sweeper.SWEEP_S", 0.05)
    acme = await tenant(db, "acme")
    claims = [Claim(acme.id, f"k{number}", b"", f"r{number}") for number in range(ROWS_AT_ONCE + 2)]
    for claim in claims:
        assert await take(db, claim) is None
        assert await keep(db, claim, Answer(200, "application/json", b"{}"))

    async def left() -> int:
        async with db.begin(SYSTEM) as connection:
            return int((await connection.execute(text("SELECT count(*) FROM idempotency"))).scalar_one())

    running = asyncio.create_task(Controller(settings, controller_db, scheduler, Names()).run())
    try:
        for keys, still in (("k0", ROWS_AT_ONCE + 1), ("k%", 1)):
            async with db.begin(SYSTEM) as connection:
                old = "UPDATE idempotency SET seen_at = seen_at - interval '24 hours' WHERE key LIKE :keys AND key <> 'k1'"
                await connection.execute(text(old), {"keys": keys})
            await until(lambda still=still: _is(left, still))
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert await left() == 1


async def _is(left: object, number: int) -> bool:
    assert callable(left)
    return bool(await left() == number)
