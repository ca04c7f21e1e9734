"""Stored responses of tenants.

A row has a response's own input and the response object. What a response continues is read through the ids of the earlier ones, so nothing
is stored twice. Times are those of Postgres.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import BindParameter, ColumnElement, FromClause, Select, bindparam, delete, func, literal, select
from sqlalchemy.ext.asyncio import AsyncConnection

from lmaas.store.database import Database
from lmaas.store.tables import conversation_items, conversations
from lmaas.store.tables import responses as rows

#: The limits of a chain: the number of its responses, and their bytes together. More would not fit into a model's context.
MAX_CHAIN = 1000
MAX_CHAIN_BYTES = 8 * 1024 * 1024
#: What a row takes besides its JSON. It is counted, so that many small rows count too.
ROW_BYTES = 256

#: Stores many responses by one short statement, because its cost is part of every request's. The lock waits for a running deletion of the
#: tenant. After a deletion, no new row of the tenant may be created.
_SAVE = """
INSERT INTO responses (tenant_id, id, previous_id, input, body, size_bytes, expires_at)
SELECT tenant.id, new.id, new.previous_id, new.input, new.body, octet_length(new.input) + octet_length(new.body) + %s, now() + %s
FROM (SELECT id FROM tenants WHERE id = %s AND deleted_at IS NULL FOR SHARE) AS tenant,
    unnest(%b::text[], %b::text[], %b::bytea[], %b::bytea[]) AS new (id, previous_id, input, body)
ON CONFLICT DO NOTHING
"""


@dataclass(frozen=True, slots=True)
class Response:
    """A response with its own input items, both as JSON. `previous_id` is the response that it continues."""

    id: str
    input: bytes
    body: bytes
    previous_id: str | None = None

    @property
    def size_bytes(self) -> int:
        """What it takes in the database."""
        return len(self.input) + len(self.body) + ROW_BYTES


@dataclass(frozen=True, slots=True)
class Chain:
    """A response with what it continues, oldest first: items of the conversation in which the chain begins, and the responses.

    `whole` is false if the chain exceeds the limits. Then the oldest part is missing.
    """

    items: Sequence[bytes]
    responses: Sequence[Response]
    whole: bool = True


def owned(table: FromClause, tenant_id: str | BindParameter[Any]) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    """Return the conditions for a tenant's rows that have not expired. Expired rows are found no more, although they are deleted later."""
    return table.c.tenant_id == tenant_id, table.c.expires_at > func.now()


async def save(db: Database, tenant_id: str, responses: Sequence[Response], kept_for: timedelta) -> None:
    """Store responses that belong to no conversation. One that is stored already stays as it is. Nothing is stored for a deleted tenant."""
    await save_together(db, [(tenant_id, responses)], kept_for)


async def save_together(db: Database, batches: Sequence[tuple[str, Sequence[Response]]], kept_for: timedelta) -> None:
    """Store responses of several tenants as `save` does, in one transaction."""
    await db.execute_for_each(_SAVE, [(tenant_id, _values(tenant_id, responses, kept_for)) for tenant_id, responses in batches])


def _values(tenant_id: str, responses: Sequence[Response], kept_for: timedelta) -> Sequence[Any]:
    ids, previous = [each.id for each in responses], [each.previous_id for each in responses]
    return ROW_BYTES, kept_for, tenant_id, ids, previous, [each.input for each in responses], [each.body for each in responses]


async def find_response(db: Database, tenant_id: str, response_id: str) -> Response | None:
    """Return a response that this tenant has."""
    query = select(rows.c.id, rows.c.input, rows.c.body, rows.c.previous_id).where(*owned(rows, tenant_id), rows.c.id == response_id)
    async with db.begin(tenant_id) as connection:
        row = (await connection.execute(query)).first()
    return None if row is None else Response(*row)


