"""Logs and metrics: structured lines on standard error, Prometheus counters."""

import json
import logging
import sys
import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

#: What a log line may carry beside its message. Never prompts, completions or keys.
FIELDS = ("request_id", "tenant_id", "action", "replica_id", "pool_id", "adapter", "code", "status", "detail")

#: Series of refusals that a gateway keeps apart.
MAX_CODES = 300


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's time (UTC), level, process, message and our fields."""
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
    # One line a request is ours to write, where it is handled.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)


class GatewayMetrics:
    """What a gateway counts. One per application, so that a test can build two."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("lmaas_requests", "Requests by endpoint and outcome.", ("endpoint", "outcome"), registry=self.registry)
        self.tokens = Counter("lmaas_tokens", "Tokens by kind, as the engines reported them.", ("kind",), registry=self.registry)
        self.refusals = Counter(
            "lmaas_refusals",
            "Requests that were answered with an error, by its kind and code: over a limit, a full queue, past the deadline, …",
            ("endpoint", "kind", "code"),
            registry=self.registry,
        )
        self.replays = Counter("lmaas_replays", "Answers that were sent again for an Idempotency-Key.", registry=self.registry)
        self.grammars = Counter(
            "lmaas_grammar_checks",
            "New schemas, patterns and tools that were checked, by verdict.",
            ("verdict",),
            registry=self.registry,
        )
        self.in_flight = Gauge("lmaas_requests_in_flight", "Requests that were accepted and have not ended.", registry=self.registry)
        self.queue = Histogram(
            "lmaas_queue_seconds",
            "From the request's arrival to its lease.",
            buckets=(0.005, 0.05, 0.25, 1, 5, 15, 30, 60, 120),
            registry=self.registry,
        )
        # Looking a label up costs more than counting.
        self._outcomes: dict[tuple[str, str], Counter] = {}
        self._refusals: dict[tuple[str, str, str], Counter] = {}
        self._prompt, self._cached, self._completion = (self.tokens.labels(kind) for kind in ("prompt", "cached", "completion"))

    def ended(self, endpoint: str, outcome: str, *, queue_s: float, prompt: int, cached: int, completion: int) -> None:
        """Count a request that has ended."""
        counter = self._outcomes.get((endpoint, outcome))
        if counter is None:
            counter = self._outcomes[endpoint, outcome] = self.requests.labels(endpoint, outcome)
        counter.inc()
        self.queue.observe(queue_s)
        self._prompt.inc(prompt)
        self._cached.inc(cached)
        self._completion.inc(completion)

    def refused(self, endpoint: str, kind: str, code: str) -> None:
        """Count a request that is answered with an error. Codes are ours and few; should that change, the later ones are `other`."""
        labels = (endpoint, kind, code if (endpoint, kind, code) in self._refusals or len(self._refusals) < MAX_CODES else "other")
        counter = self._refusals.get(labels)
        if counter is None:
            counter = self._refusals[labels] = self.refusals.labels(*labels)
        counter.inc()
