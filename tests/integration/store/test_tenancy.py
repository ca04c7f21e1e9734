"""Tenancy that Postgres enforces: with a gateway's role and one tenant's scope, no row of another tenant can be read or changed."""

import inspect
import secrets
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from types import ModuleType
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, Table, delete, event, insert, select, text, true, update
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql import visitors
from sqlalchemy.sql.elements import BinaryExpression, BindParameter, ColumnElement

from lmaas.audit import Action, Audit
from lmaas.errors import Conflict, InvalidRequest
from lmaas.states import Dialect, UsageDimension
from lmaas.store import (
    adapters,
    audit,
    background,
    batches,
    conversations,
    event_logs,
    events,
    files,
    idempotency,
    responses,
    retention,
    sessions,
    tenants,
    usage,
    usage_days,
    webhooks,
)
from lmaas.store.database import Database
from lmaas.store.idempotency import Answer, Claim
from lmaas.store.models import BaseModel
from lmaas.store.paging import Part
from lmaas.store.rights import TENANTS, DatabaseRole
from lmaas.store.scopes import CLAIMS, OPERATOR, SYSTEM, AnyScope, KeyScope
from lmaas.store.tables import metadata
from lmaas.types import BatchLimits, Quota, Role
from tests.integration.store.build import base_model, tenant, upload, usage_event
from tests.support.catalogue import faults
from tests.support.databases import login_url

AUDIT = Audit(Action.KEY_CREATE, "tenant_admin", "key", "req")
ANSWER = Answer(200, "application/json", b"theirs")
MONTH = timedelta(days=30)
SECRET = webhooks.Secret(b"mine", "mine")
MOMENT = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class Side:
    """A tenant with a row in each table, whose names and keys are the same as the other tenant's."""

    id: str
    key_id: str
    key_hash: str
    adapter: str
    content: str
    claim: Claim
    file: str


async def side(db: Database, name: str, base: BaseModel) -> Side:
    row = await tenant(db, name)
    key = await tenants.create_key(db, row.id, Role.INFERENCE, "key", f"hash-{name}", "sk", audit=AUDIT)
    content = (name * 64)[:64]
    await upload(db, row.id, "bot", base, content=content)
    await usage.record_events(db, [usage_event(f"req-{name}", row.id, key_id=key.id)])
    claim = Claim(row.id, "k", b"same", f"claim-{name}")
    await idempotency.take(db, claim)
    item = conversations.Item("msg_1", f"item-{name}".encode())
    await conversations.create_conversation(db, row.id, "conv_1", f"metadata-{name}".encode(), [item], MONTH)
    await responses.save(db, row.id, [responses.Response("resp_1", f"input-{name}".encode(), f"body-{name}".encode())], MONTH)
    [check] = await files.expect_contents(db, row.id, [f"content-{name}"])
    async with files.adding(db, [check]) as connection:
        new = files.NewFile("batch", f"file-of-{name}", 1, f"content-{name}", None)
        [file] = await files.add_files(connection, [check], [new])
    await files.expect_contents(db, row.id, [f"content-{name}"])
    [adapter] = await adapters.list_adapters(db, row.id)
    await durable_work(db, row.id, key.id)
    return Side(row.id, key.id, f"hash-{name}", adapter.id, content, claim, file.id)


