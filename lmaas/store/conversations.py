"""Stored conversations of tenants, and their items in order. Every change of a conversation keeps it alive for the whole period again."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, delete, func, literal, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from lmaas.errors import InvalidRequest, NotFound
from lmaas.store.database import Database
from lmaas.store.paging import Part, rows_of
from lmaas.store.responses import ROW_BYTES, Response, owned, references_too_large
from lmaas.store.tables import conversation_items, conversations, responses, tenants

#: The limits of one conversation. More would not fit into a model's context.
MAX_ITEMS = 10_000
MAX_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Item:
    """An item of a conversation. Its JSON has the id too."""

    id: str
    body: bytes

    @property
    def size_bytes(self) -> int:
        """Its size in the database."""
        return len(self.body) + ROW_BYTES


@dataclass(frozen=True, slots=True)
class NewTurn:
    """A response that is to be stored together with other work, and the items that it appends to its conversation if it has one."""

    response: Response
    conversation_id: str | None
    items: Sequence[Item]
    kept_for: timedelta

    @property
    def size_bytes(self) -> int:
        """Its size in memory."""
        return self.response.size_bytes + sum(item.size_bytes for item in self.items)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation without its items. `metadata` is a JSON object."""

    id: str
    metadata: bytes
    created_at: datetime


_COLUMNS = (conversations.c.id, conversations.c.metadata, conversations.c.created_at)


def not_found() -> NotFound:
    """Return the error for a conversation that the tenant does not have."""
    return NotFound("The conversation does not exist.", code="conversation_not_found")


def item_not_found() -> NotFound:
    """Return the error for an item that the conversation does not have."""
    return NotFound("The conversation has no such item.", code="item_not_found")


def _one(tenant_id: str, conversation_id: str) -> tuple[ColumnElement[bool], ...]:
    return (*owned(conversations, tenant_id), conversations.c.id == conversation_id)


def _items(tenant_id: str, conversation_id: str) -> tuple[ColumnElement[bool], ...]:
    return conversation_items.c.tenant_id == tenant_id, conversation_items.c.conversation_id == conversation_id


async def create_conversation(
    db: Database, tenant_id: str, conversation_id: str, metadata: bytes, items: Sequence[Item], kept_for: timedelta
) -> Conversation:
    """Store a new conversation with its first items. Raises NotFound for a deleted tenant, and InvalidRequest for too many items."""
    size = len(metadata) + ROW_BYTES + sum(item.size_bytes for item in items)
    if len(items) > MAX_ITEMS or size > MAX_BYTES:
        raise _full()
    values: dict[str, Any] = {"tenant_id": tenants.c.id, "id": literal(conversation_id), "metadata": literal(metadata)}
    values |= {"next_position": literal(len(items)), "item_count": literal(len(items)), "size_bytes": literal(size)}
    values["expires_at"] = func.now() + kept_for
    # The lock waits for a running deletion of the tenant. After a deletion, no new row of the tenant may be created.
    living = select(*values.values()).where(tenants.c.id == tenant_id, tenants.c.deleted_at.is_(None)).with_for_update(read=True)
    async with db.begin(tenant_id) as connection:
        row = (await connection.execute(insert(conversations).from_select(list(values), living).returning(*_COLUMNS))).first()
        if row is None:
            raise not_found()
        await _append(connection, tenant_id, conversation_id, 0, items)
    return Conversation(*row)


async def get_conversation(db: Database, tenant_id: str, conversation_id: str) -> Conversation:
    """Return a conversation. Raises NotFound."""
    async with db.begin(tenant_id) as connection:
        row = (await connection.execute(select(*_COLUMNS).where(*_one(tenant_id, conversation_id)))).first()
    if row is None:
        raise not_found()
    return Conversation(*row)


async def change_metadata(db: Database, tenant_id: str, conversation_id: str, metadata: bytes, kept_for: timedelta) -> Conversation:
    """Replace the metadata of a conversation. Raises NotFound."""
    changing = update(conversations).where(*_one(tenant_id, conversation_id))
    size = conversations.c.size_bytes - func.octet_length(conversations.c.metadata) + len(metadata)
    changing = changing.values(metadata=metadata, size_bytes=size, expires_at=func.now() + kept_for)
    async with db.begin(tenant_id) as connection:
        row = (await connection.execute(changing.returning(*_COLUMNS))).first()
    if row is None:
        raise not_found()
    return Conversation(*row)


