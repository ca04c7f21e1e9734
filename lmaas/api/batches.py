"""Handlers for batches, in OpenAI's shapes."""

import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

import msgspec

from lmaas.admission.tiers import batch_limits
from lmaas.api.context import Api, ApiCall
from lmaas.api.operation import page_of
from lmaas.api.shapes.batches import (
    Batch,
    BatchCounts,
    BatchError,
    BatchErrors,
    BatchInputTokens,
    BatchOutputTokens,
    BatchPaging,
    BatchUsage,
    NewBatch,
)
from lmaas.api.shapes.common import Page
from lmaas.batches.dialects import FORMS, WINDOW_S
from lmaas.errors import InvalidRequest, NotFound
from lmaas.files.service import Purpose
from lmaas.protocols.responses.parameters import metadata as read_metadata
from lmaas.states import Dialect
from lmaas.store import batches as rows
from lmaas.store.database import new_id
from lmaas.store.paging import Part

_FORM = FORMS[Dialect.OPENAI]
_ID = re.compile(r"batch_[0-9a-f]{20}")
_ERRORS = msgspec.json.Decoder(list[BatchError])


def _shown(row: rows.Batch, call: ApiCall[Any, Any]) -> Batch:
    """Return a batch as its tenant sees it; for an operator without the texts that are the tenant's."""
    is_own = call.principal.tenant_id is not None
    tokens = row.prompt_tokens + row.completion_tokens
    return Batch(
        id=row.id,
        endpoint=row.endpoint,
        errors=None if row.errors is None or not is_own else BatchErrors(data=_ERRORS.decode(row.errors)),
        input_file_id=row.input_file_id or "",
        completion_window=row.completion_window,
        status=row.status,  # type: ignore[arg-type]  # the column has one of these
        output_file_id=row.output_file_id,
        error_file_id=row.error_file_id,
        created_at=int(row.created_at.timestamp()),
        in_progress_at=_seconds(row.in_progress_at),
        expires_at=int(row.expires_at.timestamp()),
        finalizing_at=_seconds(row.finalizing_at),
        completed_at=_seconds(row.completed_at),
        failed_at=_seconds(row.failed_at),
        expired_at=_seconds(row.expired_at),
        cancelling_at=_seconds(row.cancelling_at),
        cancelled_at=_seconds(row.cancelled_at),
        request_counts=BatchCounts(total=row.total, completed=row.completed, failed=row.without_response),
        usage=BatchUsage(
            input_tokens=row.prompt_tokens,
            input_tokens_details=BatchInputTokens(cached_tokens=row.cached_tokens),
            output_tokens=row.completion_tokens,
            output_tokens_details=BatchOutputTokens(reasoning_tokens=0),
            total_tokens=tokens,
        ),
        metadata=msgspec.json.decode(row.metadata) if is_own else {},
    )


def _seconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())


def _id(path: Mapping[str, str]) -> str:
    """Return the batch's id. Raises NotFound for what cannot be one."""
    if _ID.fullmatch(path["batch"]) is None:
        raise rows.batch_not_found()
    return path["batch"]


async def create_batch(api: Api, call: ApiCall[NewBatch, None]) -> Batch:
    """Create a batch for an input file, which a job runner validates."""
    asked = call.body
    try:
        file = await api.files.get(call.tenant_id, asked.input_file_id)
    except NotFound as error:
        raise NotFound(error.message, code=error.error_code, param="input_file_id") from None
    if file.purpose != Purpose.BATCH:
        raise InvalidRequest(
            f"The file '{file.id}' has the purpose '{file.purpose}'. Upload the requests with the purpose 'batch'.",
            code="invalid_file_purpose",
            param="input_file_id",
        )
    expiry = asked.output_expires_after
    new = rows.NewBatch(
        id=new_id(_FORM.id_prefix),
        dialect=Dialect.OPENAI,
        endpoint=asked.endpoint,
        key_id=call.principal.key_id,
        input_file_id=file.id,
        completion_window=asked.completion_window,
        metadata=msgspec.json.encode(read_metadata("metadata", asked.metadata or {})),
        output_expires_after_s=_FORM.results_expire_after_s if expiry is None else expiry.seconds,
        expires_after=timedelta(seconds=WINDOW_S),
    )
    async with api.db.begin(call.tenant_id) as connection:
        limits = batch_limits(call.principal.tier)
        return _shown(await rows.create_batch(connection, call.tenant_id, new, limits, audit=call.audit), call)


async def get_batch(api: Api, call: ApiCall[None, None]) -> Batch:
    """Return a batch."""
    return _shown(await rows.get_batch(api.db, call.tenant_id, _id(call.path), Dialect.OPENAI), call)


async def list_batches(api: Api, call: ApiCall[None, BatchPaging]) -> Page[Batch]:
    """Return a page of the batches, the newest first."""
    asked = call.query
    found = await rows.list_batches(api.db, call.tenant_id, Dialect.OPENAI, Part(asked.limit, asked.after))
    return page_of([_shown(row, call) for row in found], [row.id for row in found], asked.limit)


async def cancel_batch(api: Api, call: ApiCall[None, None]) -> Batch:
    """Begin to cancel a batch."""
    return _shown(await rows.cancel_batch(api.db, call.tenant_id, _id(call.path), Dialect.OPENAI, audit=call.audit), call)