async def durable_work(db: Database, tenant_id: str, key_id: str) -> None:
    """A row in each table of batches and background responses."""
    now, own = datetime.now(UTC), {"tenant_id": tenant_id}
    batch = {"batch_id": "batch_1", **own}
    rows: dict[str, dict[str, Any]] = {
        "batches": {
            "id": "batch_1", "dialect": "openai", "endpoint": "/v1/chat/completions", "key_id": key_id, "completion_window": "24h",
            "metadata": b"{}", "status": "in_progress", "expires_at": now,
        },
        "batch_lines": {
            **batch, "position": 0, "line": 1, "byte_offset": 0, "byte_length": 1, "custom_id": "c", "tokens": 1, "state": "pending",
        },
        "batch_pools": {**batch, "pool_id": "p", "pending": 1, "pending_tokens": 1},
        "background_responses": {
            "id": "resp_b", "key_id": key_id, "request": b"{}", "input": b"[]", "body": f"body-{tenant_id}".encode(), "status": "queued",
            "is_streamed": True, "size_bytes": 1, "deadline_at": now, "expires_at": now + MONTH,
        },
        "response_events": {"response_id": "resp_b", "first": 0, "last": 0, "events": f"events-{tenant_id}".encode()},
        "webhooks": {"id": "wh_1", "name": "", "url": f"url-{tenant_id}", "secret": f"secret-{tenant_id}".encode(), "secret_hint": ""},
        "budget_notices": {"owner_id": tenant_id, "month": now.date(), "limit": "tokens_per_month", "percent": 50},
        "webhook_deliveries": {"webhook_id": "wh_1", "id": "evt_1", "type": "batch.failed", "body": f"event-{tenant_id}".encode()},
    }  # fmt: skip
    async with db.begin(SYSTEM) as connection:
        for table, row in rows.items():
            await connection.execute(insert(metadata.tables[table]).values(**own | row))


@dataclass
class Both:
    """Two tenants, the first of which acts."""

    db: Database
    gateway: Database
    base: BaseModel
    mine: Side
    theirs: Side
    #: The conditions on tenants that were removed.
    forgotten: list[str] = field(default_factory=list)

    async def rows_of_theirs(self) -> dict[str, list[Any]]:
        """Return all rows of the other tenant."""
        found: dict[str, list[Any]] = {}
        async with self.db.begin(SYSTEM) as connection:
            for table in _tables():
                rows = await connection.execute(select(table).where(_tenant_column(table) == self.theirs.id))
                found[table.name] = sorted(map(repr, rows))
        return found

    def seen(self, result: object) -> set[str]:
        """Return the values of the other tenant that a result contains."""
        theirs = self.theirs
        things = {theirs.id, theirs.key_id, theirs.key_hash, theirs.adapter, theirs.content, theirs.claim.request_id, "req-other"}
        things |= {"item-other", "metadata-other", "input-other", "body-other", "file-of-other", "content-other", theirs.file}
        things |= {f"body-{theirs.id}", f"events-{theirs.id}", f"url-{theirs.id}", f"secret-{theirs.id}", f"event-{theirs.id}"}
        return {thing for thing in things if thing in repr(result)}


def _tables() -> list[Table]:
    return [metadata.tables[name] for name in TENANTS]


def _tenant_column(table: Table) -> ColumnElement[Any]:
    return table.c.id if table.name == "tenants" else table.c.tenant_id


@pytest.fixture
async def both(db: Database, gateway_db: Database) -> Both:
    base = await base_model(db)
    both = Both(db, gateway_db, base, await side(db, "acme", base), await side(db, "other", base))
    assert all((await both.rows_of_theirs()).values()), "a new table needs a row here"
    return both


# The catalogue.


async def test_the_catalogue_is_as_the_table_of_rights_says(db: Database) -> None:
    async with db.begin(SYSTEM) as connection:
        assert await faults(connection) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("CREATE TABLE notes (id text, tenant_id text)", "the table notes has a tenant and is not among TENANTS"),
        ("CREATE TABLE notes (id text)", "the table notes is not in lmaas.store.rights"),
        ("CREATE VIEW notes AS SELECT * FROM usage_events", "the table notes is not in lmaas.store.rights"),
        ("ALTER TABLE adapters NO FORCE ROW LEVEL SECURITY", "the table adapters has no forced row-level security"),
        ("ALTER TABLE usage_events DISABLE ROW LEVEL SECURITY", "the table usage_events has no forced row-level security"),
        ("ALTER TABLE replicas ENABLE ROW LEVEL SECURITY", "the table replicas has row-level security and no policies"),
        ("ALTER POLICY gateway_select ON adapters USING (true)", "lets gateway see other tenants: true"),
        ("CREATE POLICY more ON adapters TO lmaas_gateway USING (true)", "the policy more of adapters lets gateway see other tenants"),
        ("CREATE POLICY more ON adapters TO PUBLIC USING (true)", "is not for one of our roles"),
        ("DROP POLICY gateway_update ON adapters", "the policies of adapters are"),
        ("GRANT DELETE ON usage_events TO lmaas_gateway", "lmaas_gateway has gained DELETE on usage_events"),
        ("GRANT SELECT (hash) ON api_keys TO lmaas_gateway", "lmaas_gateway has gained SELECT on api_keys hash"),
        ("GRANT SELECT ON tenants TO PUBLIC", "public has gained SELECT on tenants"),
        ("REVOKE SELECT ON replicas FROM lmaas_gateway", "lmaas_gateway lacks SELECT on replicas"),
        ("ALTER TABLE changes OWNER TO lmaas_gateway", "the table changes belongs to lmaas_gateway"),
        ("CREATE SCHEMA mine AUTHORIZATION lmaas_controller", "lmaas_controller owns schema mine"),
    ],
)
async def test_the_catalogue_test_fails_for(db: Database, change: str, fault: str) -> None:
    async with db.begin(SYSTEM) as connection:
        await connection.execute(text(change))
        assert any(fault in each for each in await faults(connection))
        await connection.rollback()