async def delete_conversation(db: Database, tenant_id: str, conversation_id: str) -> None:
    """Delete a conversation with its items. Raises NotFound."""
    async with db.begin(tenant_id) as connection:
        gone = await connection.execute(delete(conversations).where(*_one(tenant_id, conversation_id)).returning(conversations.c.id))
        if gone.first() is None:
            raise not_found()


async def add_items(db: Database, tenant_id: str, conversation_id: str, items: Sequence[Item], kept_for: timedelta) -> None:
    """Append items to a conversation. Raises NotFound, and InvalidRequest if the conversation is full."""
    if len(items) > MAX_ITEMS or sum(item.size_bytes for item in items) > MAX_BYTES:
        raise _full()
    async with db.begin(tenant_id) as connection:
        row = (await connection.execute(_appending(tenant_id, conversation_id, items, kept_for))).first()
        if row is None:
            raise not_found()
        if row.item_count > MAX_ITEMS or row.size_bytes > MAX_BYTES:
            raise _full()
        await _append(connection, tenant_id, conversation_id, row.start, items)


def _full() -> InvalidRequest:
    return InvalidRequest(
        f"A conversation has at most {MAX_ITEMS:,} items with {MAX_BYTES:,} bytes as stored. Delete some of its items, add less, or "
        "begin a new conversation.",
        code="conversation_full",
        param="conversation",
    )


def _appending(tenant_id: str, conversation_id: str, items: Sequence[Item], kept_for: timedelta) -> Any:
    """Return the statement that makes room for new items at the end of a conversation.

    It locks the conversation until the end of the transaction, so the items of two callers do not mix.
    """
    columns = conversations.c
    changes = {
        "next_position": columns.next_position + len(items),
        "item_count": columns.item_count + len(items),
        "size_bytes": columns.size_bytes + sum(item.size_bytes for item in items),
        "expires_at": func.now() + kept_for,
    }
    start = (columns.next_position - len(items)).label("start")
    return (
        update(conversations)
        .where(*_one(tenant_id, conversation_id))
        .values(changes)
        .returning(start, columns.item_count, columns.size_bytes)
    )


async def _append(connection: AsyncConnection, tenant_id: str, conversation_id: str, start: int, items: Sequence[Item]) -> None:
    if items:
        place = {"tenant_id": tenant_id, "conversation_id": conversation_id}
        rows = [{**place, "position": start + index, "id": item.id, "body": item.body} for index, item in enumerate(items)]
        await connection.execute(insert(conversation_items).values(rows))


async def save_turn(
    db: Database, tenant_id: str, response: Response, conversation_id: str, items: Sequence[Item], kept_for: timedelta
) -> None:
    """Store a response and append its items to its conversation, both or nothing. Of one that is stored already, nothing is stored again.

    If the conversation was deleted meanwhile, only the response is stored; nothing at all for a deleted tenant.
    """
    async with db.begin(tenant_id) as connection:
        if not await hold_tenant(connection, tenant_id):
            return
        if not await add_turn(connection, tenant_id, response, conversation_id, items, kept_for):
            await connection.rollback()


async def hold_tenant(connection: AsyncConnection, tenant_id: str) -> bool:
    """Keep a tenant from being deleted until the end of this transaction, and wait for a deletion that runs. Returns False if it is
    deleted: then no new row of the tenant may be created."""
    living = select(tenants.c.id).where(tenants.c.id == tenant_id, tenants.c.deleted_at.is_(None)).with_for_update(read=True)
    return (await connection.execute(living)).first() is not None


async def add_turn(
    connection: AsyncConnection,
    tenant_id: str,
    response: Response,
    conversation_id: str | None,
    items: Sequence[Item],
    kept_for: timedelta,
) -> bool:
    """Store a response in a transaction, and append these items, if there are any, to its conversation, if it has one.

    Returns False for one that is stored already: then the caller must roll back.
    """
    values: dict[str, Any] = {"tenant_id": tenant_id, "id": response.id, "input": response.input, "body": response.body}
    values |= {"conversation_id": conversation_id, "size_bytes": response.size_bytes, "expires_at": func.now() + kept_for}
    values |= {"output_start": response.output_start, "output_bytes": response.output_bytes, "previous_id": response.previous_id}
    start = None
    if conversation_id is not None and items:
        start = (await connection.execute(_appending(tenant_id, conversation_id, items, kept_for))).scalar()
    storing = insert(responses).values(conversation_start=start, **values).on_conflict_do_nothing().returning(responses.c.id)
    if (await connection.execute(storing)).first() is None:
        return False
    if conversation_id is not None and start is not None:
        await _append(connection, tenant_id, conversation_id, start, items)
    return True


