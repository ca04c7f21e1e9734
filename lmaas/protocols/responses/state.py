"""The stored responses and conversations of tenants, as the protocol needs them."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

#: An item of an input or an output, as a client receives it: an object with a `type` and an `id`.
Item = dict[str, Any]


@dataclass(frozen=True, slots=True)
class NewResponse:
    """A response that is to be stored.

    `body` is the response object as JSON. `input_items` are the request's own items, not those that it continues. Every item has an id that
    no other item of the tenant has. `previous_response_id` and `conversation_id` are never both given.
    """

    id: str
    body: bytes
    input_items: list[Item]
    previous_response_id: str | None
    conversation_id: str | None


class State(Protocol):
    """The stored responses and conversations. The items of another tenant do not exist for a tenant."""

    async def context_of(self, tenant_id: str, *, previous_response_id: str | None, conversation_id: str | None) -> list[Item]:
        """Return the items before a request's own, oldest first: those of a chain of responses with their outputs, or of a conversation.

        Exactly one of the two ids is given. Raises NotFound with the request's field in `param` if this tenant does not have it.
        """

    async def items_of(self, tenant_id: str, ids: Collection[str]) -> dict[str, Item]:
        """Return those of the stored items that this tenant has, by their ids."""

    async def store(self, tenant_id: str, response: NewResponse) -> None:
        """Store a response, and add its items to its conversation if it has one."""