# Scopes.


@pytest.mark.parametrize("table", _tables(), ids=lambda table: table.name)
async def test_without_a_tenant_no_row_is_seen(both: Both, table: Table) -> None:
    async with both.gateway.begin(SYSTEM) as connection:
        assert (await connection.execute(text(f"SELECT count(*) FROM {table.name}"))).scalar_one() == 0  # noqa: S608
    async with both.gateway.begin("ten_none") as connection:
        assert (await connection.execute(text(f"SELECT count(*) FROM {table.name}"))).scalar_one() == 0  # noqa: S608


#: Statements that a tenant's own transaction may not execute at all, whatever the row.
FORBIDDEN = {
    "tenants": {"update", "delete"},
    "adapter_versions": {"update", "delete"},
    "usage_events": {"update", "delete"},
    "usage_days": {"update", "delete"},
    "work_days": {"update", "delete"},
    "responses": {"update"},
    "conversation_items": {"update"},
    "files": {"update"},
    "content_checks": {"update"},
    "batch_lines": {"update", "delete"},
    "batch_pools": {"update", "delete"},
    "response_events": {"update"},
    "webhook_deliveries": {"delete"},
    "budget_notices": {"update", "delete"},
    "audit_log": {"update", "delete"},
}


#: Statements that a tenant's own transaction may execute on no row of this test: of keys, it may only delete sessions.
UNTOUCHED = {("api_keys", "delete")}


@pytest.mark.parametrize("table", _tables(), ids=lambda table: table.name)
async def test_a_statement_without_where_stays_with_its_tenant(both: Both, table: Table) -> None:
    before = await both.rows_of_theirs()
    done = set()
    for column in table.c:
        for command, statement in (
            ("select", select(column)),
            ("update", update(table).values({column: column})),
            ("delete", delete(table)),
        ):
            try:
                async with both.gateway.begin(both.mine.id) as connection:
                    result = await connection.execute(statement)
                    rows = result.all() if command == "select" else []
                    count = len(rows) if command == "select" else result.rowcount
                    await connection.rollback()
            except ProgrammingError as error:
                refused = getattr(error.orig, "sqlstate", None)
            else:
                refused = None
                done.add(command)
                assert count == (0 if (table.name, command) in UNTOUCHED else 1)
                assert not both.seen(rows)
            assert refused in (None, "42501")
    assert done == {"select", "update", "delete"} - FORBIDDEN.get(table.name, set())
    assert await both.rows_of_theirs() == before


@pytest.mark.parametrize("table", [table for table in _tables() if table.name != "adapter_versions"], ids=lambda table: table.name)
async def test_a_policy_reads_an_index(both: Both, table: Table) -> None:
    """A policy uses an index, so that a tenant's rows are found quickly among those of many. Versions are found by their adapter."""
    column = str(_tenant_column(table)).partition(".")[2]
    async with both.gateway.begin(both.mine.id) as connection:
        await connection.execute(text("SET LOCAL enable_seqscan = off"))
        one = next(name for name in ("id", "request_id", "key", "position", "pool_id", "first", "day", "month") if name in table.c)
        plan = "\n".join((await connection.execute(text(f"EXPLAIN SELECT {one} FROM {table.name}"))).scalars())  # noqa: S608
    assert f"Index Cond: ({column} = current_setting('lmaas.tenant'::text, true))" in plan


