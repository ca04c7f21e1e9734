"""Responses and conversations of tenants, stored in Postgres."""

from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

import msgspec

from lmaas.errors import InvalidRequest, NotFound
from lmaas.protocols.responses.items import response_of
from lmaas.protocols.responses.state import Item, NewResponse
from lmaas.protocols.responses.turns import BYTES_IN_PLACE, Turns
from lmaas.protocols.responses.writer import Turn, Writer
from lmaas.store import conversations
from lmaas.store.background import find_open
from lmaas.store.database import Database
from lmaas.store.responses import MAX_CHAIN, MAX_CHAIN_BYTES, Chain, Exchange, Response, find_chain, find_exchanges

T = TypeVar("T")
#: The longest id that a client may send. Those of the service are shorter.
MAX_ID = 100
#: The most ids of items that one request may refer to.
MAX_REFERENCES = 1000


class _Output(msgspec.Struct):
    """The fields of a response object that are read."""

    output: msgspec.Raw


class _Id(msgspec.Struct):
    """The field by which an item is found."""

    id: str


# Items are decoded one by one, because other threads wait while one call decodes.
_ITEMS = msgspec.json.Decoder(list[msgspec.Raw])
_ITEM = msgspec.json.Decoder(Item)
_ID = msgspec.json.Decoder(_Id)
_OUTPUT = msgspec.json.Decoder(_Output)


def is_id(value: str) -> bool:
    """Return whether this may be an id of the service. Whatever else a client sends is the id of nothing, and is not looked up."""
    return len(value) <= MAX_ID and value.isascii() and value.replace("_", "").isalnum()


