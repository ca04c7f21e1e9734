"""The metrics of a gateway, and their description in the documents."""

import re
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from lmaas.observability import MAX_CODES, MAX_TENANTS, OTHER, GatewayMetrics, exposition
from lmaas.protocols.text import ChatCompletions
from lmaas.web.routes import InferenceEndpoint

DOCUMENT = Path(__file__).parents[3] / "docs" / "reference" / "metrics.md"


def described(registry: CollectorRegistry) -> dict[str, set[str]]:
    """Return the labels of each metric as Prometheus shows it. Each must have been counted once."""
    return {
        family.name + ("_total" if family.type == "counter" else ""): {name for each in family.samples for name in each.labels} - {"le"}
        for family in registry.collect()
    }


def documented(section: str) -> dict[str, set[str]]:
    text = DOCUMENT.read_text().split(f"## {section}\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `(lmaas_\w+)` \|([^|]*)\|", text, re.MULTILINE)
    return {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in rows}


def test_each_documented_metric_exists_and_each_metric_is_documented() -> None:
    metrics = GatewayMetrics()
    metrics.requests.counted("/v1/x", "odd")
    metrics.refused("/v1/x", "odd", "code")
    metrics.grammars.labels("odd").inc()
    assert documented("Gateways") == described(metrics.registry)


def test_tenants_are_counted_only_if_an_operator_wishes_it() -> None:
    metrics = GatewayMetrics(by_tenant=True)

    def ended(tenant: str, first_s: float | None = None) -> None:
        metrics.requests.begun()
        metrics.requests.ended(
            "/v1/x", "completed", queue_s=0.5, first_s=first_s, total_s=2, prompt=10, cached=4, completion=2, tenant=tenant
        )

    ended("acme")
    ended("acme", 0.25)
    plain = described(GatewayMetrics().registry)
    assert {name: labels for name, labels in described(metrics.registry).items() if name not in plain} == documented("Tenants")

    def value(name: str, tenant: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"lmaas_tenant_{name}_total", {"tenant": tenant} | labels)

    assert value("requests", "acme", outcome="completed") == 2
    assert [value("tokens", "acme", kind=kind) for kind in ("prompt", "cached", "completion")] == [20, 8, 4]
    assert [value(name, "acme") for name in ("queue_seconds", "streams", "first_event_seconds")] == [1, 1, 0.25]
    for number in range(MAX_TENANTS + 5):
        ended(f"tenant-{number}")
    assert value("requests", OTHER, outcome="completed") == 6
    assert value("requests", "acme", outcome="completed") == 2


def test_requests_are_counted_by_outcome_tokens_and_queue_time() -> None:
    metrics = GatewayMetrics()

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, labels)

    for queue_s in (0, 0.005, 0.006, 1.5, 500):
        metrics.requests.begun()
        metrics.requests.ended("/v1/x", "completed", queue_s=queue_s, first_s=None, total_s=600, prompt=10, cached=4, completion=2)
    metrics.requests.begun()
    metrics.requests.counted("/v1/y", "counted")
    assert value("lmaas_requests_total", endpoint="/v1/x", outcome="completed") == 5
    assert value("lmaas_requests_total", endpoint="/v1/y", outcome="counted") == 1
    assert value("lmaas_requests_in_flight") == 1
    assert [value("lmaas_tokens_total", kind=kind) for kind in ("prompt", "cached", "completion")] == [50, 20, 10]
    bounds = {"0.005": 2, "0.05": 3, "1.0": 3, "5.0": 4, "120.0": 4, "+Inf": 5}
    assert {bound: value("lmaas_queue_seconds_bucket", le=bound) for bound in bounds} == bounds
    assert value("lmaas_queue_seconds_count") == 5
    assert value("lmaas_queue_seconds_sum") == pytest.approx(501.511)


def test_the_times_of_streams_are_counted() -> None:
    metrics = GatewayMetrics()

    def ended(outcome: str, first_s: float | None, total_s: float, completion: int, trace_id: str = "") -> None:
        metrics.requests.begun()
        metrics.requests.ended(
            "/v1/x", outcome, queue_s=0, first_s=first_s, total_s=total_s, trace_id=trace_id, prompt=1, cached=0, completion=completion
        )

    def value(name: str) -> list[float | None]:
        return [metrics.registry.get_sample_value(f"lmaas_{name}_{part}") for part in ("count", "sum")]

    ended("completed", 0.2, 1.2, 11)
    ended("completed", 0.2, 0.2, 1)  # one token has no time between tokens
    ended("completed", None, 3, 5)  # a response in one piece
    ended("aborted", 0.4, 9, 5)  # the client disconnected, so its times are not those of a request
    ended("expired", None, 300, 0)
    assert value("first_event_seconds") == [3, pytest.approx(0.8)]
    assert value("token_seconds") == [1, pytest.approx(0.1)]
    assert value("request_seconds") == [3, pytest.approx(4.4)]


def test_exemplars_name_the_newest_trace_of_each_bucket() -> None:
    metrics = GatewayMetrics()
    for queue_s, trace_id in ((0.1, "a" * 32), (0.1, "b" * 32), (0.1, ""), (500, "c" * 32)):
        metrics.requests.begun()
        metrics.requests.ended(
            "/v1/x", "completed", queue_s=queue_s, first_s=None, total_s=0, trace_id=trace_id, prompt=1, cached=0, completion=1
        )
    text, content_type = exposition(metrics.registry, "text/html,application/openmetrics-text;version=1.0.0;q=0.5,*/*;q=0.1")
    assert content_type.startswith("application/openmetrics-text")
    parsed: Any = text_string_to_metric_families
    families = {family.name: family for family in parsed(text.decode())}
    found = {
        sample.labels["le"]: sample.exemplar.labels["trace_id"] for sample in families["lmaas_queue_seconds"].samples if sample.exemplar
    }
    assert found == {"0.25": "b" * 32, "+Inf": "c" * 32}


@pytest.mark.parametrize("accept", ["", "*/*", "text/plain;version=0.0.4", "nonsense;;;=,"])
def test_other_clients_get_plain_text(accept: str) -> None:
    text, content_type = exposition(GatewayMetrics().registry, accept)
    assert content_type.startswith("text/plain; version=")
    assert b"# TYPE lmaas_requests_in_flight gauge" in text


def test_codes_without_end_are_not_kept_apart() -> None:
    metrics = GatewayMetrics()
    for number in range(2 * MAX_CODES):
        metrics.refused("/v1/x", "odd", f"code-{number}")
    (family,) = metrics.refusals.collect()
    counted = {sample.labels["code"]: sample.value for sample in family.samples if sample.name.endswith("_total")}
    assert len(counted) == MAX_CODES + 1
    assert counted["other"] == MAX_CODES


async def test_unexpected_errors_are_counted_too() -> None:
    protocol = ChatCompletions()
    gateway = Mock(metrics=GatewayMetrics(), authenticate=AsyncMock(side_effect=ZeroDivisionError))
    scope = {"type": "http", "path": protocol.path, "method": "POST", "headers": [], "request_id": "req_1"}
    with pytest.raises(ZeroDivisionError):  # the frame handles it
        await InferenceEndpoint(gateway, protocol)(scope, AsyncMock(), AsyncMock())
    (family,) = gateway.metrics.refusals.collect()
    (labels,) = [sample.labels for sample in family.samples if sample.name.endswith("_total")]
    assert labels == {"endpoint": protocol.path, "kind": "internal", "code": "internal_error"}
