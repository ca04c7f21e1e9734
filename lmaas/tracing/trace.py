"""The spans of one request, which are gathered while it is served and sent when it has ended."""

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from lmaas.tracing.context import TraceContext

Attribute = str | int | float | bool
Attributes = Mapping[str, Attribute]


class Kind(StrEnum):
    """The kinds of spans, by OpenTelemetry's names."""

    SERVER = "SERVER"
    CLIENT = "CLIENT"
    CONSUMER = "CONSUMER"
    INTERNAL = "INTERNAL"


@dataclass(frozen=True, slots=True)
class Span:
    """A span that has ended. Times are nanoseconds since 1970, ids are hexadecimal. `error` is an error code, or empty."""

    name: str
    kind: Kind
    trace_id: str
    span_id: str
    #: Empty for the first span of a trace.
    parent_id: str
    start_ns: int
    end_ns: int
    attributes: Attributes
    error: str = ""
    #: Points in time within the span.
    events: tuple[tuple[str, int], ...] = ()


@dataclass(slots=True)
class _Stage:
    name: str
    kind: Kind
    span_id: str
    start_ns: int
    attributes: dict[str, Attribute]
    events: list[tuple[str, int]]


class Trace:
    """The trace of a request, which a client may have begun.

    A request goes through stages one after the other, such as `admission` and `queue`. Each becomes a span below that of the request. The
    first one begins with the request.
    """

    __slots__ = ("_context", "_offset_ns", "_root_id", "_spans", "_stage")

    def __init__(self, context: TraceContext, stage: str) -> None:
        self._context, self._root_id = context, _new_span_id()
        self._offset_ns = time.time_ns() - time.monotonic_ns()
        self._spans: list[Span] = []
        self._stage = _Stage(stage, Kind.INTERNAL, _new_span_id(), self._now(), {}, [])

    @property
    def trace_id(self) -> str:
        """The id of the trace."""
        return self._context.trace_id

    def enter(
        self, stage: str, attributes: Attributes | None = None, *, kind: Kind = Kind.INTERNAL, began_s: float = 0.0, failed: str = ""
    ) -> None:
        """End the current stage, with the error `failed` if it is given, and begin the next one, `began_s` seconds ago."""
        moment = max(self._stage.start_ns, self._now() - int(began_s * 1e9))
        self._leave(moment, failed)
        self._stage = _Stage(stage, kind, _new_span_id(), moment, dict(attributes or {}), [])

    def mark(self, event: str) -> None:
        """Record a point in time of the current stage."""
        self._stage.events.append((event, self._now()))

    def engine_headers(self) -> dict[str, str]:
        """Return the headers with which an engine continues the trace below the current stage."""
        headers = {"traceparent": f"00-{self._context.trace_id}-{self._stage.span_id}-01"}
        if self._context.state:
            headers["tracestate"] = self._context.state
        return headers

    def end(self, name: str, kind: Kind, took_s: float, attributes: Attributes, error: str = "") -> list[Span]:
        """End the request, which began `took_s` seconds ago, and return the spans: that of the request, and those of its stages."""
        now, context = self._now(), self._context
        began = now - int(took_s * 1e9)
        self._leave(now, error)
        stages = self._spans
        stages[0] = replace(stages[0], start_ns=min(began, stages[0].end_ns))
        return [Span(name, kind, context.trace_id, self._root_id, context.span_id, began, now, attributes, error), *stages]

    def _now(self) -> int:
        return time.monotonic_ns() + self._offset_ns

    def _leave(self, now: int, error: str) -> None:
        stage, trace_id = self._stage, self._context.trace_id
        self._spans.append(
            Span(
                stage.name,
                stage.kind,
                trace_id,
                stage.span_id,
                self._root_id,
                stage.start_ns,
                now,
                stage.attributes,
                error,
                tuple(stage.events),
            )
        )


def only_root(context: TraceContext, name: str, kind: Kind, took_s: float, attributes: Attributes, error: str = "") -> list[Span]:
    """Return the spans of a request without stages, which ends now."""
    now = time.time_ns()
    return [Span(name, kind, context.trace_id, _new_span_id(), context.span_id, now - int(took_s * 1e9), now, attributes, error)]


def _new_span_id() -> str:
    return f"{random.getrandbits(64) or 1:016x}"
