"""Stored responses and conversations, in OpenAI's shapes."""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from lmaas.api.shapes.common import Query, Shape

MAX_NEW_ITEMS = 20
#: The most events that a response has.
MAX_NUMBER = 2**31 - 2

Items = Annotated[list[Any], Meta(max_length=MAX_NEW_ITEMS, description="Items as in the `input` of a response.")]
Metadata = Annotated[dict[str, Any], Meta(description="At most 16 pairs, with keys of 64 and values of 512 characters.")]


class Response(Struct, frozen=True, kw_only=True):
    """A response object. The document describes it with the protocol."""

    id: str


class ResponseItem(Struct, frozen=True, kw_only=True):
    """An item of an input or an output. The document describes it with the protocol."""

    id: str


class ResponseQuery(Query, frozen=True, kw_only=True):
    """The form in which a response is requested."""

    stream: Annotated[bool, Meta(description="Whether to stream the events of a response in the background that was created so.")] = False
    starting_after: (
        Annotated[int, Meta(ge=0, le=MAX_NUMBER, description="With `stream`: the number of the last event received.")] | None
    ) = None


class ItemPaging(Query, frozen=True, kw_only=True):
    """The requested part of a list of items."""

    limit: Annotated[int, Meta(ge=1, le=100, description="Items of this page, at most.")] = 20
    after: Annotated[str, Meta(max_length=200, description="The id of an item: the page begins after it.")] | None = None
    order: Annotated[Literal["asc", "desc"], Meta(description="`asc`: oldest first. `desc`: newest first.")] = "desc"


class DeletedResponse(Shape, tag_field="object", tag="response", frozen=True, kw_only=True):
    """A deleted response."""

    id: str
    deleted: bool


class NewConversation(Shape, frozen=True, kw_only=True):
    """A conversation to create. Null is as if not given."""

    items: Items | None = None
    metadata: Metadata | None = None


class ConversationChange(Shape, frozen=True, kw_only=True):
    """Metadata that replace the earlier ones. Null removes them."""

    metadata: Metadata | None


class NewItems(Shape, frozen=True, kw_only=True):
    """Items to append."""

    items: Items


class Conversation(Shape, tag_field="object", tag="conversation", frozen=True, kw_only=True):
    """A conversation without its items. `created_at` is in Unix seconds."""

    id: str
    created_at: int
    metadata: dict[str, str]


class DeletedConversation(Shape, tag_field="object", tag="conversation.deleted", frozen=True, kw_only=True):
    """A conversation that was deleted with its items."""

    id: str
    deleted: bool
