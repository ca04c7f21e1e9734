"""Handlers for message batches, in Anthropic's shapes."""

import contextlib
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.requests import Request
from starlette.responses import Response

from lmaas.admission.tiers import batch_limits
from lmaas.api.context import Api, ApiCall
from lmaas.api.files import download
from lmaas.api.shapes.batches import (
    DeletedMessageBatch,
    MessageBatch,
    MessageBatchCounts,
    MessageBatches,
    MessageBatchPaging,
    NewMessageBatch,
)
from lmaas.api.uploads import announced_bytes
from lmaas.batches.dialects import FORMS, WINDOW, WINDOW_S
from lmaas.batches.lines import MESSAGES
from lmaas.batches.message_requests import RequestReader, request_lines
from lmaas.errors import InvalidRequest, NotFound
from lmaas.files.service import Purpose, Written
from lmaas.http import limited
from lmaas.states import BatchStatus, Dialect
from lmaas.store import batches as rows
from lmaas.store.database import new_id
from lmaas.store.files import File
from lmaas.store.paging import Part

_FORM = FORMS[Dialect.ANTHROPIC]
_ID = re.compile(r"msgbatch_[0-9a-f]{20}")
#: The largest body that creates a batch.
MAX_BODY_BYTES = _FORM.file_bytes
#: The bytes that a body may have besides its requests. Any more count for the tenant's quota before the body is read.
_MAX_SPACE = 1024 * 1024
JSON_LINES = "application/x-jsonl"


def _shown(call: ApiCall[Any, Any], row: rows.Batch) -> MessageBatch:
    ended = row.ended_at
    is_failed = row.status == BatchStatus.FAILED
    left = row.total - row.completed - row.without_response
    counts = MessageBatchCounts(processing=row.total, succeeded=0, errored=0, canceled=0, expired=0)
    archived = None
    if ended is not None:
        counts = MessageBatchCounts(
            processing=0,
            succeeded=row.completed,
            errored=row.failed + left,
            canceled=row.cancelled,
            expired=row.expired,
        )
        archived = ended + timedelta(seconds=_FORM.results_expire_after_s)
    is_archived = is_failed or (archived is not None and archived <= datetime.now(UTC))
    status = "ended" if ended is not None else "canceling" if row.status == BatchStatus.CANCELLING else "in_progress"
    return MessageBatch(
        id=row.id,
        processing_status=status,  # type: ignore[arg-type]  # one of these
        request_counts=counts,
        created_at=_moment(row.created_at),
        expires_at=_moment(row.expires_at),
        ended_at=None if ended is None else _moment(ended),
        cancel_initiated_at=None if row.cancelling_at is None else _moment(row.cancelling_at),
        archived_at=_moment(archived) if archived is not None and is_archived else None,
        results_url=None if ended is None or is_archived else f"{_base_url(call.request)}/v1/messages/batches/{row.id}/results",
    )


