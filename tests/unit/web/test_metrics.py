"""What a gateway counts, and that the documents say the same."""

import re
from pathlib import Path
from unittest.mock import AsyncMock, Mock

import pytest
from prometheus_client import CollectorRegistry

from lmaas.observability import MAX_CODES, GatewayMetrics
from lmaas.protocols.text import ChatCompletions
from lmaas.web.routes import InferenceEndpoint

DOCUMENT = Path(__file__).parents[3] / "docs" / "reference" / "metrics.md"


def described(registry: CollectorRegistry) -> dict[str, set[str]]:
    """Metric as Prometheus shows it → its labels. Each must have been counted once."""
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


def test_requests_are_counted_by_outcome_tokens_and_queue_time() -> None:
    metrics = GatewayMetrics()

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, labels)

    for queue_s in (0, 0.005, 0.006, 1.5, 500):
        metrics.requests.begun()
        metrics.requests.ended("/v1/x", "completed", queue_s=queue_s, prompt=10, cached=4, completion=2)
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
    with pytest.raises(ZeroDivisionError):  # the frame answers it
        await InferenceEndpoint(gateway, protocol)(scope, AsyncMock(), AsyncMock())
    (family,) = gateway.metrics.refusals.collect()
    (labels,) = [sample.labels for sample in family.samples if sample.name.endswith("_total")]
    assert labels == {"endpoint": protocol.path, "kind": "internal", "code": "internal_error"}
