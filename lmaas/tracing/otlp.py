"""Turns spans into OpenTelemetry's, and exports them. The one module that imports OpenTelemetry."""

import logging
from collections.abc import Callable, Sequence
from importlib.metadata import version

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.status import Status, StatusCode

from lmaas.tracing.trace import Span

_VERSION = version("lmaas")
_SCOPE = InstrumentationScope("lmaas", _VERSION)


def exporter(url: str, service: str, timeout_s: float) -> Callable[[Sequence[Span]], bool]:
    """Return a function that sends spans to a collector, and returns whether it took them."""
    # It logs each failure as an error. The caller reports failures, and less often.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)
    resource = Resource.create({SERVICE_NAME: service, SERVICE_VERSION: _VERSION})
    client = OTLPSpanExporter(endpoint=url, timeout=timeout_s)

    def export(spans: Sequence[Span]) -> bool:
        return client.export([_readable(span, resource) for span in spans]) is SpanExportResult.SUCCESS

    return export


def _readable(span: Span, resource: Resource) -> ReadableSpan:
    return ReadableSpan(
        span.name,
        _context(span.trace_id, span.span_id),
        _context(span.trace_id, span.parent_id) if span.parent_id else None,
        resource,
        span.attributes,
        [Event(name, timestamp=moment_ns) for name, moment_ns in span.events],
        kind=SpanKind[span.kind],
        status=Status(StatusCode.ERROR) if span.error else Status(StatusCode.UNSET),
        start_time=span.start_ns,
        end_time=span.end_ns,
        instrumentation_scope=_SCOPE,
    )


def _context(trace_id: str, span_id: str) -> SpanContext:
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))