def _moment(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _base_url(request: Request) -> str:
    """Return the address by which the client called this service. A proxy that ends TLS names the scheme in `X-Forwarded-Proto`."""
    scheme = "https" if request.headers.get("x-forwarded-proto") == "https" else request.url.scheme
    return f"{scheme}://{request.url.netloc}"


def _id(path: Mapping[str, str]) -> str:
    """Return the batch's id. Raises NotFound for what cannot be one."""
    if _ID.fullmatch(path["batch"]) is None:
        raise rows.batch_not_found()
    return path["batch"]


async def create_message_batch(api: Api, call: ApiCall[NewMessageBatch, None]) -> MessageBatch:
    """Create a batch. Its requests stream into an input file of the tenant, which is added together with the batch."""
    limits = batch_limits(call.principal.tier)
    # A batch that the limits do not allow is refused before its requests are read.
    await rows.check_limits(api.db, call.tenant_id, limits)
    await api.files.check_room(call.tenant_id, max(announced_bytes(call.request) - _MAX_SPACE, 0))
    reader = RequestReader(api.settings.max_body_bytes, _FORM.lines)
    new_batch_id = new_id(_FORM.id_prefix)
    created: list[rows.Batch] = []

    async def create(connection: AsyncConnection, files: Sequence[File]) -> None:
        new = rows.NewBatch(
            id=new_batch_id,
            dialect=Dialect.ANTHROPIC,
            endpoint=MESSAGES,
            key_id=call.principal.key_id,
            input_file_id=files[0].id,
            completion_window=WINDOW,
            metadata=b"{}",
            output_expires_after_s=_FORM.results_expire_after_s,
            expires_after=timedelta(seconds=WINDOW_S),
            total=reader.count,
        )
        created.append(await rows.create_batch(connection, call.tenant_id, new, limits, audit=call.audit))

    body = Request(call.request.scope, limited(call.request.receive, call.request.scope, MAX_BODY_BYTES))
    async with api.files.uploading(call.tenant_id) as draft:
        async for lines in request_lines(body.stream(), reader):
            await draft.write(lines)
        written = Written(Purpose.BATCH, f"{new_batch_id}_input.jsonl", draft, _FORM.results_expire_after_s)
        await api.files.upload(call.tenant_id, written, within=create)
    return _shown(call, created[-1])


async def get_message_batch(api: Api, call: ApiCall[None, None]) -> MessageBatch:
    """Return a batch."""
    return _shown(call, await rows.get_batch(api.db, call.tenant_id, _id(call.path), Dialect.ANTHROPIC))


async def list_message_batches(api: Api, call: ApiCall[None, MessageBatchPaging]) -> MessageBatches:
    """Return a page of the batches, the newest first."""
    asked = call.query
    if asked.after_id is not None and asked.before_id is not None:
        raise InvalidRequest("Send 'after_id' or 'before_id', not both.", code="invalid_cursor", param="before_id")
    # A page before a batch has those that are next to it, so it is read backwards.
    backwards = asked.before_id is not None
    part = Part(asked.limit, asked.before_id or asked.after_id)
    try:
        found = await rows.list_batches(api.db, call.tenant_id, Dialect.ANTHROPIC, part, newest_first=not backwards)
    except InvalidRequest as error:
        name = "before_id" if backwards else "after_id"
        raise InvalidRequest(f"'{name}' must be the id of a message batch.", code=error.error_code, param=name) from None
    page = found[: asked.limit]
    if backwards:
        page.reverse()
    return MessageBatches(
        data=[_shown(call, row) for row in page],
        has_more=len(found) > asked.limit,
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
    )


async def cancel_message_batch(api: Api, call: ApiCall[None, None]) -> MessageBatch:
    """Begin to cancel a batch."""
    return _shown(call, await rows.cancel_batch(api.db, call.tenant_id, _id(call.path), Dialect.ANTHROPIC, audit=call.audit))


async def delete_message_batch(api: Api, call: ApiCall[None, None]) -> DeletedMessageBatch:
    """Delete a batch that has ended, with its requests and results."""
    batch = await rows.delete_batch(api.db, call.tenant_id, _id(call.path), Dialect.ANTHROPIC, audit=call.audit)
    for file_id in (batch.input_file_id, batch.output_file_id):
        if file_id is not None:
            # It may have expired, or have been deleted as a file.
            with contextlib.suppress(NotFound):
                await api.files.delete(call.tenant_id, file_id)
    return DeletedMessageBatch(id=batch.id)


async def message_batch_results(api: Api, call: ApiCall[None, None]) -> Response:
    """Stream the results of a batch, one line for each request."""
    batch = await rows.get_batch(api.db, call.tenant_id, _id(call.path), Dialect.ANTHROPIC)
    if batch.ended_at is None:
        raise NotFound("The batch has not ended, so it has no results yet.", code="batch_not_ended")
    if batch.output_file_id is None:
        raise NotFound("The batch has no results.", code="results_not_found")
    try:
        file = await api.files.get(call.tenant_id, batch.output_file_id)
        return await download(api, call, file, JSON_LINES, {})
    except NotFound:
        raise NotFound("The results were deleted, or have expired.", code="results_not_found") from None
