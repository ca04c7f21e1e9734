"""The path of a request without a socket: its input, and the output that reaches its sink."""

import asyncio
import dataclasses
import functools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from lmaas.app import build_inferences
from lmaas.errors import ModelNotFound, OverLimit
from lmaas.http import new_request_id
from lmaas.inference.cache import Changes
from lmaas.inference.protocol import Inference
from lmaas.inference.serving import Inferences
from lmaas.inference.sink import Collected
from lmaas.inference.work import BATCH, DETACHED, INTERACTIVE, PutBack, Work
from lmaas.keys import hash_key
from lmaas.metering.usage import parse_event
from lmaas.observability import GatewayMetrics
from lmaas.protocols.pooling.embeddings import Embeddings
from lmaas.protocols.text import ChatCompletions
from lmaas.scheduling.client import gateway_channel
from lmaas.states import PoolKind, UsageStatus
from lmaas.store.changes import change_number
from lmaas.store.models import change_base_model
from lmaas.store.rights import DatabaseRole
from lmaas.store.tenants import find_principal, update_tenant
from lmaas.store.usage import insert_events, record_events
from lmaas.types import Principal
from tests.integration.gateway.stack import Stack, Tenant, running
from tests.support.conditions import until

CHAT = ChatCompletions()


@pytest.fixture
async def stack(postgres_url: str, valkey_url: str, tmp_path: Path) -> AsyncIterator[Stack]:
    async with running(postgres_url, valkey_url, tmp_path) as stack:
        yield stack


@asynccontextmanager
async def inferences(stack: Stack) -> AsyncIterator[Inferences]:
    """The path of requests, and the tasks that run while it serves."""
    services = dataclasses.replace(stack.services, db=stack.database(DatabaseRole.GATEWAY))
    built = build_inferences(stack.settings, services, Changes(functools.partial(change_number, services.db)), GatewayMetrics())
    async with built.client:
        renewing = asyncio.create_task(built.leases.run(), name="leases")
        try:
            yield built
        finally:
            await built.leases.drained()
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)


async def principal_of(stack: Stack, tenant: Tenant) -> Principal:
    found = await find_principal(stack.db, hash_key(tenant.key))
    assert found is not None
    return found


def chat(work: Work = INTERACTIVE, **changes: Any) -> Inference[Any]:
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    return Inference(new_request_id(), CHAT, CHAT.read(body | changes), work)


async def test_answers_go_to_a_sink_and_usage_to_the_ledger(stack: Stack) -> None:
    model, tenant = await stack.model("m"), await stack.tenant()
    await stack.replica(model)
    principal = await principal_of(stack, tenant)
    whole, streamed = Collected(), Collected()
    async with inferences(stack) as path:
        await path.serve(principal, chat(), whole)
        await path.serve(principal, chat(stream=True), streamed)
    assert (whole.status, whole.headers["content-type"], whole.complete) == (200, "application/json", True)
    text = json.loads(whole.body)["choices"][0]["message"]["content"]
    assert (streamed.status, streamed.complete) == (200, True)
    assert streamed.body.endswith(b"data: [DONE]\n\n")
    events = [json.loads(event.removeprefix(b"data: ")) for event in streamed.body.split(b"\n\n")[:-2]]
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events) == text
    ledger = await stack.ledger(model, tenant)
    found = {(event.status, event.completion_tokens, event.stream) for event in ledger if event.status != UsageStatus.PROBE}
    assert found == {(UsageStatus.COMPLETED, 4, False), (UsageStatus.COMPLETED, 4, True)}


async def test_a_sink_that_goes_ends_its_request(stack: Stack) -> None:
    model, tenant = await stack.model("m"), await stack.tenant()
    replica = await stack.replica(model)
    principal = await principal_of(stack, tenant)
    sink = Collected()
    async with inferences(stack) as path:
        serving = asyncio.create_task(path.serve(principal, chat(stream=True, max_tokens=1900), sink))
        await until(lambda: b"content" in sink.body)
        sink.leave()
        await serving

        async def quiet() -> bool:
            return await replica.running() == 0

        await until(quiet)
    assert not sink.finished
    (event,) = await stack.told_once(model, 1)
    assert (event["status"], 0 < event["completion_tokens"] < 1900) == ("aborted", True)


