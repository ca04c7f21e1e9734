"""A collector of traces: a server that takes what OpenTelemetry's exporter sends, and decodes it."""

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse


@dataclass(frozen=True)
class Received:
    """A span as it arrived."""

    service: str
    name: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    events: list[str]
    failed: bool


@dataclass
class Collector:
    """A collector that runs, with the spans that have arrived."""

    url: str
    spans: list[Received] = field(default_factory=list)
    raw: bytearray = field(default_factory=bytearray)
    #: The HTTP status of its responses.
    status: int = 200

    def trace(self, trace_id: str) -> dict[str, Received]:
        """Return the spans of a trace by name. A name may occur once."""
        found = [span for span in self.spans if span.trace_id == trace_id]
        named = {span.name: span for span in found}
        assert len(named) == len(found), [span.name for span in found]
        return named

    def take(self, body: bytes) -> None:
        """Decode what an exporter sent."""
        self.raw += body
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = next(each.value.string_value for each in resource.resource.attributes if each.key == "service.name")
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.append(
                        Received(
                            service,
                            span.name,
                            span.kind,
                            span.trace_id.hex(),
                            span.span_id.hex(),
                            span.parent_span_id.hex(),
                            span.start_time_unix_nano,
                            span.end_time_unix_nano,
                            {each.key: getattr(each.value, str(each.value.WhichOneof("value"))) for each in span.attributes},
                            [event.name for event in span.events],
                            span.status.code == 2,
                        )
                    )


@contextmanager
def collector() -> Iterator[Collector]:
    """Run a collector until the end of the block."""
    collected = Collector("")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            assert self.path == "/v1/traces"
            if collected.status == 200:
                collected.take(gzip.decompress(body) if self.headers["content-encoding"] == "gzip" else body)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(collected.status)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collected.url = f"http://127.0.0.1:{server.server_address[1]}/v1/traces"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield collected
        finally:
            server.shutdown()
            thread.join()
