"""The traces of requests: one for each, across the gateway, the queue and the engine.

Attributes follow OpenTelemetry's conventions for HTTP and for generative AI. They have no text of a prompt or an answer, and name a model
only if it exists.
"""

from collections.abc import Callable, Iterable

from starlette.types import Scope

from lmaas.http import CODE, MAX_SHOWN_PATH, PRINCIPAL, QUIET, ROUTE
from lmaas.inference.catalog import ServedModel
from lmaas.inference.protocol import INFERENCE, AnyInference
from lmaas.metering.usage import UsageRecord
from lmaas.states import UsageStatus
from lmaas.tracing.context import TraceContext, own, received
from lmaas.tracing.trace import Attribute, Kind, Span, Trace, only_root
from lmaas.types import Principal

#: The operations of generative AI by a protocol's path. Others have the last part of their path.
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
#: Names of what is no request of a client, by the action in the request log.
JOBS = {"batch_line": ("batch line", "lmaas.batch.id"), "background": ("background response", "lmaas.response.id")}
_FAILED = frozenset({UsageStatus.FAILED, UsageStatus.EXPIRED})


class RequestTraces:
    """Begins traces and ends them. `write` gets the spans of each that is sampled, which the share `ratio` of them is."""

    def __init__(self, write: Callable[[list[Span]], None], ratio: float) -> None:
        self._write, self._ratio = write, ratio

    def begin(self, inference: AnyInference, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Begin the trace of an inference, or continue that of its client, if it is sampled."""
        context = received(headers) or own(inference.request_id, self._ratio)
        if context.sampled:
            inference.trace = Trace(context, "admission")

    def ended(self, scope: Scope, status: int, took_s: float) -> None:
        """End the trace of a client's request."""
        inference: AnyInference | None = scope.get(INFERENCE)
        path: str = scope["path"]
        if inference is None and path in QUIET and 0 < status < 400:
            return
        trace = None if inference is None else inference.trace
        context: TraceContext | None = None
        if trace is None:
            # The decision is the same as at the beginning.
            context = received(scope["headers"]) or own(scope["request_id"], self._ratio)
            if not context.sampled:
                return
        code: str | None = scope.get(CODE)
        attributes = _whose(scope.get(PRINCIPAL), scope["request_id"])
        method, route = scope["method"], path if inference is not None else scope.get(ROUTE)
        if method is not None:
            attributes["http.request.method"] = method
        attributes["url.path"] = path[:MAX_SHOWN_PATH]
        if route is not None:
            attributes["http.route"] = route
        if status:
            attributes["http.response.status_code"] = status
        error = _described(attributes, inference, code)
        if not error and status >= 500:
            error = code or str(status)
        name = " ".join(filter(None, (method, route))) or "HTTP"
        if trace is not None:
            self._write(trace.end(name, Kind.SERVER, took_s, attributes, error))
        elif context is not None:
            self._write(only_root(context, name, Kind.SERVER, took_s, attributes, error))

    def attempt_ended(
        self, action: str, principal: Principal, inference: AnyInference, belongs_to: str, code: str | None, took_s: float
    ) -> None:
        """End the trace of an attempt of a job runner. The arguments are those of `RequestLog.attempt`."""
        if inference.trace is None:
            return
        name, owner = JOBS[action]
        attributes = _whose(principal, inference.request_id)
        attributes[owner] = belongs_to
        error = _described(attributes, inference, code) or code or ""
        self._write(inference.trace.end(name, Kind.CONSUMER, took_s, attributes, error))


def _whose(principal: Principal | None, request_id: str) -> dict[str, Attribute]:
    found: dict[str, Attribute] = {"lmaas.request.id": request_id}
    if principal is not None:
        found["lmaas.key.id"] = principal.key_id
        if principal.tenant_id is not None:
            found["lmaas.tenant.id"] = principal.tenant_id
    return found


def _described(attributes: dict[str, Attribute], inference: AnyInference | None, code: str | None) -> str:
    """Add what is known of an inference. Returns the error with which it failed after it was accepted, or an empty string."""
    if code is not None:
        attributes["error.type"] = code
    if inference is None:
        return ""
    attributes |= {
        "gen_ai.operation.name": operation(inference.protocol.path),
        "gen_ai.provider.name": "lmaas",
        "gen_ai.request.stream": inference.request.stream,
    }
    model: ServedModel | None = getattr(inference, "model", None)
    if model is not None:
        attributes |= {"gen_ai.request.model": inference.request.model, "gen_ai.response.model": model.shown}
    record: UsageRecord | None = getattr(inference, "record", None)
    if record is None or code is not None:
        return ""
    attributes |= {
        "lmaas.outcome": record.status,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
    }
    if record.replica_id is not None:
        attributes["lmaas.replica.id"] = record.replica_id
    if inference.first_s is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = inference.first_s
    if record.code is not None:
        attributes["error.type"] = record.code
    return record.code or record.status if record.status in _FAILED else ""


def operation(path: str) -> str:
    """Return the operation of generative AI of a protocol's path."""
    return OPERATIONS.get(path) or path.rpartition("/")[2]