async def test_durable_work_counts_as_wasted_until_its_caller_stores_its_event(stack: Stack) -> None:
    model, tenant = await stack.model("m"), await stack.tenant()
    await change_base_model(stack.db, "m", {"prompt_price": 100, "cached_price": 100, "completion_price": 301})
    await stack.replica(model)
    principal = await principal_of(stack, tenant)
    batched, detached, sink = chat(BATCH, service_tier="priority"), chat(DETACHED), Collected()
    async with inferences(stack) as path:
        await path.serve(principal, batched, sink)
        await path.serve(principal, detached, Collected())
    assert json.loads(sink.body)["usage"]["completion_tokens"] == 4

    async def ledger() -> dict[str, tuple[str, int, str]]:
        events = await stack.ledger(model, tenant)
        return {event.request_id: (event.status, event.charge_picousd, event.work) for event in events}

    assert await ledger() == {batched.request_id: ("wasted", 0, "background"), detached.request_id: ("wasted", 0, "interactive")}
    own, stand_in = batched.record.own_event(), batched.record.event()
    assert (own.status, own.charge_picousd) == ("completed", own.prompt_tokens * 50 + 4 * 151), "half, rounded up, for every tier"
    async with stack.db.begin(tenant.id) as connection:
        await insert_events(connection, [own])
    await record_events(stack.db, [parse_event(stand_in)])
    assert (await ledger())[batched.request_id] == ("completed", own.charge_picousd, "background")


async def test_work_whose_slot_is_taken_back_is_aborted_and_counted(stack: Stack) -> None:
    model, tenant = await stack.model("m"), await stack.tenant()
    replica = await stack.replica(model, "--fake-token-ms 10")
    principal = await principal_of(stack, tenant)
    inference = chat(BATCH, max_tokens=1900)
    async with inferences(stack) as path:
        serving = asyncio.create_task(path.serve(principal, inference, Collected()))

        async def running() -> bool:
            return await replica.running() == 1

        await until(running)
        news = {"id": inference.request_id, "event": "yielded", "attempts": 0}
        await stack.services.redis.publish(gateway_channel(path.leases.gateway), json.dumps(news))
        with pytest.raises(PutBack):
            await serving
        assert await replica.running() == 0
    (event,) = await stack.told_once(model, 1)
    assert (event["status"], event["code"], 0 < event["completion_tokens"] < 1900) == ("wasted", "put_back", True)


async def test_a_request_that_is_not_accepted_raises_and_leaves_nothing(stack: Stack) -> None:
    model, tenant = await stack.model("m"), await stack.tenant()
    principal = await principal_of(stack, tenant)
    await update_tenant(stack.db, tenant.id, {"tokens_per_minute": 1})
    limited = await principal_of(stack, tenant)
    sink = Collected()
    async with inferences(stack) as path:
        with pytest.raises(ModelNotFound):
            await path.serve(principal, chat(model="unknown"), sink)
        with pytest.raises(OverLimit):
            await path.serve(limited, chat(), sink)
    assert (sink.started, sink.body) == (False, b"")
    assert await stack.told(model) == []


async def test_an_error_after_acceptance_goes_to_the_sink(stack: Stack) -> None:
    model, tenant = await stack.model("m"), await stack.tenant()
    principal = await principal_of(stack, tenant)
    whole, streamed = Collected(), Collected()
    async with inferences(stack) as path:
        hurried = dataclasses.replace(path, settings=dataclasses.replace(path.settings, queue_deadline_s=1.5))
        await asyncio.gather(
            hurried.serve(principal, chat(), whole),
            hurried.serve(principal, chat(stream=True), streamed),
        )
    assert (whole.status, json.loads(whole.body)["error"]["code"], whole.complete) == (503, "no_capacity", True)
    assert (streamed.status, streamed.complete) == (200, False), "comments about its wait had begun the stream"
    assert streamed.body.startswith(b": queued position=")
    assert b'"code":"no_capacity"' in streamed.body.rsplit(b"data: ", 1)[1]
    assert [event["status"] for event in await stack.told_once(model, 2)] == ["expired", "expired"]


async def test_a_whole_answer_that_the_gateways_stop_cuts_off_costs_nothing(stack: Stack) -> None:
    model, tenant = await stack.model("e", kind=PoolKind.EMBED), await stack.tenant()
    await stack.replica(model, "--fake-token-ms 300")
    principal = await principal_of(stack, tenant)
    sink = Collected()
    async with inferences(stack) as path:
        embeddings = Embeddings()
        inference = Inference(new_request_id(), embeddings, embeddings.read({"model": "e", "input": ["word"] * 200}))
        serving = asyncio.create_task(path.serve(principal, inference, sink))
        await until(lambda: hasattr(inference, "answer") and inference.answer.usage is not None)
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
    assert (sink.status, json.loads(sink.body)["error"]["code"]) == (503, "gateway_stopped")
    (event,) = await stack.told_once(model, 1)
    assert (event["status"], event["prompt_tokens"]) == ("failed", 0)
