"""Logs as JSON lines on standard error, and the Prometheus metrics of a gateway."""

import itertools
import json
import logging
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

#: The fields that a log line may have in addition to its message. Never prompts, completions or keys.
FIELDS = ("request_id", "tenant_id", "action", "replica_id", "pool_id", "adapter", "code", "status", "detail")

#: Returns a count.
Count = Callable[[], int]
#: The kinds of what may be dropped.
KINDS = ("log_line", "trace")
#: The maximum number of series of refusals by kind and code. Later codes are counted as `other`.
MAX_CODES = 300
#: The maximum number of tenants that are counted apart, and the name of the rest, which no tenant can have.
MAX_TENANTS = 1_000
OTHER = "(other)"
#: The outcome of requests for the tokens of a prompt. Others have the status of their usage event.
COUNTED = "counted"
#: The outcome of a request that was answered (UsageStatus.COMPLETED).
COMPLETED = "completed"
#: The bounds of the histograms, in seconds: of queue times, of the time to the first event of a stream, of the time per token after it, and
#: of whole requests.
QUEUE_BOUNDS_S = (0.005, 0.05, 0.25, 1, 5, 15, 30, 60, 120)
FIRST_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_BOUNDS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1)
TOTAL_BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's time (UTC), level, logger, message and the fields above."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update({name: record.__dict__[name] for name in FIELDS if name in record.__dict__})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(level: str) -> None:
    """Send every log line of this process to standard error as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Requests are logged once, where they are handled.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)


class Durations:
    """A histogram of durations. For each bucket it keeps the newest request that was traced."""

    __slots__ = ("_bounds", "_counts", "_help", "_name", "_sum", "_traced")

    def __init__(self, name: str, help_text: str, bounds: Sequence[float]) -> None:
        self._name, self._help, self._bounds = name, help_text, bounds
        #: One number for each bound, and one for those above all bounds.
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._traced: dict[int, Exemplar] = {}

    def add(self, seconds: float, trace_id: str) -> None:
        """Count a duration of a request with this trace, or without one."""
        index = bisect_left(self._bounds, seconds)
        self._counts[index] += 1
        self._sum += seconds
        if trace_id:
            self._traced[index] = Exemplar({"trace_id": trace_id}, seconds, time.time())

    def family(self) -> HistogramMetricFamily:
        """Return the metric for Prometheus."""
        names = [*map(str, map(float, self._bounds)), "+Inf"]
        counts = itertools.accumulate(self._counts)
        buckets: list[Any] = [(name, count, self._traced.get(index)) for index, (name, count) in enumerate(zip(names, counts, strict=True))]
        return HistogramMetricFamily(self._name, self._help, buckets=buckets, sum_value=self._sum)


class TenantCounts(Collector):
    """The counts of each tenant, if the settings turn them on. Beyond MAX_TENANTS, tenants are counted as `other`."""

    def __init__(self) -> None:
        self._outcomes: dict[str, dict[str, int]] = {}
        #: By tenant: prompt, cached and completion tokens, seconds in the queue, streams, and seconds to their first events.
        self._sums: dict[str, list[float]] = {}

    def ended(self, tenant: str, outcome: str, queue_s: float, first_s: float | None, tokens: tuple[int, int, int]) -> None:
        """Count the end of a request of this tenant. `tokens` are those of the prompt, the cached ones of these, and the completion's."""
        if tenant not in self._sums and len(self._sums) >= MAX_TENANTS:
            tenant = OTHER
        outcomes = self._outcomes.setdefault(tenant, {})
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        sums = self._sums.setdefault(tenant, [0.0] * 6)
        is_stream = first_s is not None
        for index, value in enumerate((*tokens, queue_s, float(is_stream), first_s or 0.0)):
            sums[index] += value

    def collect(self) -> Iterable[Metric]:
        """Return the metrics for Prometheus."""
        requests = CounterMetricFamily("lmaas_tenant_requests", "Requests by tenant and outcome.", labels=("tenant", "outcome"))
        tokens = CounterMetricFamily("lmaas_tenant_tokens", "Tokens by tenant and kind.", labels=("tenant", "kind"))
        queue = CounterMetricFamily("lmaas_tenant_queue_seconds", "Time of a tenant's requests in the queue.", labels=("tenant",))
        streams = CounterMetricFamily("lmaas_tenant_streams", "Streams of a tenant that had an event.", labels=("tenant",))
        first = CounterMetricFamily("lmaas_tenant_first_event_seconds", "Time to the first events of these streams.", labels=("tenant",))
        for tenant, outcomes in self._outcomes.items():
            for outcome, count in outcomes.items():
                requests.add_metric((tenant, outcome), count)
        for tenant, (prompt, cached, completion, queue_s, with_event, first_s) in self._sums.items():
            for kind, value in (("prompt", prompt), ("cached", cached), ("completion", completion)):
                tokens.add_metric((tenant, kind), value)
            queue.add_metric((tenant,), queue_s)
            streams.add_metric((tenant,), with_event)
            first.add_metric((tenant,), first_s)
        return requests, tokens, queue, streams, first