class StoredState:
    """The stored responses and conversations. The items of another tenant do not exist for a tenant.

    A process that stores responses only together with other work has no `writer`.
    """

    def __init__(self, db: Database, writer: Writer | None = None) -> None:
        self._db, self._writer, self._turns = db, writer, Turns()

    async def read(self, tenant_id: str, reading: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Read something of a tenant when it is its turn, as all readings of its state are. Raises OverLimit and Unavailable."""
        return await self._turns.take(tenant_id, reading)

    async def context_of(self, tenant_id: str, *, previous_response_id: str | None, conversation_id: str | None) -> list[Item]:
        """Return the items before a request's own, oldest first: those of a chain of responses with their outputs, or of a conversation.

        Exactly one of the two ids is given. Raises NotFound with the request's field in `param` if this tenant does not have it, or has no
        longer all of it, InvalidRequest if there is too much, OverLimit and Unavailable.
        """
        return await self.read(tenant_id, lambda: self._context(tenant_id, previous_response_id, conversation_id))

    async def _context(self, tenant_id: str, previous_response_id: str | None, conversation_id: str | None) -> list[Item]:
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
        return await self._decoded(Chain(items, ()))

    async def _chain(self, tenant_id: str, response_id: str) -> list[Item]:
        chain = await find_chain(self._db, tenant_id, response_id) if is_id(response_id) else None
        if chain is None:
            unfinished = await find_open(self._db, tenant_id, response_id) if is_id(response_id) else None
            if unfinished is not None:
                raise InvalidRequest(
                    f"The response '{response_id}' is {unfinished.status.replace('_', ' ')} in the background, so it cannot be continued "
                    "yet. Retrieve it until its status is completed, then send the request again.",
                    code="previous_response_not_finished",
                    param="previous_response_id",
                )
            raise NotFound(
                f"The response '{response_id[:MAX_ID]}', or one that it continues, does not exist: it was not stored, has expired, or was "
                "deleted. Send the earlier items in 'input'.",
                code="previous_response_not_found",
                param="previous_response_id",
            )
        found = await self._decoded(chain) if chain.whole else []
        if not chain.whole or len(found) > conversations.MAX_ITEMS:
            raise InvalidRequest(
                f"The response continues more than {MAX_CHAIN:,} responses, {conversations.MAX_ITEMS:,} items, or {MAX_CHAIN_BYTES:,} "
                "bytes of inputs and outputs. Begin a new chain.",
                code="chain_too_large",
                param="previous_response_id",
            )
        return found

    async def items_of(self, tenant_id: str, ids: Collection[str]) -> dict[str, Item]:
        """Return those of the stored items that this tenant has, by their ids: items of conversations, and inputs and outputs of responses.

        Raises InvalidRequest for too many ids or too large items, OverLimit and Unavailable.
        """
        wanted = {item_id for item_id in ids if is_id(item_id)}
        if len(wanted) > MAX_REFERENCES:
            raise InvalidRequest(f"A request refers to at most {MAX_REFERENCES:,} items.", code="out_of_range", param="input")
        if not wanted:
            return {}
        return await self.read(tenant_id, lambda: self._referred(tenant_id, wanted))

    async def _referred(self, tenant_id: str, wanted: Collection[str]) -> dict[str, Item]:
        bodies = {item.id: item.body for item in await conversations.find_items(self._db, tenant_id, wanted)}
        responses = {response_of(item_id) for item_id in wanted if item_id not in bodies}
        exchanges = await find_exchanges(self._db, tenant_id, responses) if responses else []

        def found() -> dict[str, Item]:
            items = [body for exchange in exchanges for body in response_items(exchange)]
            known = [(_ID.decode(body).id, body) for body in items]
            every = (*bodies.items(), *known)
            return {item_id: _ITEM.decode(body) for item_id, body in every if item_id in wanted}

        return await self._turns.apart(found, is_large=_size(bodies.values(), exchanges) > BYTES_IN_PLACE)

    async def _decoded(self, chain: Chain) -> list[Item]:
        """Return the items of a chain, oldest first. Other requests run meanwhile."""

        def decoded() -> list[Item]:
            bodies = [*chain.items, *(body for exchange in chain.responses for body in response_items(exchange))]
            return [_ITEM.decode(body) for body in bodies]

        return await self._turns.apart(decoded, is_large=_size(chain.items, chain.responses) > BYTES_IN_PLACE)

    async def store(self, tenant_id: str, response: NewResponse) -> None:
        """Store a response, and add its items to its conversation if it has one. Waits for Postgres, but not for long."""
        if self._writer is None:
            raise RuntimeError("this process has no writer of responses")
        row, items = rows_of(response)
        await self._writer.store(tenant_id, Turn(row, response.conversation_id, items))


def rows_of(response: NewResponse) -> tuple[Response, Sequence[conversations.Item]]:
    """Return a response in the form in which it is stored, and the items that it appends to its conversation."""
    row = response_row(response.id, msgspec.json.encode(response.input_items), response.body, response.previous_response_id)
    return row, () if response.conversation_id is None else turn_items(row)


def response_row(response_id: str, own_input: bytes, body: bytes, previous_id: str | None) -> Response:
    """Return a response in the form in which it is stored. `own_input` and `body` are JSON."""
    output = bytes(_OUTPUT.decode(body).output)
    # Any place with these bytes will do.
    return Response(response_id, own_input, body, previous_id, body.find(output), len(output))


def turn_items(row: Response) -> Sequence[conversations.Item]:
    """Return the items of a response's input and output in the form in which conversations store them."""
    output = row.body[row.output_start : row.output_start + row.output_bytes]
    return [conversations.Item(_ID.decode(body).id, bytes(body)) for body in (*_ITEMS.decode(row.input), *_ITEMS.decode(output))]


def stored_items(items: Iterable[Item]) -> Sequence[conversations.Item]:
    """Return items that have ids in the form in which conversations store them."""
    return [conversations.Item(item["id"], msgspec.json.encode(item)) for item in items]


def input_of(stored_input: bytes) -> list[tuple[str, msgspec.Raw]]:
    """Return a response's own input items with their ids, as JSON."""
    return [(_ID.decode(body).id, body) for body in _ITEMS.decode(stored_input)]


def response_items(exchange: Exchange) -> list[msgspec.Raw]:
    """Return the items of a response's input and output, as JSON."""
    return _ITEMS.decode(exchange.input) + _ITEMS.decode(exchange.output)


def _size(items: Iterable[bytes], exchanges: Iterable[Exchange]) -> int:
    return sum(map(len, items)) + sum(len(each.input) + len(each.output) for each in exchanges)


def _no_conversation(conversation_id: str) -> NotFound:
    return NotFound(
        f"The conversation '{conversation_id[:MAX_ID]}' does not exist: it was never created, or has expired or been deleted.",
        code="conversation_not_found",
        param="conversation",
    )