@pytest.mark.parametrize(
    "name",
    [
        "adapters",
        "adapter_versions",
        "api_keys",
        "idempotency",
        "audit_log",
        "responses",
        "conversations",
        "conversation_items",
        "files",
        "content_checks",
        "webhooks",
        "webhook_deliveries",
    ],
)
async def test_no_row_comes_into_being_for_another_tenant(both: Both, name: str) -> None:
    table = metadata.tables[name]
    async with both.db.begin(SYSTEM) as connection:
        row = (await connection.execute(select(table).where(table.c.tenant_id == both.theirs.id))).mappings().one()
    new = {"id": "new", "name": "new", "hash": "new", "version": 9, "key": "new", "position": 9} if name != "audit_log" else {"id": 10**9}
    values = dict(row) | {column: value for column, value in new.items() if column in table.c}
    async with both.db.begin(SYSTEM) as connection:
        # Only the tenant is wrong.
        await connection.execute(insert(table).values(values))
        await connection.rollback()
    with pytest.raises(ProgrammingError, match="row-level security"):
        async with both.gateway.begin(both.mine.id) as connection:
            await connection.execute(insert(table).values(values))


async def test_no_row_is_given_to_another_tenant(both: Both) -> None:
    rows = metadata.tables["idempotency"]
    with pytest.raises(ProgrammingError, match="row-level security"):
        async with both.gateway.begin(both.mine.id) as connection:
            await connection.execute(update(rows).values(tenant_id=both.theirs.id, key="stolen"))


async def test_a_tenant_makes_no_operator(both: Both) -> None:
    with pytest.raises(ProgrammingError, match="row-level security"):
        await tenants.create_key(both.gateway, both.mine.id, Role.OPERATOR, "", "hash", "sk")


async def test_a_scope_ends_with_its_transaction(both: Both, database_url: str) -> None:
    """One connection serves both tenants by turns, as it does behind a pooler of transactions."""
    one = Database(login_url(database_url, DatabaseRole.GATEWAY), DatabaseRole.GATEWAY, connections=1)

    async def names(scope: AnyScope) -> list[str]:
        async with one.begin(scope) as connection:
            return list((await connection.execute(text("SELECT tenant_id FROM adapters ORDER BY tenant_id"))).scalars())

    for _ in range(8):  # beyond the number of calls after which statements are prepared
        assert await names(both.mine.id) == [both.mine.id]
        assert await names(SYSTEM) == []
        assert await names(OPERATOR) == sorted([both.mine.id, both.theirs.id])
        assert await names(both.theirs.id) == [both.theirs.id]
        with pytest.raises(ProgrammingError):
            async with one.begin(OPERATOR) as connection:
                await connection.execute(text("SELECT nothing"))
        assert await names(SYSTEM) == []
    await one.close()


async def test_a_scope_is_one_that_can_be(gateway_db: Database) -> None:
    with pytest.raises(ValueError, match="empty"):
        async with gateway_db.begin(""):
            pytest.fail("that is what a transaction without a tenant has")
    for odd in ("'; RESET ROLE; --", "\\", "%s", "\N{SNOWMAN}", "x" * 10_000):
        async with gateway_db.begin(odd) as connection:
            assert (await connection.execute(text("SELECT current_setting('lmaas.tenant')"))).scalar_one() == odd


