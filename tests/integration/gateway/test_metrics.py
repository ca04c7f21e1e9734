"""What a gateway counts, and that the documents say the same."""

import re
from collections.abc import AsyncIterator
from pathlib import Path
from unittest.mock import AsyncMock, Mock

import httpx
import pytest
from prometheus_client import CollectorRegistry

from lmaas.gateway.routes import CHAT, completions
from lmaas.observability import MAX_CODES, GatewayMetrics
from lmaas.store.tenants import update_tenant
from tests.integration.gateway.stack import Stack, Tenant, running

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
    gateway = Mock(metrics=GatewayMetrics(), authenticate=AsyncMock(side_effect=ZeroDivisionError))
    scope = {"type": "http", "path": CHAT.path, "method": "POST", "headers": [], "request_id": "req_1"}
    with pytest.raises(ZeroDivisionError):  # the frame answers it
        await completions(gateway)[CHAT.path](scope, AsyncMock(), AsyncMock())
    (family,) = gateway.metrics.refusals.collect()
    (labels,) = [sample.labels for sample in family.samples if sample.name.endswith("_total")]
    assert labels == {"endpoint": CHAT.path, "kind": "internal", "code": "internal_error"}


@pytest.fixture
async def stack(postgres_url: str, valkey_url: str, tmp_path: Path) -> AsyncIterator[Stack]:
    async with running(postgres_url, valkey_url, tmp_path) as stack:
        yield stack


async def test_refusals_are_counted_by_kind(stack: Stack) -> None:
    await stack.model("cold")

    async def ask(tenant: Tenant, url: str, **more: object) -> int:
        async with stack.client(tenant, url) as http:
            body = {"model": "cold", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4} | more
            return (await http.post(CHAT.path, json=body)).status_code

    limited, spent, other = [await stack.tenant() for _ in range(3)]
    await update_tenant(stack.db, limited.id, {"tokens_per_minute": 1})
    await update_tenant(stack.db, spent.id, {"tokens_per_month": 1})
    await update_tenant(stack.db, other.id, {"requests_per_minute": 1})
    async with stack.gateway(queue_deadline_s=0.2) as gateway:
        assert await ask(limited, gateway.url) == 429
        assert await ask(spent, gateway.url) == 429
        assert await ask(other, gateway.url) == 503  # nobody serves it
        assert await ask(other, gateway.url, model="nobody's") == 404
        assert await ask(Tenant("", "wrong", ""), gateway.url) == 401
        async with httpx.AsyncClient(base_url=gateway.url) as http:
            text = (await http.get("/metrics")).text
    counted = dict(re.findall(r'^lmaas_refusals_total{code="(\w+)",endpoint="[^"]+",kind="(\w+)"} 1.0$', text, re.MULTILINE))
    assert counted == {
        "rate_limit_exceeded": "over_quota",
        "insufficient_quota": "over_quota",
        "no_capacity": "unavailable",
        "model_not_found": "model_not_found",
        "invalid_api_key": "unauthenticated",
    }
