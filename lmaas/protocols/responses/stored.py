"""Responses and conversations of tenants, stored in Postgres."""

import asyncio
from collections.abc import Collection, Iterable, Sequence

import msgspec

from lmaas.errors import InvalidRequest, NotFound
from lmaas.protocols.responses.items import response_of
from lmaas.protocols.responses.state import Item, NewResponse
from lmaas.protocols.responses.writer import Turn, Writer
from lmaas.store import conversations
from lmaas.store.database import Database
from lmaas.store.responses import MAX_CHAIN, MAX_CHAIN_BYTES, Chain, Response, find_chain, find_responses

#: The longest id that a client may send. Those of the service are shorter.
MAX_ID = 100
#: The most ids of items that one request may refer to.
MAX_REFERENCES = 1000
#: The bytes that are decoded before other requests run again.
BYTES_AT_ONCE = 256 * 1024


class _Output(msgspec.Struct):
    """What is read of a stored response object."""

    output: list[Item]


_ITEMS = msgspec.json.Decoder(list[Item])
_ITEM = msgspec.json.Decoder(Item)
_OUTPUT = msgspec.json.Decoder(_Output)


def is_id(value: str) -> bool:
    """Return whether this may be an id of the service. Whatever else a client sends is the id of nothing, and is not looked up."""
    return len(value) <= MAX_ID and value.isascii() and value.replace("_", "").isalnum()


class StoredState:
    """The stored responses and conversations. The items of another tenant do not exist for a tenant."""

    def __init__(self, db: Database, writer: Writer) -> None:
        self._db, self._writer = db, writer

    async def context_of(self, tenant_id: str, *, previous_response_id: str | None, conversation_id: str | None) -> list[Item]:
        """Return the items before a request's own, oldest first: those of a chain of responses with their outputs, or of a conversation.

        Exactly one of the two ids is given. Raises NotFound with the request's field in `param` if this tenant does not have it, or has no
        longer all of it, and InvalidRequest if there is too much.
        """
        if previous_response_id is not None:
            return await self._chain(tenant_id, previous_response_id)
        if conversation_id is None:
            raise ValueError("one of the ids must be given")
        if not is_id(conversation_id):
            raise _no_conversation(conversation_id)
        try:
            items = await conversations.find_context(self._db, tenant_id, conversation_id)
        except NotFound:
            raise _no_conversation(conversation_id) from None
        return await _decoded(Chain(items, ()))

    async def _chain(self, tenant_id: str, response_id: str) -> list[Item]:
        chain = await find_chain(self._db, tenant_id, response_id) if is_id(response_id) else None
        if chain is None:
            raise NotFound(
                f"The response '{response_id[:MAX_ID]}', or one that it continues, does not exist: it was not stored, has expired, or was "
                "deleted. Send the earlier items in 'input'.",
                code="previous_response_not_found",
                param="previous_response_id",
            )
        found = await _decoded(chain) if chain.whole else []
        if not chain.whole or len(found) > conversations.MAX_ITEMS:
            raise InvalidRequest(
                f"The response continues more than {MAX_CHAIN:,} responses, {conversations.MAX_ITEMS:,} items, or {MAX_CHAIN_BYTES:,} "
                "bytes. Begin a new chain.",
                code="context_length_exceeded",
                param="previous_response_id",
            )
        return found

    async def items_of(self, tenant_id: str, ids: Collection[str]) -> dict[str, Item]:
        """Return those of the stored items that this tenant has, by their ids: items of conversations, and inputs and outputs of responses.

        Raises InvalidRequest for too many ids.
        """
        wanted = {item_id for item_id in ids if is_id(item_id)}
        if len(wanted) > MAX_REFERENCES:
            raise InvalidRequest(f"A request refers to at most {MAX_REFERENCES:,} items.", code="out_of_range", param="input")
        if not wanted:
            return {}
        found = {item.id: _ITEM.decode(item.body) for item in await conversations.find_items(self._db, tenant_id, wanted)}
        responses = {response_of(item_id) for item_id in wanted - found.keys()}
        if responses:
            for response in await find_responses(self._db, tenant_id, responses):
                found |= {item["id"]: item for item in _items_of(response) if item["id"] in wanted}
        return found

    async def store(self, tenant_id: str, response: NewResponse) -> None:
        """Store a response, and add its items to its conversation if it has one. Waits for Postgres, but not for long."""
        items: Sequence[conversations.Item] = ()
        if response.conversation_id is not None:
            items = stored_items([*response.input_items, *_OUTPUT.decode(response.body).output])
        row = Response(response.id, msgspec.json.encode(response.input_items), response.body, response.previous_response_id)
        await self._writer.store(tenant_id, Turn(row, response.conversation_id, items))


def stored_items(items: Iterable[Item]) -> Sequence[conversations.Item]:
    """Return items that have ids in the form in which conversations store them."""
    return [conversations.Item(item["id"], msgspec.json.encode(item)) for item in items]


def input_of(response: Response) -> list[Item]:
    """Return a stored response's own input items."""
    return _ITEMS.decode(response.input)


def _items_of(response: Response) -> list[Item]:
    return input_of(response) + _OUTPUT.decode(response.body).output


async def _decoded(chain: Chain) -> list[Item]:
    """Return the items of a chain, oldest first. Other requests run meanwhile."""
    found: list[Item] = []
    size = 0
    for item in chain.items:
        found.append(_ITEM.decode(item))
        size = await _paused(size + len(item))
    for response in chain.responses:
        found += _items_of(response)
        size = await _paused(size + response.size_bytes)
    return found


async def _paused(size: int) -> int:
    """Let other requests run if this many bytes were decoded since they last did. Returns the bytes since then."""
    if size < BYTES_AT_ONCE:
        return size
    await asyncio.sleep(0)
    return 0


def _no_conversation(conversation_id: str) -> NotFound:
    return NotFound(
        f"The conversation '{conversation_id[:MAX_ID]}' does not exist: it was never created, or has expired or been deleted.",
        code="conversation_not_found",
        param="conversation",
    )