async def test_a_key_is_found_by_its_hash_alone(both: Both) -> None:
    principal = await tenants.find_principal(both.gateway, both.theirs.key_hash)
    assert principal is not None
    assert (principal.tenant_id, principal.key_id) == (both.theirs.id, both.theirs.key_id)
    assert await tenants.find_principal(both.gateway, "") is None
    operator = await tenants.create_key(both.gateway, None, Role.OPERATOR, "", "hash-operator", "sk")
    found = await tenants.find_principal(both.gateway, "hash-operator")
    assert found is not None
    assert (found.key_id, found.tenant_id) == (operator.id, None)
    async with both.gateway.begin(KeyScope(both.mine.key_hash)) as connection:
        assert list((await connection.execute(text("SELECT id FROM api_keys"))).scalars()) == [both.mine.key_id]
        assert list((await connection.execute(text("SELECT id FROM tenants"))).scalars()) == [both.mine.id]
    async with both.gateway.begin(KeyScope("hash-unknown")) as connection:
        assert (await connection.execute(text("SELECT count(*) FROM api_keys"))).scalar_one() == 0
        assert (await connection.execute(text("SELECT count(*) FROM tenants"))).scalar_one() == 0
    for scope in (both.mine.id, OPERATOR, SYSTEM):
        with pytest.raises(ProgrammingError, match="permission denied"):
            async with both.gateway.begin(scope) as connection:
                await connection.execute(text("SELECT hash FROM api_keys"))


async def test_signs_of_life_change_nothing_else(both: Both) -> None:
    await idempotency.seen(both.gateway, [both.mine.claim, both.theirs.claim])
    for statement in (
        "UPDATE idempotency SET answer = ''",
        "SELECT answer FROM idempotency",
        "DELETE FROM idempotency",
        "SELECT FROM tenants",
    ):
        with pytest.raises(ProgrammingError, match="permission denied"):
            async with both.gateway.begin(CLAIMS) as connection:
                await connection.execute(text(statement))


@pytest.mark.parametrize("role", [DatabaseRole.CONTROLLER, DatabaseRole.REPLICA, DatabaseRole.JOBS, DatabaseRole.CONSOLE])
async def test_other_processes_cannot_become_operators(database_url: str, role: DatabaseRole) -> None:
    db = Database(login_url(database_url, role), role)
    for statement in (
        "SET ROLE lmaas_operator",
        "SET ROLE lmaas_owner",
        "SET ROLE lmaas_gateway",
        "SELECT name FROM tenants" if role is not DatabaseRole.JOBS else "SELECT hash FROM api_keys",
        "CREATE TABLE t ()",
    ):
        with pytest.raises(ProgrammingError, match="permission denied"):
            async with db.begin(SYSTEM) as connection:
                await connection.execute(text(statement))
    await db.close()


async def test_the_ledger_is_final(both: Both, controller_db: Database) -> None:
    with pytest.raises(ProgrammingError, match="permission denied"):
        async with controller_db.begin(SYSTEM) as connection:
            await connection.execute(text("DELETE FROM usage_events"))
    async with controller_db.begin(SYSTEM) as connection:
        assert (await connection.execute(text("UPDATE usage_events SET charge_picousd = 0"))).rowcount == 0
    with pytest.raises(ProgrammingError, match="permission denied"):
        async with both.gateway.begin(OPERATOR) as connection:
            await connection.execute(text("UPDATE usage_events SET charge_picousd = 0"))
    with pytest.raises(ProgrammingError, match="permission denied"):
        async with both.gateway.begin(OPERATOR) as connection:
            await connection.execute(text("DELETE FROM audit_log"))


# Removing the WHERE of every store function.

ITEM = conversations.Item("msg_9", b"mine")
TURN = responses.Response("resp_9", b"mine", b"mine")


async def _in_scope(both: "Both", call: Callable[[AsyncConnection], Awaitable[object]]) -> object:
    async with both.gateway.begin(both.mine.id) as connection:
        return await call(connection)


Case = Callable[[Both], Awaitable[object]]


async def _unused(both: Both) -> object:
    async with adapters.unused(both.gateway, both.mine.id, [both.theirs.content, both.mine.content]) as found:
        return found


async def _added(both: Both) -> object:
    facts: dict[str, Any] = {"rank": 8, "target_modules": [], "size_bytes": 1, "activate": True, "audit": AUDIT}
    return await adapters.add_version(both.gateway, both.mine.id, "bot", both.base.id, content_hash=both.theirs.content, **facts)


