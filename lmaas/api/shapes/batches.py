"""Batches, in OpenAI's shapes and in Anthropic's."""

from typing import Annotated, Any, Literal

from msgspec import Meta

from lmaas.api.shapes.common import MAX_PAGE, Paging, Query, Shape
from lmaas.api.shapes.responses import Metadata

#: The bounds of the time for which result files are kept, in seconds.
MIN_KEPT_S, MAX_KEPT_S = 3_600, 2_592_000
MAX_ID = 200

FileId = Annotated[str, Meta(max_length=MAX_ID, description="The id of a file with the purpose `batch`: JSON Lines, one request each.")]
Endpoint = Annotated[
    Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"],
    Meta(description="The endpoint of every line.", extra={"code": "invalid_endpoint"}),
]
Window = Annotated[Literal["24h"], Meta(description="The time in which the batch has to end.", extra={"code": "invalid_completion_window"})]


class BatchPaging(Paging, frozen=True, kw_only=True):
    """The requested part of a list of batches."""

    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE, description="Batches of this page, at most.")] = 20


class OutputExpiry(Shape, frozen=True, kw_only=True):
    """The time for which the result files are kept, from their creation."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Meta(ge=MIN_KEPT_S, le=MAX_KEPT_S)]


class NewBatch(Shape, frozen=True, kw_only=True):
    """A batch to create. Null is as if not given; without `output_expires_after`, result files are kept for 30 days."""

    input_file_id: FileId
    endpoint: Endpoint
    completion_window: Window
    metadata: Metadata | None = None
    output_expires_after: OutputExpiry | None = None


class BatchError(Shape, frozen=True, kw_only=True):
    """A fault of an input file. `line` counts from 1; null is about the whole file."""

    code: str
    message: str
    line: int | None
    param: str | None


class BatchErrors(Shape, tag_field="object", tag="list", frozen=True, kw_only=True):
    """The faults of an input file, at most 100."""

    data: list[BatchError]


class BatchCounts(Shape, frozen=True, kw_only=True):
    """The requests of a batch. `failed` are those of the error file."""

    total: int
    completed: int
    failed: int


class BatchInputTokens(Shape, frozen=True, kw_only=True):
    """The input tokens by kind."""

    cached_tokens: int


class BatchOutputTokens(Shape, frozen=True, kw_only=True):
    """The output tokens by kind. Reasoning is not counted separately."""

    reasoning_tokens: int


class BatchUsage(Shape, frozen=True, kw_only=True):
    """The tokens of the requests that have ended."""

    input_tokens: int
    input_tokens_details: BatchInputTokens
    output_tokens: int
    output_tokens_details: BatchOutputTokens
    total_tokens: int


class Batch(Shape, tag_field="object", tag="batch", frozen=True, kw_only=True):
    """A batch. Times are in Unix seconds, null for what has not happened."""

    id: str
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: BatchCounts
    usage: BatchUsage
    metadata: dict[str, str]


class MessageBatchPaging(Query, frozen=True, kw_only=True):
    """The requested part of a list of message batches. The list begins with the newest."""

    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE, description="Batches of this page, at most.")] = 20
    after_id: Annotated[str, Meta(max_length=MAX_ID, description="The page begins after this batch.")] | None = None
    before_id: Annotated[str, Meta(max_length=MAX_ID, description="The page ends before this batch.")] | None = None


class MessageRequest(Shape, frozen=True, kw_only=True):
    """A request of a message batch."""

    custom_id: Annotated[str, Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    params: Annotated[dict[str, Any], Meta(description="The body of a request to /v1/messages, without a stream.")]


class NewMessageBatch(Shape, frozen=True, kw_only=True):
    """A message batch to create."""

    requests: Annotated[list[MessageRequest], Meta(min_length=1, max_length=100_000)]


class MessageBatchCounts(Shape, frozen=True, kw_only=True):
    """The requests of a message batch. All are `processing` until the batch has ended."""

    processing: int
    succeeded: int
    errored: int
    canceled: int
    expired: int


class MessageBatch(Shape, tag_field="type", tag="message_batch", frozen=True, kw_only=True):
    """A message batch. Times are in RFC 3339, null for what has not happened."""

    id: str
    processing_status: Literal["in_progress", "canceling", "ended"]
    request_counts: MessageBatchCounts
    created_at: str
    expires_at: str
    ended_at: str | None
    cancel_initiated_at: str | None
    archived_at: str | None
    results_url: str | None


class MessageBatches(Shape, frozen=True, kw_only=True):
    """A page of message batches, the newest first."""

    data: list[MessageBatch]
    has_more: bool
    first_id: str | None
    last_id: str | None


class DeletedMessageBatch(Shape, tag_field="type", tag="message_batch_deleted", frozen=True, kw_only=True):
    """A message batch that was deleted with its results."""

    id: str


class MessageResult(Shape, frozen=True, kw_only=True):
    """A line of the results. `result` has a `type`: `succeeded` with a `message`, `errored` with an `error`, `canceled` or `expired`."""

    custom_id: str
    result: dict[str, Any]
