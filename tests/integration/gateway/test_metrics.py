"""A gateway counts its refusals by kind."""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from lmaas.store.tenants import update_tenant
from tests.integration.gateway.stack import Stack, Tenant, running


@pytest.fixture
async def stack(postgres_url: str, valkey_url: str, tmp_path: Path) -> AsyncIterator[Stack]:
    async with running(postgres_url, valkey_url, tmp_path) as stack:
        yield stack


async def test_refusals_are_counted_by_kind(stack: Stack) -> None:
    await stack.model("cold")

    async def ask(tenant: Tenant, url: str, **more: object) -> int:
        async with stack.client(tenant, url) as http:
            body = {"model": "cold", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4} | more
            return (await http.post("/v1/chat/completions", json=body)).status_code

    limited, spent, other = [await stack.tenant() for _ in range(3)]
    await update_tenant(stack.db, limited.id, {"tokens_per_minute": 1})
    await update_tenant(stack.db, spent.id, {"tokens_per_month": 1})
    await update_tenant(stack.db, other.id, {"requests_per_minute": 1})
    async with stack.gateway(queue_deadline_s=0.2) as gateway:
        assert await ask(limited, gateway.url) == 429
        assert await ask(spent, gateway.url) == 429
        assert await ask(other, gateway.url) == 503  # no engine serves it
        assert await ask(other, gateway.url, model="unknown") == 404
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
