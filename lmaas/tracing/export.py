"""Sends spans to a collector: OTLP over HTTP, with OpenTelemetry's own exporter, in a thread of its own."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence

from lmaas.errors import SettingsError
from lmaas.group_writer import GroupWriter
from lmaas.tracing.trace import Span

log = logging.getLogger(__name__)

#: The traces that may wait while the collector is away. Later ones are dropped.
MAX_WAITING = 2_000
#: The spans of one request to the collector, and the time that it may take.
SPANS_AT_ONCE = 512
TIMEOUT_S = 5.0
#: The pauses before a collector that has failed is tried again, and before its failure is logged again.
AGAIN_S = 5.0
LOG_EVERY_S = 60.0


def span_writer(url: str, service: str) -> GroupWriter[list[Span]]:
    """Return a writer of traces, each a list of its spans, to the collector at `url`. `service` is the name of this process in traces.

    Raises SettingsError if OpenTelemetry is not installed. The variables `OTEL_…` of OpenTelemetry's exporter and resource hold, such as
    OTEL_EXPORTER_OTLP_HEADERS.
    """
    try:
        from lmaas.tracing import otlp  # noqa: PLC0415 (OpenTelemetry is an extra, and traces are off by default)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "opentelemetry":
            raise
        raise SettingsError("LMAAS_TRACES_URL needs OpenTelemetry. Install it with: pip install 'lmaas[traces]'") from None
    return GroupWriter(Sender(otlp.exporter(url, service, TIMEOUT_S)).send, MAX_WAITING, "traces")


class Sender:
    """Sends groups of traces. A collector that has failed is tried again after AGAIN_S; traces that are to be sent meanwhile are lost."""

    def __init__(self, export: Callable[[Sequence[Span]], bool], clock: Callable[[], float] = time.monotonic) -> None:
        self._export, self._clock = export, clock
        self._ask_at = self._log_at = float("-inf")

    def send(self, traces: Sequence[list[Span]]) -> int:
        """Send traces. Returns the number of those that were lost."""
        lost = 0
        for portion in portions(traces):
            if self._clock() >= self._ask_at:
                if self._export([span for trace in portion for span in trace]):
                    continue
                self._ask_at = self._clock() + AGAIN_S
            lost += len(portion)
        if lost and self._clock() >= self._log_at:
            self._log_at = self._clock() + LOG_EVERY_S
            log.warning("the collector does not take traces; they are dropped", extra={"action": "trace", "detail": f"{lost} traces"})
        return lost


def portions(traces: Sequence[list[Span]]) -> Iterator[list[list[Span]]]:
    """Divide traces into groups of about SPANS_AT_ONCE spans."""
    portion: list[list[Span]] = []
    count = 0
    for trace in traces:
        if portion and count + len(trace) > SPANS_AT_ONCE:
            yield portion
            portion, count = [], 0
        portion.append(trace)
        count += len(trace)
    if portion:
        yield portion