async def _of_session(both: Both, act: Callable[[Database, str, str], Awaitable[sessions.Session]]) -> object:
    new = sessions.NewSession(both.mine.key_id, both.mine.id, Role.INFERENCE, "", secrets.token_hex(), "sk", timedelta(hours=1))
    made = await sessions.create_session(both.db, new, by_operator=True)
    return replace(await act(both.gateway, both.mine.id, made.id), id="", created_at=MOMENT, expires_at=MOMENT)


async def _batch_deleted(both: Both) -> object:
    with suppress(Conflict):  # it has not ended
        return await batches.delete_batch(both.gateway, both.mine.id, "batch_1", Dialect.OPENAI, audit=AUDIT)
    return None


CASES: dict[str, Case] = {
    "adapters.list_adapters": lambda both: adapters.list_adapters(both.gateway, both.mine.id),
    "adapters.get_adapter": lambda both: adapters.get_adapter(both.gateway, both.mine.id, "bot"),
    "adapters.list_versions": lambda both: adapters.list_versions(both.gateway, both.mine.id, "bot"),
    "adapters.find_served": lambda both: adapters.find_served(both.gateway, both.mine.id, "bot", None),
    "adapters.add_version": _added,
    "adapters.activate": lambda both: adapters.activate(both.gateway, both.mine.id, "bot", 1, audit=AUDIT),
    "adapters.delete_adapter": lambda both: adapters.delete_adapter(both.gateway, both.mine.id, "bot", audit=AUDIT),
    "adapters.unused": _unused,
    "idempotency.take": lambda both: idempotency.take(both.gateway, Claim(both.mine.id, "k", b"same", "r9")),
    "idempotency.keep": lambda both: idempotency.keep(both.gateway, both.mine.claim, ANSWER),
    "idempotency.give_up": lambda both: idempotency.give_up(both.gateway, both.mine.claim),
    "responses.find_response": lambda both: responses.find_response(both.gateway, both.mine.id, "resp_1"),
    "responses.find_chain": lambda both: responses.find_chain(both.gateway, both.mine.id, "resp_1"),
    "responses.find_exchanges": lambda both: responses.find_exchanges(both.gateway, both.mine.id, ["resp_1"]),
    "conversations.get_conversation": lambda both: conversations.get_conversation(both.gateway, both.mine.id, "conv_1"),
    "conversations.change_metadata": lambda both: conversations.change_metadata(both.gateway, both.mine.id, "conv_1", b"mine", MONTH),
    "conversations.delete_conversation": lambda both: conversations.delete_conversation(both.gateway, both.mine.id, "conv_1"),
    "conversations.add_items": lambda both: conversations.add_items(both.gateway, both.mine.id, "conv_1", [ITEM], MONTH),
    "conversations.save_turn": lambda both: conversations.save_turn(both.gateway, both.mine.id, TURN, "conv_1", [ITEM], MONTH),
    "conversations.list_items": lambda both: conversations.list_items(both.gateway, both.mine.id, "conv_1", Part(9), newest_first=True),
    "conversations.find_context": lambda both: conversations.find_context(both.gateway, both.mine.id, "conv_1"),
    "conversations.find_items": lambda both: conversations.find_items(both.gateway, both.mine.id, ["msg_1"]),
    "conversations.get_item": lambda both: conversations.get_item(both.gateway, both.mine.id, "conv_1", "msg_1"),
    "conversations.delete_item": lambda both: conversations.delete_item(both.gateway, both.mine.id, "conv_1", "msg_1", MONTH),
    "batches.get_batch": lambda both: batches.get_batch(both.gateway, both.mine.id, "batch_1", Dialect.OPENAI),
    "batches.list_batches": lambda both: batches.list_batches(both.gateway, both.mine.id, Dialect.OPENAI, Part(9)),
    "batches.cancel_batch": lambda both: batches.cancel_batch(both.gateway, both.mine.id, "batch_1", Dialect.OPENAI, audit=AUDIT),
    "batches.delete_batch": _batch_deleted,
    "batches.check_limits": lambda both: batches.check_limits(both.gateway, both.mine.id, BatchLimits(2, 9, "its tier")),
    "files.find_file": lambda both: files.find_file(both.gateway, both.mine.id, both.theirs.file),
    "files.list_files": lambda both: files.list_files(both.gateway, both.mine.id, Part(9)),
    # With the other tenant's file, it would exceed the limit.
    "files.check_room": lambda both: files.check_room(both.gateway, both.mine.id, Quota(2, 9, "its tier"), 1),
    "files.tier_of": lambda both: files.tier_of(both.gateway, both.mine.id),
    "files.delete_file": lambda both: files.delete_file(both.gateway, both.mine.id, both.mine.file, audit=AUDIT),
    "tenants.principal_of_key": lambda both: tenants.principal_of_key(both.gateway, both.mine.id, both.mine.key_id),
    "conversations.hold_tenant": lambda both: _in_scope(both, lambda connection: conversations.hold_tenant(connection, both.mine.id)),
    "conversations.add_turn": lambda both: _in_scope(
        both, lambda connection: conversations.add_turn(connection, both.mine.id, TURN, "conv_1", [ITEM], MONTH)
    ),
    "idempotency.keep_in": lambda both: _in_scope(both, lambda connection: idempotency.keep_in(connection, both.mine.claim, ANSWER)),
    "background.find_open": lambda both: background.find_open(both.gateway, both.mine.id, "resp_b"),
    "event_logs.read_log": lambda both: event_logs.read_log(both.gateway, both.mine.id, "resp_b", -1),
    "event_logs.progress": lambda both: event_logs.progress(both.gateway, both.mine.id, ["resp_b"]),
    "background.cancel": lambda both: background.cancel(both.gateway, both.mine.id, replace(TURN, id="resp_b"), MONTH),
    "background.delete_response": lambda both: background.delete_response(both.gateway, both.mine.id, "resp_b"),
    "sessions.get_session": lambda both: _of_session(both, sessions.get_session),
    "sessions.end_session": lambda both: _of_session(both, sessions.end_session),
    "tenants.get_own_tenant": lambda both: tenants.get_own_tenant(both.gateway, both.mine.id),
    "tenants.list_keys": lambda both: tenants.list_keys(both.gateway, both.mine.id),
    "tenants.revoke_key": lambda both: tenants.revoke_key(both.gateway, both.mine.id, both.mine.key_id, audit=AUDIT),
    "tenants.change_key": lambda both: tenants.change_key(both.gateway, both.mine.id, both.mine.key_id, {"max_concurrent": 1}, audit=AUDIT),
    "webhooks.get_webhook": lambda both: webhooks.get_webhook(both.gateway, both.mine.id, "wh_1"),
    "webhooks.list_webhooks": lambda both: webhooks.list_webhooks(both.gateway, both.mine.id),
    "webhooks.change_webhook": lambda both: webhooks.change_webhook(both.gateway, both.mine.id, "wh_1", {"enabled": False}, audit=AUDIT),
    "webhooks.fail_waiting": lambda both: _in_scope(both, lambda connection: webhooks.fail_waiting(connection, both.mine.id, "wh_1")),
    "webhooks.rotate_secret": lambda both: webhooks.rotate_secret(
        both.gateway, both.mine.id, "wh_1", SECRET, timedelta(days=1), audit=AUDIT
    ),
    "webhooks.delete_webhook": lambda both: webhooks.delete_webhook(both.gateway, both.mine.id, "wh_1", audit=AUDIT),
    "webhooks.send_test": lambda both: webhooks.send_test(both.gateway, both.mine.id, "wh_1", audit=AUDIT),
    "webhooks.redeliver": lambda both: webhooks.redeliver(both.gateway, both.mine.id, "wh_1", "evt_1", audit=AUDIT),
    "webhooks.get_delivery": lambda both: webhooks.get_delivery(both.gateway, both.mine.id, "wh_1", "evt_1"),
    "webhooks.list_deliveries": lambda both: webhooks.list_deliveries(both.gateway, both.mine.id, "wh_1", Part(9)),
    "usage_days.report": lambda both: usage_days.report(both.gateway, both.mine.id, list(UsageDimension), with_waste=True),
    "usage.list_events": lambda both: usage.list_events(both.gateway, both.mine.id),
    "usage_days.month_total": lambda both: usage_days.month_total(both.gateway, both.mine.id, 2026, 1),
}
#: Functions that name a tenant but belong to no tenant: an operator's own, or an insert, which has no WHERE.
NO_TENANTS = {
    "tenants.update_tenant",
    "tenants.delete_tenant",
    "tenants.create_key",
    "audit.record",
    "events.add_event",
    "webhooks.create_webhook",
    "responses.save",
    "responses.save_in",
    "responses.owned",
    "background.create",
    "conversations.create_conversation",
    # For operators and controllers, as other tests of them show.
    "retention.delete_state",
    "batches.create_batch",
    "batches.refusal_of_lines",
    "batches.delete_batches",
    "files.delete_expired",
    "files.due_checks",
    "files.expire_files",
    # An insert, and a query of contents that are named with their tenants.
    "files.expect_contents",
    "files.unused",
    "files.key_of",
    "retention.delete_oldest",
}


