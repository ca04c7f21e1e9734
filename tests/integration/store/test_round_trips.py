"""A scope adds no exchange with Postgres: a transaction of one statement takes three, and its first one detects a lost connection."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url, text

from lmaas.errors import Unavailable
from lmaas.store.adapters import find_served
from lmaas.store.database import Database, driver_url
from lmaas.store.rights import DatabaseRole
from lmaas.store.scopes import CLAIMS, OPERATOR, SYSTEM, AnyScope, KeyScope
from tests.support.databases import login_url

READY = ord("Z")


@dataclass
class Proxy:
    """A proxy between a client and Postgres, which counts the server's replies: each ends with `ReadyForQuery`."""

    folder: Path
    answers: int = 0
    connections: int = 0
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    def cut(self) -> None:
        """Cut all connections, as a restart of Postgres does."""
        for writer in self.writers:
            writer.transport.abort()
        self.writers.clear()


@pytest.fixture
async def proxy(database_url: str, tmp_path: Path) -> AsyncIterator[Proxy]:
    url = make_url(driver_url(database_url))
    target = Path(str(url.query["host"])) / ".s.PGSQL.5432"
    counted = Proxy(tmp_path)

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, count: bool) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                if count:
                    head = await reader.readexactly(5)
                    counted.answers += head[0] == READY
                    writer.write(head + await reader.readexactly(int.from_bytes(head[1:]) - 4))
                else:
                    data = await reader.read(65_536)
                    if not data:
                        break
                    writer.write(data)
                await writer.drain()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        counted.connections += 1
        from_server, to_server = await asyncio.open_unix_connection(target)
        counted.writers += [writer, to_server]
        async with asyncio.TaskGroup() as group:
            group.create_task(pump(reader, to_server, count=False), name="to Postgres")
            group.create_task(pump(from_server, writer, count=True), name="from Postgres")

    server = await asyncio.start_unix_server(accept, tmp_path / ".s.PGSQL.5432")
    yield counted
    counted.cut()
    server.close()
    await server.wait_closed()


def through(proxy: Proxy, database_url: str, role: DatabaseRole | None = DatabaseRole.GATEWAY) -> Database:
    url = make_url(login_url(database_url, role) if role is not None else driver_url(database_url))
    return Database(url.set(query={"host": str(proxy.folder)}).render_as_string(hide_password=False), DatabaseRole.GATEWAY)


@pytest.mark.parametrize("role", [DatabaseRole.GATEWAY, None], ids=["own login", "one login for all"])
@pytest.mark.parametrize("scope", [SYSTEM, OPERATOR, CLAIMS, KeyScope("hash"), "ten_a"], ids=lambda scope: getattr(scope, "name", None))
async def test_a_transaction_is_begin_statement_commit(proxy: Proxy, database_url: str, role: DatabaseRole | None, scope: AnyScope) -> None:
    db = through(proxy, database_url, role)
    await db.check()
    for _ in range(3):
        before = proxy.answers
        async with db.begin(scope) as connection:
            await connection.execute(text("SELECT 1"))
        assert proxy.answers - before == 3
    assert proxy.connections == 1
    await db.close()


async def test_a_lookup_of_the_hot_path_is_three_exchanges(proxy: Proxy, database_url: str) -> None:
    db = through(proxy, database_url)
    for _ in range(20):  # prepared by then
        before = proxy.answers
        await find_served(db, "ten_a", "bot", None)
    assert proxy.answers - before == 3
    await db.close()


_NOTE = "INSERT INTO notes SELECT %s, current_user, current_setting('lmaas.tenant') ON CONFLICT DO NOTHING"


@pytest.fixture
async def notes(database_url: str) -> AsyncIterator[Database]:
    """A table that a gateway may write: an id, the role and the tenant of the transaction."""
    admin = Database(database_url)
    async with admin.begin(SYSTEM) as connection:
        await connection.execute(text("CREATE TABLE notes (id text PRIMARY KEY, role text, tenant text)"))
        await connection.execute(text("GRANT ALL ON notes TO PUBLIC"))
    yield admin
    async with admin.begin(SYSTEM) as connection:
        await connection.execute(text("DROP TABLE notes"))
    await admin.close()


