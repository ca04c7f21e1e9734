"""Stored responses of tenants.

A row has a response's own input and the response object. What a response continues is read through the ids of the earlier ones, so nothing
is stored twice. Times are those of Postgres.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import BindParameter, ColumnElement, FromClause, Row, Select, bindparam, case, func, literal, select
from sqlalchemy.ext.asyncio import AsyncConnection

from lmaas.errors import InvalidRequest
from lmaas.store.database import Database
from lmaas.store.tables import conversation_items, conversations
from lmaas.store.tables import responses as rows

#: The limits of a chain: the number of its responses, and the bytes of their inputs and outputs. More would not fit into a model's context.
MAX_CHAIN = 1000
MAX_CHAIN_BYTES = 8 * 1024 * 1024
#: The size of a row besides its JSON. It is counted, so that many small rows count too.
ROW_BYTES = 256

#: Stores many responses by one short statement, because its cost is part of every request's. The lock waits for a running deletion of the
#: tenant. After a deletion, no new row of the tenant may be created.
_SAVE = """
INSERT INTO responses (tenant_id, id, previous_id, input, body, output_start, output_bytes, size_bytes, expires_at)
SELECT tenant.id, new.*, octet_length(new.input) + octet_length(new.body) + %s, now() + %s
FROM (SELECT id FROM tenants WHERE id = %s AND deleted_at IS NULL FOR SHARE) AS tenant,
    unnest(%b::text[], %b::text[], %b::bytea[], %b::bytea[], %b::int[], %b::int[])
        AS new (id, previous_id, input, body, output_start, output_bytes)
