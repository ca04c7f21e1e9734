"""Handlers for responses: those that are stored, and those that run in the background."""

from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.responses import Response, StreamingResponse

from lmaas.api.context import Api, ApiCall
from lmaas.api.operation import page_of
from lmaas.api.shapes.common import Page
from lmaas.api.shapes.responses import DeletedResponse, ItemPaging, ResponseItem, ResponseQuery
from lmaas.errors import InvalidRequest, NotFound
from lmaas.inference.sink import STREAM_HEADERS
from lmaas.protocols.responses.background import with_status
from lmaas.protocols.responses.stored import input_of, is_id, response_row
from lmaas.states import BackgroundStatus
from lmaas.store import background
from lmaas.store.responses import find_response


@dataclass(frozen=True, slots=True)
class _Found:
    """A response as its tenant sees it now: its own input and its object, as JSON."""

    input: bytes
    body: bytes


class _Kind(msgspec.Struct):
    """The fields of a response object that cancelling it needs."""

    background: bool


async def _response(api: Api, call: ApiCall[Any, Any]) -> _Found:
    response_id, tenant_id = call.path["response"], call.tenant_id

    async def found() -> _Found | None:
        stored = await find_response(api.db, tenant_id, response_id)
        if stored is None:
            unfinished = await background.find_open(api.db, tenant_id, response_id)
            if unfinished is not None:
                return _Found(unfinished.input, with_status(unfinished.body, unfinished.status))
            # It may have ended between the two readings.
            stored = await find_response(api.db, tenant_id, response_id)
        return None if stored is None else _Found(stored.input, stored.body)

    response = await api.state.read(tenant_id, found) if is_id(response_id) else None
    if response is None:
        raise _not_found()
    return response


def _not_found() -> NotFound:
    return NotFound("The response does not exist: it was not stored, has expired, or was deleted.", code="response_not_found")


async def get_response(api: Api, call: ApiCall[None, ResponseQuery]) -> msgspec.Raw | Response:
    """Return a response object as it is now, or the events of a response in the background."""
    asked = call.query
    if asked.stream:
        return await _events(api, call, asked.starting_after)
    if asked.starting_after is not None:
        raise InvalidRequest("'starting_after' needs 'stream=true'. Send both, or none.", param="starting_after")
    return msgspec.Raw((await _response(api, call)).body)


async def _events(api: Api, call: ApiCall[Any, Any], after: int | None) -> Response:
    response_id = call.path["response"]
    try:
        if is_id(response_id):
            events = await api.logs.follow(call.tenant_id, response_id, after)
            # A response to HEAD has no body.
            is_head = call.request.method == "HEAD"
            return Response(headers=STREAM_HEADERS) if is_head else StreamingResponse(events, headers=STREAM_HEADERS)
    except NotFound:
        pass
    await _response(api, call)
    raise InvalidRequest(
        "The events of this response are not kept: it was not created with 'background' and 'stream', or it ended more than 10 minutes "
        "ago. Retrieve it without 'stream'.",
        code="events_not_kept",
        param="stream",
    )


async def delete_response(api: Api, call: ApiCall[None, None]) -> DeletedResponse:
    """Delete a response with its input. One that runs in the background ends."""
    response_id = call.path["response"]
    if not is_id(response_id) or not await background.delete_response(api.db, call.tenant_id, response_id):
        raise _not_found()
    return DeletedResponse(id=response_id, deleted=True)


async def cancel_response(api: Api, call: ApiCall[None, None]) -> msgspec.Raw:
    """Cancel a response in the background, and return it. One that has ended stays as it is."""
    response_id, tenant_id = call.path["response"], call.tenant_id
    unfinished = await background.find_open(api.db, tenant_id, response_id) if is_id(response_id) else None
    if unfinished is not None:
        body = with_status(unfinished.body, BackgroundStatus.CANCELLED)
        row = response_row(response_id, unfinished.input, body, unfinished.previous_id)
        if await background.cancel(api.db, tenant_id, row, api.kept_for):
            return msgspec.Raw(body)
    # It may have ended meanwhile.
    body = (await _response(api, call)).body
    if not msgspec.json.decode(body, type=_Kind).background:
        raise InvalidRequest(
            "Cannot cancel a synchronous response. It has ended; to stop one that runs, close its connection.", code="not_cancellable"
        )
    return msgspec.Raw(body)


async def list_input_items(api: Api, call: ApiCall[None, ItemPaging]) -> Page[ResponseItem]:
    """Return a page of a response's own input items."""
    asked = call.query
    items = input_of((await _response(api, call)).input)
    if asked.order == "desc":
        items.reverse()
    if asked.after is not None:
        places = [place for place, (item_id, _) in enumerate(items) if item_id == asked.after]
        if not places:
            raise InvalidRequest("'after' must be the id of an item of this list.", code="invalid_cursor", param="after")
        items = items[places[0] + 1 :]
    return page_of([body for _, body in items[: asked.limit + 1]], [item_id for item_id, _ in items], asked.limit)