def _chain_query() -> Select[Any]:
    tenant_id: BindParameter[str] = bindparam("tenant")
    steps = (
        select(rows.c.id, rows.c.previous_id, literal(1).label("depth"), rows.c.size_bytes.label("bytes"))
        .where(*owned(rows, tenant_id), rows.c.id == bindparam("response"))
        .cte("steps", recursive=True)
    )
    earlier = rows.alias("earlier")
    within = (steps.c.depth < bindparam("max_chain"), steps.c.bytes <= bindparam("max_bytes"))
    steps = steps.union_all(
        select(earlier.c.id, earlier.c.previous_id, steps.c.depth + 1, steps.c.bytes + earlier.c.size_bytes).where(
            *owned(earlier, tenant_id), earlier.c.id == steps.c.previous_id, *within
        )
    )
    columns = (rows.c.id, rows.c.input, rows.c.body, rows.c.previous_id)
    query = select(*columns, rows.c.conversation_id, rows.c.conversation_start, steps.c.depth, steps.c.bytes)
    return query.join(steps, steps.c.id == rows.c.id).where(rows.c.tenant_id == tenant_id).order_by(steps.c.depth.desc())


#: Built once, because building it costs about as much as executing it.
_CHAIN = _chain_query()


async def find_chain(db: Database, tenant_id: str, response_id: str) -> Chain | None:
    """Return a response with everything that it continues. None if the tenant does not have it, or has no longer all of that."""
    values = {"tenant": tenant_id, "response": response_id, "max_chain": MAX_CHAIN, "max_bytes": MAX_CHAIN_BYTES}
    async with db.begin(tenant_id) as connection:
        found = (await connection.execute(_CHAIN, values)).all()
        if not found:
            return None
        first = found[0]
        responses = [Response(*row[:4]) for row in found]
        if first.previous_id is not None:
            # Either the limits ended the chain, or the next one is gone.
            cut = first.depth == MAX_CHAIN or first.bytes > MAX_CHAIN_BYTES
            return Chain((), responses, whole=False) if cut else None
        if first.conversation_id is None:
            return Chain((), responses)
        items = await _items_before(connection, tenant_id, first.conversation_id, first.conversation_start)
    return None if items is None else Chain(items, responses)


async def _items_before(connection: AsyncConnection, tenant_id: str, conversation_id: str, position: int | None) -> Sequence[bytes] | None:
    """Return the items that a conversation had before this position, None if it is gone."""
    there = select(conversations.c.id).where(*owned(conversations, tenant_id), conversations.c.id == conversation_id)
    if position is None or (await connection.execute(there)).first() is None:
        return None
    items = conversation_items.c
    query = select(items.body).where(items.tenant_id == tenant_id, items.conversation_id == conversation_id, items.position < position)
    return (await connection.execute(query.order_by(items.position))).scalars().all()


async def find_responses(db: Database, tenant_id: str, response_ids: Collection[str]) -> list[Response]:
    """Return those of these responses that the tenant has, the smallest first, at most MAX_CHAIN_BYTES together."""
    own = (*owned(rows, tenant_id), rows.c.id.in_(response_ids))
    together = func.sum(rows.c.size_bytes).over(order_by=(rows.c.size_bytes, rows.c.id)).label("together")
    sizes = select(rows.c.id, together).where(*own).subquery()
    query = select(rows.c.id, rows.c.input, rows.c.body, rows.c.previous_id).join(sizes, sizes.c.id == rows.c.id)
    query = query.where(rows.c.tenant_id == tenant_id, sizes.c.together <= MAX_CHAIN_BYTES)
    async with db.begin(tenant_id) as connection:
        return [Response(*row) for row in await connection.execute(query)]


async def delete_response(db: Database, tenant_id: str, response_id: str) -> bool:
    """Delete a response with its input. Returns False if the tenant does not have it."""
    query = delete(rows).where(*owned(rows, tenant_id), rows.c.id == response_id).returning(rows.c.id)
    async with db.begin(tenant_id) as connection:
        return (await connection.execute(query)).first() is not None
