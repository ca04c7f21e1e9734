"""A replica whose engine embeds: its readiness, its counters, and the detection of a dead one."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from lmaas.metering.cogs import report
from lmaas.replica import supervisor
from lmaas.states import Dimension, Observed, PoolKind, UsageStatus
from lmaas.store.engine_time import list_engine_time, list_work
from lmaas.store.models import BaseModel
from lmaas.store.replicas import desire_stop
from tests.integration.gateway.stack import Stack, running
from tests.support.conditions import until

EMBEDDINGS = "/v1/embeddings"


@pytest.fixture
async def stack(postgres_url: str, valkey_url: str, tmp_path: Path) -> AsyncIterator[Stack]:
    async with running(postgres_url, valkey_url, tmp_path) as stack:
        yield stack


@pytest.fixture
async def model(stack: Stack) -> BaseModel:
    return await stack.model("embedder", slots=4, kind=PoolKind.EMBED)


async def test_it_is_ready_when_it_has_embedded_and_the_ledger_is_its_counters(stack: Stack, model: BaseModel) -> None:
    replica = await stack.replica(model)
    assert await replica.counters() == (1, 0, 0), "one token was embedded before it got ready"
    tenant = await stack.tenant()
    async with stack.client(tenant) as http:
        answer = await http.post(EMBEDDINGS, json={"model": "embedder", "input": ["one", "and another one"]})
        assert answer.status_code == 200, answer.text
        completion = await http.post("/v1/completions", json={"model": "embedder", "prompt": "x"})
        assert completion.status_code == 400, completion.text
    [event] = await stack.told_once(model, 1)
    assert (event["prompt_tokens"], event["completion_tokens"]) == (answer.json()["usage"]["prompt_tokens"], 0)
    ledger = await stack.ledger(model)
    assert sorted(row.status for row in ledger) == [UsageStatus.COMPLETED, UsageStatus.PROBE]
    assert (sum(row.prompt_tokens for row in ledger), sum(row.completion_tokens for row in ledger), 0) == await replica.counters()
    await stack.idle(model)


async def test_one_that_embeds_nothing_although_its_server_responds_is_ejected(
    stack: Stack, model: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung = await stack.replica(model, "--fake-token-ms 8000")
    monkeypatch.setattr(supervisor, "STALL_S", 1.0)
    monkeypatch.setattr(supervisor, "PROBE_TIMEOUT_S", 1.0)

    async def post() -> httpx.Response:
        async with stack.client(await stack.tenant()) as http:
            return await http.post(EMBEDDINGS, json={"model": "embedder", "input": "Hi"})

    asked = asyncio.create_task(post())

    async def runs() -> bool:
        return await hung.running() == 1

    await until(runs)
    other = await stack.replica(model)
    ending = await hung.task
    assert (ending.state, ending.reason.partition(":")[0]) == (Observed.FAILED, "the engine does not embed")
    assert (await asked).status_code == 200
    assert [event["replica_id"] for event in await stack.told_once(model, 1)] == [other.id]


async def test_one_that_embeds_more_and_more_is_left_alone(stack: Stack, model: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that embeds never generates a token, so the counter of prompt tokens shows its progress."""
    monkeypatch.setattr(supervisor, "STALL_S", 0.6)
    monkeypatch.setattr(supervisor, "PROBE_TIMEOUT_S", 1.0)
    replica = await stack.replica(model, "--fake-token-ms 100")
    async with stack.client(await stack.tenant()) as http:
        answer = await http.post(EMBEDDINGS, json={"model": "embedder", "input": ["text"] * 80})
    assert answer.status_code == 200
    assert not replica.task.done()
    ledger = await stack.ledger(model)
    assert sorted(row.status for row in ledger) == [UsageStatus.COMPLETED, UsageStatus.PROBE], "only the probe of its start"


async def test_its_cost_is_allocated_to_those_whose_texts_it_embedded(stack: Stack, model: BaseModel) -> None:
    replica = await stack.replica(model, "--fake-token-ms 50")
    many, few = await stack.tenant(), await stack.tenant()
    for tenant, texts in ((many, 16), (few, 1)):
        async with stack.client(tenant) as http:
            assert (await http.post(EMBEDDINGS, json={"model": "embedder", "input": ["text"] * texts})).status_code == 200
    assert len(await stack.ledger(model)) == 3
    await desire_stop(stack.db, replica.id)
    await replica.task
    told = report(await list_engine_time(stack.db), await list_work(stack.db), [], by=(Dimension.TENANT,))
    shares = {line.consumer.tenant_id: sum(line.ms.values()) for line in told.lines if line.consumer is not None}
    assert shares.keys() == {many.id, few.id}
    assert shares[many.id] > shares[few.id] > 0
    assert told.unallocated_ms == 0
