"""Handlers for conversations and their items."""

import secrets
from collections.abc import Sequence
from typing import Any

import msgspec

from lmaas.api.context import Api, ApiCall
from lmaas.api.operation import page_of
from lmaas.api.shapes.common import Page
from lmaas.api.shapes.responses import (
    Conversation,
    ConversationChange,
    DeletedConversation,
    ItemPaging,
    NewConversation,
    NewItems,
    ResponseItem,
)
from lmaas.errors import InvalidRequest, NotFound
from lmaas.protocols.responses.items import named, read_items
from lmaas.protocols.responses.parameters import metadata as read_metadata
from lmaas.protocols.responses.stored import is_id, stored_items
from lmaas.store import conversations as rows
from lmaas.store.database import new_id
from lmaas.store.paging import Part


def _shown(row: rows.Conversation) -> Conversation:
    return Conversation(id=row.id, created_at=int(row.created_at.timestamp()), metadata=msgspec.json.decode(row.metadata))


def _id(call: ApiCall[Any, Any]) -> str:
    """Return the conversation's id. Raises NotFound for what cannot be one."""
    if not is_id(call.path["conversation"]):
        raise rows.not_found()
    return call.path["conversation"]


def _item_id(call: ApiCall[Any, Any]) -> str:
    if not is_id(call.path["item"]):
        raise rows.item_not_found()
    return call.path["item"]


def _metadata(given: dict[str, Any] | None) -> bytes:
    return msgspec.json.encode(read_metadata("metadata", given or {}))


async def _items(api: Api, call: ApiCall[Any, Any], given: list[Any] | None) -> Sequence[rows.Item]:
    """Return a client's items with ids of their own. A reference becomes a copy of the item that it names."""
    items = read_items("items", given or [])
    references = {item["id"] for item in items if item["type"] == "item_reference"}
    known = await api.state.items_of(call.tenant_id, references)
    for place, item in enumerate(items):
        if item["type"] != "item_reference":
            continue
        if item["id"] not in known:
            raise NotFound("The item does not exist.", code="item_not_found", param=f"items[{place}].id")
        items[place] = known[item["id"]]
    return stored_items(named(items, f"resp_{secrets.token_hex(12)}"))


async def create_conversation(api: Api, call: ApiCall[NewConversation, None]) -> Conversation:
    """Create a conversation, with items if there are any."""
    metadata, items = _metadata(call.body.metadata), await _items(api, call, call.body.items)
    return _shown(await rows.create_conversation(api.db, call.tenant_id, new_id("conv"), metadata, items, api.kept_for))


async def get_conversation(api: Api, call: ApiCall[None, None]) -> Conversation:
    """Return a conversation."""
    conversation_id = _id(call)
    return _shown(await api.state.read(call.tenant_id, lambda: rows.get_conversation(api.db, call.tenant_id, conversation_id)))


async def change_conversation(api: Api, call: ApiCall[ConversationChange, None]) -> Conversation:
    """Replace the metadata of a conversation."""
    return _shown(await rows.change_metadata(api.db, call.tenant_id, _id(call), _metadata(call.body.metadata), api.kept_for))


async def delete_conversation(api: Api, call: ApiCall[None, None]) -> DeletedConversation:
    """Delete a conversation with its items."""
    await rows.delete_conversation(api.db, call.tenant_id, _id(call))
    return DeletedConversation(id=_id(call), deleted=True)


async def add_items(api: Api, call: ApiCall[NewItems, None]) -> Page[ResponseItem]:
    """Append items to a conversation, and return them."""
    conversation_id = _id(call)
    items = await _items(api, call, call.body.items)
    if not items:
        raise InvalidRequest("'items' must have at least one item.", code="out_of_range", param="items")
    await rows.add_items(api.db, call.tenant_id, conversation_id, items, api.kept_for)
    return _page(items, len(items))


async def list_items(api: Api, call: ApiCall[None, ItemPaging]) -> Page[ResponseItem]:
    """Return a page of a conversation's items."""
    asked = call.query
    part = Part(asked.limit, asked.after)
    if asked.after is not None and not is_id(asked.after):
        raise InvalidRequest("'after' must be the id of an item of this list.", code="invalid_cursor", param="after")
    conversation_id, newest_first = _id(call), asked.order == "desc"
    items = await api.state.read(
        call.tenant_id, lambda: rows.list_items(api.db, call.tenant_id, conversation_id, part, newest_first=newest_first)
    )
    return _page(items, asked.limit)


def _page(items: Sequence[rows.Item], limit: int) -> Page[ResponseItem]:
    return page_of([msgspec.Raw(item.body) for item in items], [item.id for item in items], limit)


async def get_item(api: Api, call: ApiCall[None, None]) -> msgspec.Raw:
    """Return an item of a conversation as it was stored."""
    conversation_id, item_id = _id(call), _item_id(call)
    item = await api.state.read(call.tenant_id, lambda: rows.get_item(api.db, call.tenant_id, conversation_id, item_id))
    return msgspec.Raw(item.body)


async def delete_item(api: Api, call: ApiCall[None, None]) -> Conversation:
    """Delete an item of a conversation, and return the conversation."""
    return _shown(await rows.delete_item(api.db, call.tenant_id, _id(call), _item_id(call), api.kept_for))