async def noted(admin: Database) -> list[tuple[str, ...]]:
    async with admin.begin(SYSTEM) as connection:
        return [tuple(row) for row in await connection.execute(text("SELECT id, tenant FROM notes ORDER BY id"))]


@pytest.mark.parametrize("role", [DatabaseRole.GATEWAY, None], ids=["own login", "one login for all"])
async def test_a_statement_for_many_tenants_is_one_exchange_in_the_scope_of_each(
    proxy: Proxy, notes: Database, database_url: str, role: DatabaseRole | None
) -> None:
    db = through(proxy, database_url, role)
    await db.check()
    for number in range(0, 160, 40):  # prepared by then
        before = proxy.answers
        await db.execute_for_each(_NOTE, [(f"ten_{each:03}", (f"{each:03}",)) for each in range(number, number + 40)])
    assert proxy.answers - before == 1
    assert await noted(notes) == [(f"{number:03}", f"ten_{number:03}") for number in range(160)]
    async with notes.begin(SYSTEM) as connection:
        assert len((await connection.execute(text("SELECT DISTINCT role FROM notes WHERE role LIKE '%gateway'"))).all()) == 1
        assert len((await connection.execute(text("SELECT DISTINCT role FROM notes"))).all()) == 1
    async with db.begin(SYSTEM) as connection:  # the scope has ended with the transaction
        assert (await connection.execute(text("SELECT current_setting('lmaas.tenant', true)"))).scalar_one() in (None, "")
    assert proxy.connections == 1
    await db.close()


async def test_a_statement_for_many_tenants_has_no_effect_if_it_fails_for_one(proxy: Proxy, notes: Database, database_url: str) -> None:
    db = through(proxy, database_url)
    with pytest.raises(ValueError, match="empty"):
        await db.execute_for_each(_NOTE, [("ten_a", ("a",)), ("", ("b",))])
    with pytest.raises(psycopg.errors.DivisionByZero):
        await db.execute_for_each("INSERT INTO notes SELECT 'a', 'b', 1 / %s::int", [("ten_a", (1,)), ("ten_b", (0,))])
    await db.execute_for_each(_NOTE, [("ten_a", ("b",))])
    assert await noted(notes) == [("b", "ten_a")]
    assert proxy.connections == 1
    await db.close()


async def test_a_statement_for_many_tenants_survives_dead_connections(proxy: Proxy, notes: Database, database_url: str) -> None:
    db = through(proxy, database_url)
    async with db.begin(SYSTEM), db.begin(SYSTEM):
        pass
    proxy.cut()
    await db.execute_for_each(_NOTE, [("ten_a", ("a",))])
    assert await noted(notes) == [("a", "ten_a")]
    await db.close()


async def test_connections_that_died_in_the_pool_are_replaced_unnoticed(proxy: Proxy, database_url: str) -> None:
    db = through(proxy, database_url)
    async with db.begin(SYSTEM), db.begin(SYSTEM), db.begin(SYSTEM):
        pass
    assert proxy.connections == 3
    proxy.cut()
    for _ in range(3):
        async with db.begin("ten_a") as connection:
            assert (await connection.execute(text("SELECT current_setting('lmaas.tenant')"))).scalar_one() == "ten_a"
    await db.close()


async def test_a_connection_that_dies_during_a_transaction_is_an_error(proxy: Proxy, database_url: str) -> None:
    db = through(proxy, database_url)
    with pytest.raises(Unavailable):  # noqa: PT012 (the block is what is tested)
        async with db.begin("ten_a") as connection:
            proxy.cut()
            await connection.execute(text("SELECT 1"))
    await db.check()
    await db.close()


async def test_a_cancelled_begin_leaves_the_pool_whole(proxy: Proxy, database_url: str) -> None:
    db = through(proxy, database_url)
    await db.check()

    async def use() -> None:
        async with db.begin("ten_a") as connection:
            await connection.execute(text("SELECT pg_sleep(0.01)"))

    for turn in range(30):
        task = asyncio.create_task(use())
        for _ in range(turn):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        async with db.begin(SYSTEM) as connection:
            assert (await connection.execute(text("SELECT current_setting('lmaas.tenant', true)"))).scalar_one() in (None, "")
    await db.close()