async def list_items(db: Database, tenant_id: str, conversation_id: str, part: Part, *, newest_first: bool) -> list[Item]:
    """Return a part of a conversation's items. Raises NotFound, and InvalidRequest for a part after an unknown item."""
    columns, own = conversation_items.c, _items(tenant_id, conversation_id)
    async with db.begin(tenant_id) as connection:
        await _must_exist(connection, tenant_id, conversation_id)
        query = select(columns.id, columns.body).where(*own)
        found = await rows_of(connection, query, part, columns.position, columns.id, *own, newest_first=newest_first)
    return [Item(*row) for row in found]


async def find_context(db: Database, tenant_id: str, conversation_id: str) -> list[bytes]:
    """Return the JSON of all items of a conversation that may go on, oldest first. Raises NotFound, and InvalidRequest if it is full."""
    size = select(conversations.c.item_count, conversations.c.size_bytes).where(*_one(tenant_id, conversation_id))
    query = select(conversation_items.c.body).where(*_items(tenant_id, conversation_id)).order_by(conversation_items.c.position)
    async with db.begin(tenant_id) as connection:
        row = (await connection.execute(size)).first()
        if row is None:
            raise not_found()
        if row.item_count >= MAX_ITEMS or row.size_bytes >= MAX_BYTES:
            raise _full()
        return list((await connection.execute(query)).scalars())


async def get_item(db: Database, tenant_id: str, conversation_id: str, item_id: str) -> Item:
    """Return an item of a conversation. Raises NotFound."""
    query = select(conversation_items.c.id, conversation_items.c.body)
    query = query.where(*_items(tenant_id, conversation_id), conversation_items.c.id == item_id)
    async with db.begin(tenant_id) as connection:
        await _must_exist(connection, tenant_id, conversation_id)
        row = (await connection.execute(query)).first()
    if row is None:
        raise item_not_found()
    return Item(*row)


async def delete_item(db: Database, tenant_id: str, conversation_id: str, item_id: str, kept_for: timedelta) -> Conversation:
    """Delete an item of a conversation, and return the conversation. Raises NotFound."""
    one = (*_items(tenant_id, conversation_id), conversation_items.c.id == item_id)
    deleting = delete(conversation_items).where(*one).returning(func.octet_length(conversation_items.c.body))
    columns = conversations.c
    async with db.begin(tenant_id) as connection:
        # The conversation is locked first, as by those that append.
        touching = update(conversations).where(*_one(tenant_id, conversation_id)).values(expires_at=func.now() + kept_for)
        row = (await connection.execute(touching.returning(*_COLUMNS))).first()
        if row is None:
            raise not_found()
        size = (await connection.execute(deleting)).scalar_one_or_none()
        if size is None:
            raise item_not_found()
        less = {"item_count": columns.item_count - 1, "size_bytes": columns.size_bytes - size - ROW_BYTES}
        await connection.execute(update(conversations).where(*_one(tenant_id, conversation_id)).values(less))
    return Conversation(*row)


async def _must_exist(connection: AsyncConnection, tenant_id: str, conversation_id: str) -> None:
    if (await connection.execute(select(conversations.c.id).where(*_one(tenant_id, conversation_id)))).first() is None:
        raise not_found()


async def find_items(db: Database, tenant_id: str, item_ids: Collection[str]) -> list[Item]:
    """Return the items of the tenant's conversations that have one of these ids. Raises InvalidRequest if they are too large."""
    items = conversation_items.c
    living = select(conversations.c.id).where(*owned(conversations, tenant_id))
    own = (items.tenant_id == tenant_id, items.id.in_(item_ids), items.conversation_id.in_(living))
    size = select(func.coalesce(func.sum(func.octet_length(items.body)), 0)).where(*own)
    async with db.begin(tenant_id) as connection:
        if (await connection.execute(size)).scalar_one() > MAX_BYTES:
            raise references_too_large()
        return [Item(*row) for row in await connection.execute(select(items.id, items.body).where(*own))]
