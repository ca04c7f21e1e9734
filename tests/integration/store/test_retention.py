"""Deletion of stored responses and conversations, on a real Postgres."""

import asyncio

import pytest
from sqlalchemy import text

from lmaas.store import retention
from lmaas.store.conversations import add_items, create_conversation, find_context
from lmaas.store.database import Database
from lmaas.store.responses import Response, save
from lmaas.store.retention import delete_expired, delete_oldest, delete_state, stored_bytes
from lmaas.store.scopes import SYSTEM
from lmaas.store.tenants import delete_tenant
from tests.integration.store.build import tenant
from tests.integration.store.test_conversations import items
from tests.integration.store.test_responses import MONTH, age, response
from tests.support.conditions import until


@pytest.fixture(autouse=True)
def small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "ROWS_AT_ONCE", 3)
    monkeypatch.setattr(retention, "ITEMS_AT_ONCE", 2)


async def left(db: Database) -> list[str]:
    async with db.begin(SYSTEM) as connection:
        query = text(
            "SELECT id FROM responses UNION ALL SELECT id FROM conversations UNION ALL SELECT id FROM conversation_items ORDER BY 1"
        )
        return list((await connection.execute(query)).scalars())


async def fill(db: Database, tenant_id: str, name: str, count: int = 5) -> None:
    await save(db, tenant_id, [response(f"resp_{name}_{number}") for number in range(count)], MONTH)
    for number in range(count):
        await create_conversation(db, tenant_id, f"conv_{name}_{number}", b"{}", items(f"msg_{name}_{number}"), MONTH)


async def test_what_has_expired_is_deleted_in_portions(db: Database, gateway_db: Database, controller_db: Database) -> None:
    acme, globex = await tenant(db, "acme"), await tenant(db, "globex")
    await fill(gateway_db, acme.id, "old")
    await fill(gateway_db, globex.id, "old", 1)
    for table in ("responses", "conversations"):
        await age(db, "31 days", table)
    await fill(gateway_db, acme.id, "new", 1)
    deleted = []
    while (count := await delete_expired(controller_db)) > 0:
        deleted.append(count)
    assert deleted == [5, 5, 2]  # at most 3 responses, and 2 conversations with an item each
    assert await left(db) == ["conv_new_0", "msg_new_0", "resp_new_0"]


async def test_a_conversation_that_goes_on_at_the_time_stays(db: Database, gateway_db: Database, controller_db: Database) -> None:
    acme = await tenant(db, "acme")
    await create_conversation(gateway_db, acme.id, "conv_1", b"{}", items("msg_1"), MONTH)
    async with db.begin(SYSTEM) as connection:
        await connection.execute(text("UPDATE conversations SET expires_at = now() + interval '300 ms'"))
    async with db.begin(SYSTEM) as connection:
        # A transaction that appends to it holds its lock when the sweep comes.
        await connection.execute(text("UPDATE conversations SET expires_at = now() + interval '1 day'"))
        await connection.execute(text("SELECT pg_sleep(0.4)"))
        sweep = asyncio.create_task(delete_expired(controller_db))

        async def waits() -> bool:
            return bool((await connection.execute(text("SELECT count(*) FROM pg_locks WHERE NOT granted"))).scalar_one())

        await until(waits, every_s=0.01)
    assert await sweep == 0
    await add_items(gateway_db, acme.id, "conv_1", items("msg_2"), MONTH)
    assert len(await find_context(gateway_db, acme.id, "conv_1")) == 2


async def test_a_deleted_tenants_state_goes_with_it(db: Database, gateway_db: Database) -> None:
    acme, globex = await tenant(db, "acme"), await tenant(db, "globex")
    await fill(gateway_db, acme.id, "acme")
    await fill(gateway_db, globex.id, "globex", 1)
    await delete_tenant(gateway_db, acme.id)
    assert await left(db) == ["conv_globex_0", "msg_globex_0", "resp_globex_0"]
    assert await delete_state(gateway_db, acme.id) == 0


async def test_the_oldest_go_beyond_a_tenants_bound(db: Database, gateway_db: Database, controller_db: Database) -> None:
    acme, globex = await tenant(db, "acme"), await tenant(db, "globex")
    for number in range(4):  # 400 and 600 bytes, plus the overhead of a row
        await save(gateway_db, acme.id, [Response(f"resp_{number}", b"[]", b"x" * 142)], MONTH)
        await create_conversation(gateway_db, acme.id, f"conv_{number}", b"{}", items("m" * 77), MONTH)
    await save(gateway_db, globex.id, [Response("resp_globex", b"[]", b"x" * 8)], MONTH)
    assert await stored_bytes(controller_db) == {acme.id: 4000, globex.id: 266}
    assert await delete_oldest(controller_db, acme.id, 401) == 1000
    assert await stored_bytes(controller_db) == {acme.id: 3000, globex.id: 266}
    kept = [name for name in await left(db) if not name.startswith("m")]
    assert kept == ["conv_1", "conv_2", "conv_3", "resp_1", "resp_2", "resp_3", "resp_globex"]
    # At most a portion at a time: two conversations and three responses.
    assert await delete_oldest(controller_db, acme.id, 10_000) == 2400
    assert await delete_oldest(controller_db, acme.id, 10_000) == 600
    assert await delete_oldest(controller_db, acme.id, 10_000) == 0
    assert await left(db) == ["resp_globex"]


async def test_a_controller_cannot_read_what_it_deletes(db: Database, controller_db: Database) -> None:
    for column, table in (("body", "responses"), ("input", "responses"), ("metadata", "conversations"), ("body", "conversation_items")):
        with pytest.raises(Exception, match="permission denied"):
            async with controller_db.begin(SYSTEM) as connection:
                await connection.execute(text(f"SELECT {column} FROM {table}"))  # noqa: S608 (our own names)
