"""The controller deletes rows that have expired."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import text

from lmaas.admission.tiers import file_quota
from lmaas.config import Settings
from lmaas.control.controller import Controller
from lmaas.control.status import Disk, metrics
from lmaas.control.sweeper import Sweeper
from lmaas.files.service import Files, Purpose
from lmaas.scheduling.client import Scheduler
from lmaas.store.conversations import Item, create_conversation
from lmaas.store.database import Database
from lmaas.store.idempotency import ROWS_AT_ONCE, Answer, Claim, keep, take
from lmaas.store.objects import Objects
from lmaas.store.responses import Response, save
from lmaas.store.scopes import SYSTEM
from tests.integration.control.test_controller import Names
from tests.integration.store.build import stored_response, tenant
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


async def test_expired_responses_and_conversations_go(
    settings: Settings, db: Database, controller_db: Database, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmaas.control.sweeper.SWEEP_S", 0.05)
    acme = await tenant(db, "acme")
    for number, days in enumerate((1, 30)):
        await save(db, acme.id, [stored_response(f"resp_{number}")], timedelta(days=days))
        await create_conversation(db, acme.id, f"conv_{number}", b"{}", [Item(f"msg_{number}", b"{}")], timedelta(days=days))
    controller = Controller(settings, controller_db, scheduler, Names())
    running = asyncio.create_task(controller.run())

    async def left() -> list[str]:
        async with db.begin(SYSTEM) as connection:
            query = "SELECT id FROM responses UNION ALL SELECT id FROM conversations UNION ALL SELECT id FROM conversation_items ORDER BY 1"
            return list((await connection.execute(text(query))).scalars())

    try:
        await until(lambda: controller.sweeper.stored_bytes is not None)
        assert len(await left()) == 6
        async with db.begin(SYSTEM) as connection:
            for table in ("responses", "conversations"):
                await connection.execute(text(f"UPDATE {table} SET expires_at = expires_at - interval '25 hours'"))  # noqa: S608 (our own names)
        await until(lambda: _is(left, ["conv_1", "msg_1", "resp_1"]))
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_tenant_has_a_bound(db: Database, controller_db: Database) -> None:
    acme, globex = await tenant(db, "acme"), await tenant(db, "globex")
    size = stored_response("resp_00").size_bytes
    for each, count in ((acme, 50), (globex, 5)):
        for number in range(count):
            await save(db, each.id, [stored_response(f"resp_{number:02}")], timedelta(days=1))
    sweeper = Sweeper(controller_db, 10 * size)
    await sweeper.bound()
    assert sweeper.stored_bytes == 15 * size
    async with db.begin(SYSTEM) as connection:
        query = text("SELECT id FROM responses WHERE tenant_id = :tenant ORDER BY 1")
        left = [list((await connection.execute(query, {"tenant": each.id})).scalars()) for each in (acme, globex)]
    assert left == [[f"resp_{number:02}" for number in range(40, 50)], [f"resp_{number:02}" for number in range(5)]]


async def test_a_tenant_that_writes_much_is_bounded_early(db: Database, controller_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmaas.control.sweeper.SWEEP_S", 0.05)
    acme = await tenant(db, "acme")
    sweeper = Sweeper(controller_db, 100_000)
    running = asyncio.create_task(sweeper.run())
    try:
        await until(lambda: sweeper.stored_bytes == 0)
        # Random text, because Postgres compresses.
        for number in range(20):
            await save(db, acme.id, [Response(f"resp_{number:02}", b"[]", secrets.token_bytes(20_000))], timedelta(days=1))
        await until(lambda: (sweeper.stored_bytes or 0) > 0)

        async def left() -> bool:
            async with db.begin(SYSTEM) as connection:
                return int((await connection.execute(text("SELECT sum(size_bytes) FROM responses"))).scalar_one()) <= 100_000

        await until(left)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def _is(left: object, expected: object) -> bool:
    assert callable(left)
    return bool(await left() == expected)


async def test_expired_files_go_and_are_counted(
    settings: Settings, db: Database, controller_db: Database, scheduler: Scheduler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmaas.control.sweeper.SWEEP_S", 0.05)
    acme, objects = await tenant(db, "acme"), Objects((tmp_path / "store").as_uri())

    def files(database: Database) -> Files:
        return Files(database, objects, tmp_path / "uploads", 100, file_quota)

    async def content(number: int) -> AsyncIterator[bytes]:
        yield str(number).encode()

    added = [await files(db).add(acme.id, Purpose.BATCH_OUTPUT, "out", content(number)) for number in range(3)]
    controller = Controller(settings, controller_db, scheduler, Names(), files=files(controller_db))
    running = asyncio.create_task(controller.run())
    try:
        await until(lambda: controller.file_sweeper is not None and controller.file_sweeper.stored == (3, 3))
        found = {family.name: family.samples[0].value for family in metrics(controller, Disk(2, 1), None, None) if "file" in family.name}
        assert found == {"lmaas_files": 3, "lmaas_file_bytes": 3}
        async with db.begin(SYSTEM) as connection:
            await connection.execute(text("UPDATE files SET expires_at = now() WHERE id <> :id"), {"id": added[0].id})

        async def left() -> list[str]:
            return sorted(await objects.list("files"))

        await until(lambda: _is(left, [added[0].key]))
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert await files(db).stored() == (1, 1)
