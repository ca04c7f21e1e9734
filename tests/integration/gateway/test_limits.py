"""Limits over HTTP: exact over two gateways, reported in OpenAI's headers, and given back."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx
import openai
import pytest

from lmaas.errors import OverLimit
from lmaas.states import UsageStatus
from lmaas.store.models import BaseModel
from lmaas.store.tenants import change_key, update_tenant
from lmaas.store.usage import UsageEvent, record_events
from tests.integration.gateway.stack import CHAT, Stack, Stream, Tenant, running
from tests.support.conditions import until


@dataclass
class Service:
    stack: Stack
    model: BaseModel
    cold: BaseModel

    async def limited(self, **limits: int) -> Tenant:
        """Return a tenant with these limits."""
        tenant = await self.stack.tenant()
        await update_tenant(self.stack.db, tenant.id, dict(limits))
        return tenant

    async def post(self, tenant: Tenant, max_tokens: int = 4, url: str = "") -> httpx.Response:
        async with self.stack.client(tenant, url) as http:
            return await http.post(CHAT, json=body(max_tokens))


def body(max_tokens: int = 4, model: str = "base") -> dict[str, object]:
    # The estimate is 9: 8 tokens of template, and 1 for "hi".
    return {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": max_tokens, "ignore_eos": True}


@pytest.fixture(scope="module")
async def service(postgres_url: str, valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    home: Path = tmp_path_factory.mktemp("limits")
    async with running(postgres_url, valkey_url, home) as stack:
        model, cold = await stack.model("base"), await stack.model("cold")
        await stack.replica(model, "--fake-token-ms 2")
        yield Service(stack, model, cold)


async def test_requests_per_minute_are_exact_over_two_gateways(service: Service) -> None:
    tenant = await service.limited(requests_per_minute=20)
    async with service.stack.gateway() as other:
        answers = await asyncio.gather(*(service.post(tenant, url=("", other.url)[number % 2]) for number in range(60)))
    assert Counter(answer.status_code for answer in answers) == {200: 20, 429: 40}
    for answer in answers:
        assert answer.headers["x-ratelimit-limit-requests"] == "20"
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 61
    assert {int(answer.headers["x-ratelimit-remaining-requests"]) for answer in answers if answer.status_code == 200} == set(range(20))


async def test_64_at_once_against_tokens_per_minute(service: Service) -> None:
    tenant = await service.limited(tokens_per_minute=1000)
    answers = await asyncio.gather(*(service.post(tenant, max_tokens=91) for _ in range(64)))
    assert Counter(answer.status_code for answer in answers) == {200: 10, 429: 54}
    used = sum(answer.json()["usage"]["total_tokens"] for answer in answers if answer.status_code == 200)
    async with service.stack.client(tenant) as http:
        answer = await http.post(CHAT, json=body(max_tokens=1))
    # Settled to actual usage: the limit still has everything that the responses did not use.
    left = int(answer.headers["x-ratelimit-remaining-tokens"])
    assert left == max(0, 1000 - used - 10) or answer.status_code == 429


async def test_concurrent_requests_of_one_key(service: Service) -> None:
    tenant = await service.stack.tenant()
    await change_key(service.stack.db, tenant.id, tenant.key_id, {"max_concurrent": 3})
    got = [Stream() for _ in range(3)]
    streams = [asyncio.create_task(service.stack.stream(tenant, CHAT, body(1500), each)) for each in got]
    await until(lambda: all(each.raw for each in got))
    refused = await service.post(tenant)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "concurrency_limit_exceeded")
    streams[0].cancel()

    async def one_ends() -> bool:
        return (await service.post(tenant)).status_code == 200

    await until(one_ends, every_s=0.1)
    for stream in streams:
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)


async def test_waiting_and_rejected_requests_burn_nothing(service: Service) -> None:
    tenant = await service.limited(requests_per_minute=2, tokens_per_minute=10_000)
    for _ in range(5):
        got = Stream()
        waiting = asyncio.create_task(service.stack.stream(tenant, CHAT, body(50, "cold"), got))
        await until(lambda got=got: got.comments)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await service.stack.idle(service.cold)
    async with service.stack.client(tenant) as http:
        # The engine refuses it.
        assert (await http.post(CHAT, json=body(50) | {"messages": [{"role": "user", "content": "word " * 3000}]})).status_code == 400
    answer = await service.post(tenant)
    assert (answer.status_code, answer.headers["x-ratelimit-remaining-requests"]) == (200, "1")


async def test_the_months_tokens_survive_a_loss_of_redis(service: Service) -> None:
    tenant = await service.limited(tokens_per_month=2000)
    now = datetime.now(UTC)
    event = UsageEvent(
        f"old-{tenant.id}", tenant.id, tenant.key_id, "base", "base", None, None, UsageStatus.COMPLETED, None, False,
        1000, 0, 880, 0, 0, 1, None, now,
    )  # fmt: skip
    await record_events(service.stack.db, [event])
    assert (await service.post(tenant, max_tokens=90)).status_code == 200
    assert (await service.post(tenant, max_tokens=90)).status_code == 429
    await service.stack.ledger(service.model)
    await service.stack.redis.flushall()

    async def served_again() -> bool:
        return bool((await service.stack.scheduler.stats(service.model.id))["replicas"])

    await until(served_again)
    refused = await service.post(tenant, max_tokens=90)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "insufficient_quota")
    assert refused.headers["x-should-retry"] == "false"
    assert int(refused.headers["retry-after"]) > 0


async def test_openais_client_sees_the_limits(service: Service) -> None:
    tenant = await service.limited(requests_per_minute=1)
    client = openai.AsyncOpenAI(base_url=f"{service.stack.url}/v1", api_key=tenant.key, max_retries=0)
    request = {name: value for name, value in body().items() if name != "ignore_eos"}
    raw = await client.chat.completions.with_raw_response.create(**request)
    assert raw.headers["x-ratelimit-remaining-requests"] == "0"
    with pytest.raises(openai.RateLimitError) as caught:
        await client.chat.completions.create(**request)
    assert caught.value.code == OverLimit.code
    await client.close()


async def test_service_tiers(service: Service) -> None:
    tenant = await service.stack.tenant()
    async with service.stack.client(tenant) as http:
        for name in ("auto", "default", "flex", "priority", None):
            assert (await http.post(CHAT, json=body() | {"service_tier": name})).status_code == 200
        refused = await http.post(CHAT, json=body() | {"service_tier": "golden"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "service_tier")


async def test_the_pools_queue_is_bounded(service: Service) -> None:
    tenants = [await service.stack.tenant() for _ in range(3)]
    async with service.stack.gateway(pool_max_queued=2) as gateway:
        got = [Stream() for _ in range(2)]
        waiting = [
            asyncio.create_task(service.stack.stream(tenant, CHAT, body(4, "cold"), into, gateway.url))
            for tenant, into in zip(tenants, got, strict=False)
        ]
        await until(lambda: all(each.comments for each in got))
        async with service.stack.client(tenants[2], gateway.url) as http:
            refused = await http.post(CHAT, json=body(4, "cold"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "pool_queue_full")
        for each in waiting:
            each.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    await service.stack.idle(service.cold)
    assert json.loads(refused.text)["error"]["type"] == "server_error"
