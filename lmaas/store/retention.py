"""Deletion of stored responses and conversations: of expired ones, of what a tenant has beyond its bound, and of a deleted tenant's.

Each function deletes a bounded number of rows, so that no statement runs for long. Items of a conversation go with it, and events with a
response in the background. While a runner leases one of the latter, only the deletion of its tenant deletes it, because the runner has yet
to charge what it used.
"""

from sqlalchemy import ColumnElement, Subquery, Table, delete, func, literal, select, true, tuple_, union_all
from sqlalchemy.ext.asyncio import AsyncConnection

from lmaas.store.database import Database
from lmaas.store.scopes import OPERATOR, SYSTEM
from lmaas.store.tables import background_responses, conversation_items, conversations, response_events, responses

TABLES = (responses, conversations, background_responses)
#: Rows that one statement deletes, and items of conversations that go with them. The last conversation may exceed the latter.
ROWS_AT_ONCE = 500
ITEMS_AT_ONCE = 10_000


async def delete_expired(db: Database) -> int:
    """Delete some expired responses and conversations of all tenants, for a controller. Returns their number."""
    async with db.begin(SYSTEM) as connection:
        return sum([await _delete_some(connection, table, (table.c.expires_at <= func.now()) & _is_free(table)) for table in TABLES])


async def delete_state(db: Database, tenant_id: str) -> int:
    """Delete some of a tenant's responses and conversations, for an operator. Returns their number."""
    async with db.begin(OPERATOR) as connection:
        return sum([await _delete_some(connection, table, table.c.tenant_id == tenant_id) for table in TABLES])


async def stored_bytes(db: Database) -> dict[str, int]:
    """Return the bytes of each tenant's responses and conversations, for a controller."""
    every = union_all(*(select(table.c.tenant_id, table.c.size_bytes) for table in TABLES)).subquery()
    query = select(every.c.tenant_id, func.sum(every.c.size_bytes)).group_by(every.c.tenant_id)
    async with db.begin(SYSTEM) as connection:
        return {tenant_id: int(size) for tenant_id, size in await connection.execute(query)}


async def table_bytes(db: Database) -> int:
    """Return the bytes of the tables on the disk, for a controller. It reads no row."""
    sizes = [func.pg_total_relation_size(table.name) for table in (*TABLES, conversation_items, response_events)]
    async with db.begin(SYSTEM) as connection:
        return sum((await connection.execute(select(*sizes))).one())


async def delete_oldest(db: Database, tenant_id: str, surplus_bytes: int) -> int:
    """Delete some of a tenant's responses and conversations, those that expire first, for a controller.

    Returns the bytes of what was deleted: at least `surplus_bytes`, unless that takes more rows than are deleted at a time.
    """
    portions = [
        select(_portion(table, (table.c.tenant_id == tenant_id) & _is_free(table)), literal(table.name).label("table")) for table in TABLES
    ]
    first = union_all(*portions).subquery()
    query = select(first.c.table, first.c.id, first.c.size_bytes).order_by(first.c.expires_at, first.c.id)
    # By table: a stored response that ran in the background has its id in two.
    ids: dict[str, list[str]] = {table.name: [] for table in TABLES}
    async with db.begin(SYSTEM) as connection:
        deleted = 0
        for table_name, item_id, size in await connection.execute(query):
            if deleted >= surplus_bytes:
                break
            ids[table_name].append(item_id)
            deleted += size
        for table in TABLES:
            await connection.execute(delete(table).where(table.c.tenant_id == tenant_id, table.c.id.in_(ids[table.name]), _is_free(table)))
    return deleted


def _is_free(table: Table) -> ColumnElement[bool]:
    """Return the condition that no runner leases a row."""
    return table.c.runner_id.is_(None) if table is background_responses else true()


async def _delete_some(connection: AsyncConnection, table: Table, condition: ColumnElement[bool]) -> int:
    portion = _portion(table, condition)
    # The condition again: a conversation that goes on at this time is no longer expired, and stays.
    own = tuple_(table.c.tenant_id, table.c.id).in_(select(portion.c.tenant_id, portion.c.id))
    gone = await connection.execute(delete(table).where(condition, own))
    return gone.rowcount


def _portion(table: Table, condition: ColumnElement[bool]) -> Subquery:
    """Return the rows for which a condition holds that expire first, as many as one statement deletes."""
    items = table.c.item_count if table is conversations else literal(0)
    first = select(table.c.tenant_id, table.c.id, table.c.size_bytes, table.c.expires_at, items.label("items"))
    rows = first.where(condition).order_by(table.c.expires_at).limit(ROWS_AT_ONCE).subquery()
    before = func.sum(rows.c["items"]).over(order_by=(rows.c.expires_at, rows.c.id), rows=(None, 0)) - rows.c["items"]
    ranked = select(rows.c.tenant_id, rows.c.id, rows.c.size_bytes, rows.c.expires_at, before.label("before")).subquery()
    return select(ranked).where(ranked.c.before < ITEMS_AT_ONCE).subquery()
