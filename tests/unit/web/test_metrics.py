"""What a gateway counts, and that the documents say the same."""

import re
from pathlib import Path
from unittest.mock import AsyncMock, Mock

import pytest
from prometheus_client import CollectorRegistry

from lmaas.observability import MAX_CODES, GatewayMetrics
from lmaas.protocols.text import ChatCompletions
from lmaas.web.routes import InferenceEndpoint

DOCUMENT = Path(__file__).parents[3] / "docs" / "metrics.md"


def described(registry: CollectorRegistry) -> dict[str, set[str]]:
    """Metric as Prometheus shows it → its labels."""
    found = {}
    for collector in registry._collector_to_names:  # noqa: SLF001 (the library names its metrics' labels nowhere else)
        (family,) = collector.collect()
        found[family.name + ("_total" if family.type == "counter" else "")] = set(collector._labelnames)  # type: ignore[attr-defined]  # noqa: SLF001
    return found


def documented(section: str) -> dict[str, set[str]]:
    text = DOCUMENT.read_text().split(f"## {section}\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `(lmaas_\w+)` \|([^|]*)\|", text, re.MULTILINE)
    return {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in rows}


def test_each_documented_metric_exists_and_each_metric_is_documented() -> None:
    assert documented("Gateways") == described(GatewayMetrics().registry)


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


def test_counts_of_tokens_have_an_outcome_of_their_own() -> None:
    metrics = GatewayMetrics()
    for _ in range(3):
        metrics.counted("/v1/tokenize")
    metrics.ended("/v1/chat/completions", "completed", queue_s=0, prompt=1, cached=0, completion=1)
    (family,) = metrics.requests.collect()
    counted = {tuple(sample.labels.values()): sample.value for sample in family.samples if sample.name.endswith("_total")}
    assert counted == {("/v1/tokenize", "counted"): 3, ("/v1/chat/completions", "completed"): 1}
