"""Logs as JSON lines on standard error, and the Prometheus metrics of a gateway."""

import json
import logging
import sys
import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

#: The fields that a log line may have in addition to its message. Never prompts, completions or keys.
FIELDS = ("request_id", "tenant_id", "action", "replica_id", "pool_id", "adapter", "code", "status", "detail")

#: The maximum number of series of refusals by kind and code. Later codes are counted as `other`.
MAX_CODES = 300
#: The outcome of requests for the tokens of a prompt. Others have the status of their usage event.
COUNTED = "counted"


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


class GatewayMetrics:
    """The metrics of one gateway, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("lmaas_requests", "Requests by endpoint and outcome.", ("endpoint", "outcome"), registry=self.registry)
        self.tokens = Counter("lmaas_tokens", "Tokens by kind, as the engines reported them.", ("kind",), registry=self.registry)
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
        self.in_flight = Gauge("lmaas_requests_in_flight", "Requests that were accepted and have not ended.", registry=self.registry)
        self.queue = Histogram(
            "lmaas_queue_seconds",
            "From the request's arrival to its lease.",
            buckets=(0.005, 0.05, 0.25, 1, 5, 15, 30, 60, 120),
            registry=self.registry,
        )
        # Looking up a label costs more than counting.
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

    def counted(self, endpoint: str) -> None:
        """Count a request for the tokens of a prompt that was answered."""
        counter = self._outcomes.get((endpoint, COUNTED))
        if counter is None:
            counter = self._outcomes[endpoint, COUNTED] = self.requests.labels(endpoint, COUNTED)
        counter.inc()

    def refused(self, endpoint: str, kind: str, code: str) -> None:
        """Count a request that got an error. Beyond MAX_CODES series, codes are counted as `other`."""
        labels = (endpoint, kind, code if (endpoint, kind, code) in self._refusals or len(self._refusals) < MAX_CODES else "other")
        counter = self._refusals.get(labels)
        if counter is None:
            counter = self._refusals[labels] = self.refusals.labels(*labels)
        counter.inc()