ON CONFLICT DO NOTHING
"""


@dataclass(frozen=True, slots=True)
class Response:
    """A response with its own input items, both as JSON.

    `previous_id` is the response that it continues. The list of its output is in `body`, from `output_start` on.
    """

    id: str
    input: bytes
    body: bytes
    previous_id: str | None = None
    output_start: int = 0
    output_bytes: int = 0

    @property
    def size_bytes(self) -> int:
        """Its size in the database."""
        return len(self.input) + len(self.body) + ROW_BYTES


@dataclass(frozen=True, slots=True)
class Exchange:
    """The input and the output of a response, each a JSON list of items. The tools and the other fields are not read."""

    input: bytes
    output: bytes


@dataclass(frozen=True, slots=True)
class Chain:
    """A response with what it continues, oldest first: items of the conversation in which the chain begins, and the responses.

    `whole` is false if the chain exceeds the limits. Then nothing of it was read.
    """

    items: Sequence[bytes]
    responses: Sequence[Exchange]
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


async def save_in(connection: AsyncConnection, tenant_id: str, responses: Sequence[Response], kept_for: timedelta) -> None:
    """Store responses of a tenant in a transaction as `save` does."""
    await connection.exec_driver_sql(_SAVE, tuple(_values(tenant_id, responses, kept_for)))


def _values(tenant_id: str, responses: Sequence[Response], kept_for: timedelta) -> Sequence[Any]:
    ids, previous = [each.id for each in responses], [each.previous_id for each in responses]
    texts = [each.input for each in responses], [each.body for each in responses]
    places = [each.output_start for each in responses], [each.output_bytes for each in responses]
    return ROW_BYTES, kept_for, tenant_id, ids, previous, *texts, *places


async def find_response(db: Database, tenant_id: str, response_id: str) -> Response | None:
    """Return a response that this tenant has."""
    columns = (rows.c.id, rows.c.input, rows.c.body, rows.c.previous_id, rows.c.output_start, rows.c.output_bytes)
    query = select(*columns).where(*owned(rows, tenant_id), rows.c.id == response_id)
    async with db.begin(tenant_id) as connection:
        row = (await connection.execute(query)).first()
    return None if row is None else Response(*row)


def _context_bytes(table: FromClause) -> ColumnElement[int]:
    """Return what a response adds to a context. Its text is not read for that."""
    return func.octet_length(table.c.input) + table.c.output_bytes + ROW_BYTES


def _output() -> ColumnElement[bytes]:
    return func.substr(rows.c.body, rows.c.output_start + 1, rows.c.output_bytes)


def _chain_query() -> Select[Any]:
    tenant_id: BindParameter[str] = bindparam("tenant")
    steps = (
        select(rows.c.id, rows.c.previous_id, literal(1).label("depth"), _context_bytes(rows).label("bytes"))
        .where(*owned(rows, tenant_id), rows.c.id == bindparam("response"))
        .cte("steps", recursive=True)
    )
    earlier = rows.alias("earlier")
    within = (steps.c.depth < bindparam("max_chain"), steps.c.bytes <= bindparam("max_bytes"))
    steps = steps.union_all(
        select(earlier.c.id, earlier.c.previous_id, steps.c.depth + 1, steps.c.bytes + _context_bytes(earlier)).where(
            *owned(earlier, tenant_id), earlier.c.id == steps.c.previous_id, *within
        )
    )
    # The text of a chain that is too large is not read.
    fits = select(func.max(steps.c.bytes)).scalar_subquery() <= bindparam("max_bytes")
    query = select(
        case((fits, rows.c.input)).label("input"),
        case((fits, _output())).label("output"),
        *(rows.c.previous_id, rows.c.conversation_id, rows.c.conversation_start, steps.c.depth, steps.c.bytes),
    )
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
        # Either the limits ended the chain, or the next one is gone.
        if first.bytes > MAX_CHAIN_BYTES or (first.previous_id is not None and first.depth == MAX_CHAIN):
            return Chain((), (), whole=False)
        if first.previous_id is not None:
            return None
        responses = [Exchange(row.input, row.output) for row in found]
        if first.conversation_id is None:
            return Chain((), responses)
        return await _from_conversation(connection, tenant_id, first, responses)


async def _from_conversation(connection: AsyncConnection, tenant_id: str, first: Row[Any], responses: Sequence[Exchange]) -> Chain | None:
    """Return a chain with the items that the conversation had before its first response. None if the conversation is gone."""
    there = select(conversations.c.id).where(*owned(conversations, tenant_id), conversations.c.id == first.conversation_id)
    if first.conversation_start is None or (await connection.execute(there)).first() is None:
        return None
    items = conversation_items.c
    before = (items.tenant_id == tenant_id, items.conversation_id == first.conversation_id, items.position < first.conversation_start)
    size = select(func.coalesce(func.sum(func.octet_length(items.body) + ROW_BYTES), 0)).where(*before)
    if first.bytes + (await connection.execute(size)).scalar_one() > MAX_CHAIN_BYTES:
        return Chain((), (), whole=False)
    query = select(items.body).where(*before).order_by(items.position)
    return Chain((await connection.execute(query)).scalars().all(), responses)


async def find_exchanges(db: Database, tenant_id: str, response_ids: Collection[str]) -> list[Exchange]:
    """Return the inputs and outputs of those of these responses that the tenant has. Raises InvalidRequest if they are too large."""
    own = (*owned(rows, tenant_id), rows.c.id.in_(response_ids))
    size = select(func.coalesce(func.sum(_context_bytes(rows)), 0)).where(*own)
    async with db.begin(tenant_id) as connection:
        if (await connection.execute(size)).scalar_one() > MAX_CHAIN_BYTES:
            raise references_too_large()
        return [Exchange(*row) for row in await connection.execute(select(rows.c.input, _output()).where(*own))]


def references_too_large() -> InvalidRequest:
    """Return the error for references to more than is read for one request."""
    return InvalidRequest(
        f"The items that the input refers to, with the responses to which they belong, have more than {MAX_CHAIN_BYTES:,} bytes. Send the "
        "items themselves, or fewer of them.",
        code="references_too_large",
        param="input",
    )