class RequestCounts(Collector):
    """The counts of all requests.

    These are plain numbers, from which metrics are made when Prometheus reads them: the library's own counters, which are safe for many
    threads, took a twentieth of the CPU time of a request. Only the thread of the event loop may count.
    """

    def __init__(self, tenants: TenantCounts | None = None) -> None:
        self._tenants = tenants
        self._running = 0
        self._outcomes: dict[tuple[str, str], int] = {}
        self._prompt = self._cached = self._completion = 0
        self._queue = Durations("lmaas_queue_seconds", "From the request's arrival to its lease.", QUEUE_BOUNDS_S)
        self._first = Durations("lmaas_first_event_seconds", "From a request's arrival to the first event of its stream.", FIRST_BOUNDS_S)
        self._token = Durations("lmaas_token_seconds", "The mean time between tokens of a completed stream.", TOKEN_BOUNDS_S)
        self._total = Durations("lmaas_request_seconds", "From a completed request's arrival to its end.", TOTAL_BOUNDS_S)

    def begun(self) -> None:
        """Count a request that was accepted."""
        self._running += 1

    def ended(
        self,
        endpoint: str,
        outcome: str,
        *,
        queue_s: float,
        first_s: float | None,
        total_s: float,
        prompt: int,
        cached: int,
        completion: int,
        trace_id: str = "",
        tenant: str = "",
    ) -> None:
        """Count the end of a request that was accepted. `first_s` is None if no event of a stream was sent, `trace_id` empty without a
        trace, `tenant` the tenant's name."""
        self._running -= 1
        self.counted(endpoint, outcome)
        self._queue.add(queue_s, trace_id)
        if first_s is not None:
            self._first.add(first_s, trace_id)
        if outcome == COMPLETED:
            self._total.add(total_s, trace_id)
            if first_s is not None and completion > 1:
                self._token.add((total_s - first_s) / (completion - 1), trace_id)
        self._prompt += prompt
        self._cached += cached
        self._completion += completion
        if self._tenants is not None:
            self._tenants.ended(tenant, outcome, queue_s, first_s, (prompt, cached, completion))

    def counted(self, endpoint: str, outcome: str) -> None:
        """Count a request by its outcome alone."""
        key = (endpoint, outcome)
        self._outcomes[key] = self._outcomes.get(key, 0) + 1

    def collect(self) -> Iterable[Metric]:
        """Return the metrics for Prometheus."""
        requests = CounterMetricFamily("lmaas_requests", "Requests by endpoint and outcome.", labels=("endpoint", "outcome"))
        for labels, count in self._outcomes.items():
            requests.add_metric(labels, count)
        tokens = CounterMetricFamily("lmaas_tokens", "Tokens by kind, as the engines reported them.", labels=("kind",))
        for kind, count in (("prompt", self._prompt), ("cached", self._cached), ("completion", self._completion)):
            tokens.add_metric((kind,), count)
        running = GaugeMetricFamily("lmaas_requests_in_flight", "Requests that were accepted and have not ended.", value=self._running)
        histograms = [each.family() for each in (self._queue, self._first, self._token, self._total)]
        return requests, tokens, running, *histograms


class Dropped(Collector):
    """The records of requests that a process could not write."""

    def __init__(self, counts: Mapping[str, Count]) -> None:
        self._counts = counts

    def collect(self) -> Iterable[Metric]:
        """Return the metric for Prometheus."""
        dropped = CounterMetricFamily("lmaas_telemetry_dropped", "Lines of the request log and traces that were dropped.", labels=("kind",))
        for kind in KINDS:
            count = self._counts.get(kind)
            dropped.add_metric((kind,), 0 if count is None else count())
        return [dropped]


class GatewayMetrics:
    """The metrics of one gateway, in a registry of their own. `dropped` has counts by kind."""

    def __init__(self, dropped: Mapping[str, Count] | None = None, *, by_tenant: bool = False) -> None:
        self.registry = CollectorRegistry()
        tenants = TenantCounts() if by_tenant else None
        if tenants is not None:
            self.registry.register(tenants)
        self.requests = RequestCounts(tenants)
        self.registry.register(self.requests)
        self.registry.register(Dropped(dropped or {}))
        self.refusals = Counter(
            "lmaas_refusals",
            "Requests that got an error, by its kind and code.",
            ("endpoint", "kind", "code"),
            registry=self.registry,
        )
        self.replays = Counter("lmaas_replays", "Responses that were repeated for an Idempotency-Key.", registry=self.registry)
        self.grammars = Counter(
            "lmaas_grammar_checks",
            "New schemas, patterns and tools that were checked, by verdict.",
            ("verdict",),
            registry=self.registry,
        )
        self.lost_responses = Counter(
            "lmaas_lost_responses", "Responses that were not stored, because Postgres was away for too long.", registry=self.registry
        )
        # Looking up a label costs more than counting.
        self._refusals: dict[tuple[str, str, str], Counter] = {}

    def refused(self, endpoint: str, kind: str, code: str) -> None:
        """Count a request that got an error. Beyond MAX_CODES series, codes are counted as `other`."""
        labels = (endpoint, kind, code if (endpoint, kind, code) in self._refusals or len(self._refusals) < MAX_CODES else "other")
        counter = self._refusals.get(labels)
        if counter is None:
            counter = self._refusals[labels] = self.refusals.labels(*labels)
        counter.inc()


def exposition(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """Return the metrics and their content type: OpenMetrics, which has exemplars, for a client that accepts it, otherwise Prometheus's
    text."""
    if "application/openmetrics-text" in accept:
        text: bytes = openmetrics.generate_latest(registry, version="1.0.0")  # type: ignore[no-untyped-call]  # the library has no types here
        return text, "application/openmetrics-text; version=1.0.0; charset=utf-8"
    return generate_latest(registry), CONTENT_TYPE_LATEST
