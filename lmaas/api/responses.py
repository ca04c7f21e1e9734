"""Handlers for stored responses."""

from typing import Any

import msgspec

from lmaas.api.context import Api, ApiCall
from lmaas.api.operation import page_of
from lmaas.api.shapes.common import Page
from lmaas.api.shapes.responses import DeletedResponse, ItemPaging, ResponseItem, ResponseQuery
from lmaas.errors import InvalidRequest, NotFound
from lmaas.protocols.responses.stored import input_of, is_id
from lmaas.store import responses as rows


async def _response(api: Api, call: ApiCall[Any, Any]) -> rows.Response:
    response_id = call.path["response"]
    if not is_id(response_id):
        raise _not_found()
    found = await api.state.read(call.tenant_id, lambda: rows.find_response(api.db, call.tenant_id, response_id))
    if found is None:
        raise _not_found()
    return found


def _not_found() -> NotFound:
    return NotFound("The response does not exist: it was not stored, has expired, or was deleted.", code="response_not_found")


async def get_response(api: Api, call: ApiCall[None, ResponseQuery]) -> msgspec.Raw:
    """Return a response object as it was stored."""
    if call.query.stream:
        raise InvalidRequest(
            "The events of a response are not stored, so it cannot be streamed again. Retrieve it without 'stream'.",
            code="unsupported_parameter",
            param="stream",
        )
    return msgspec.Raw((await _response(api, call)).body)


async def delete_response(api: Api, call: ApiCall[None, None]) -> DeletedResponse:
    """Delete a response with its input."""
    response_id = call.path["response"]
    if not is_id(response_id) or not await rows.delete_response(api.db, call.tenant_id, response_id):
        raise _not_found()
    return DeletedResponse(id=response_id, deleted=True)


async def cancel_response(api: Api, call: ApiCall[None, None]) -> msgspec.Raw:
    """Refuse to cancel a response: it is stored, so it has ended."""
    await _response(api, call)
    raise InvalidRequest("Cannot cancel a synchronous response.", code="not_cancellable")


async def list_input_items(api: Api, call: ApiCall[None, ItemPaging]) -> Page[ResponseItem]:
    """Return a page of a response's own input items."""
    asked = call.query
    items = input_of(await _response(api, call))
    if asked.order == "desc":
        items.reverse()
    if asked.after is not None:
        places = [place for place, (item_id, _) in enumerate(items) if item_id == asked.after]
        if not places:
            raise InvalidRequest("'after' must be the id of an item of this list.", code="invalid_cursor", param="after")
        items = items[places[0] + 1 :]
    return page_of([body for _, body in items[: asked.limit + 1]], [item_id for item_id, _ in items], asked.limit)