def test_every_store_function_of_a_tenant_is_tried() -> None:
    found = set()
    for module in (
        adapters,
        audit,
        background,
        batches,
        conversations,
        event_logs,
        events,
        files,
        idempotency,
        responses,
        retention,
        sessions,
        tenants,
        usage,
        webhooks,
        usage_days,
    ):
        for name, function in _functions(module):
            if {"tenant_id", "claim", "scope"} & set(inspect.signature(function).parameters):
                found.add(f"{module.__name__.rpartition('.')[2]}.{name}")
    assert found == set(CASES) | NO_TENANTS


def _functions(module: ModuleType) -> Iterator[tuple[str, Any]]:
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if function.__module__ == module.__name__ and not name.startswith("_"):
            yield name, function


@contextmanager
def forgetting(both: Both, login: str = "lmaas_gateway") -> Iterator[None]:
    """Remove every condition on a tenant from the statements that gateways execute."""

    def without(element: Any, **_: Any) -> Any:
        if not isinstance(element, BinaryExpression) or not isinstance(element.right, BindParameter):
            return None
        column = str(element.left)
        if not column.endswith(".tenant_id") and column != "tenants.id":
            return None
        both.forgotten.append(str(element))
        return true()

    def forget(connection: Connection, statement: Any, several: Any, single: Any, options: Any) -> Any:
        if connection.engine.url.username == login:
            statement = visitors.replacement_traverse(statement, {}, without)
        return statement, several, single

    event.listen(Engine, "before_execute", forget, retval=True)
    try:
        yield
    finally:
        event.remove(Engine, "before_execute", forget)


