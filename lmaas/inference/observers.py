"""Records of a process about requests beside its metrics: the request log, and traces."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from starlette.types import Scope

from lmaas.config import Settings
from lmaas.http import Ended
from lmaas.inference.protocol import AnyInference
from lmaas.inference.request_log import LOGGER, RequestLog
from lmaas.inference.request_traces import RequestTraces
from lmaas.log_lines import line_writer
from lmaas.observability import Count
from lmaas.tracing.export import span_writer
from lmaas.types import Principal


@dataclass(frozen=True, slots=True)
class Observers:
    """The request log and the traces, None if they are off. `dropped` counts what could not be written, by kind."""

    requests: RequestLog | None = None
    traces: RequestTraces | None = None
    dropped: Mapping[str, Count] = field(default_factory=dict)

    @property
    def ended(self) -> Ended | None:
        """Return the function to call at the end of a client's request; None if no record is on."""
        log, traces = self.requests, self.traces
        if log is None or traces is None:
            return log.ended if log is not None else traces.ended if traces is not None else None

        def both(scope: Scope, status: int, took_s: float) -> None:
            log.ended(scope, status, took_s)
            traces.ended(scope, status, took_s)

        return both

    def attempt_began(self, inference: AnyInference) -> None:
        """Note that a job runner begins an attempt."""
        if self.traces is not None:
            self.traces.begin(inference)

    def attempt_ended(self, action: str, principal: Principal, inference: AnyInference, belongs_to: str, code: str | None = None) -> None:
        """Note the end of an attempt, with the code of the error if it was not accepted. `action` is `batch_line` or `background`,
        `belongs_to` the id of the batch or of the response."""
        if self.requests is not None:
            self.requests.attempt(action, principal, inference, belongs_to, code)
        if self.traces is not None:
            took_s = time.monotonic() - inference.began
            self.traces.attempt_ended(action, principal, inference, belongs_to, code, took_s)


UNOBSERVED = Observers()


@contextmanager
def observing(settings: Settings, process: str) -> Iterator[Observers]:
    """Open the records that the settings turn on, and write the rest of them at the end. `process` is the name of this kind of process.

    Raises SettingsError if traces are on and OpenTelemetry is not installed.
    """
    log: RequestLog | None = None
    traces: RequestTraces | None = None
    dropped: dict[str, Count] = {}
    with ExitStack() as stack:
        if settings.request_log and logging.getLogger(LOGGER).isEnabledFor(logging.INFO):
            lines = stack.enter_context(line_writer())
            log, dropped["log_line"] = RequestLog(lines.add), lambda: lines.dropped
        if settings.traces_url is not None:
            spans = stack.enter_context(span_writer(settings.traces_url, f"lmaas-{process}"))
            traces, dropped["trace"] = RequestTraces(spans.add, settings.traces_ratio), lambda: spans.dropped
        yield Observers(log, traces, dropped)