@pytest.mark.parametrize("name", CASES)
async def test_a_forgotten_where_returns_nothing_of_others(both: Both, name: str) -> None:
    before = await both.rows_of_theirs()
    changes_nothing = name.rpartition(".")[2].startswith(("list", "get", "find", "report", "month", "unused"))
    right = await CASES[name](both) if changes_nothing else None
    with forgetting(both):
        result = await CASES[name](both)
    assert both.forgotten, "there was no condition to remove"
    if name not in ("adapters.unused", "adapters.add_version"):  # their arguments are the hashes
        assert not both.seen(result)
    if changes_nothing:
        assert result == right
    assert await both.rows_of_theirs() == before


async def test_a_list_does_not_go_on_after_an_item_of_others(both: Both) -> None:
    lists: list[Awaitable[object]] = [
        tenants.list_keys(both.gateway, both.mine.id, Part(10, both.theirs.key_id)),
        usage.list_events(both.gateway, both.mine.id, Part(10, "req-other")),
        adapters.list_adapters(both.gateway, both.mine.id, Part(10, both.theirs.adapter)),
        files.list_files(both.gateway, both.mine.id, Part(10, both.theirs.file)),
    ]
    with forgetting(both):
        for listed in lists:
            with pytest.raises(InvalidRequest, match="'after'"):
                await listed


@pytest.mark.parametrize("name", ["adapters.list_adapters", "tenants.list_keys", "usage.list_events"])
async def test_without_policies_a_forgotten_where_is_a_leak(both: Both, name: str) -> None:
    as_superuser = replace(both, gateway=both.db)
    with forgetting(as_superuser, login="postgres"):
        assert both.seen(await CASES[name](as_superuser))
