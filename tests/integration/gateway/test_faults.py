"""Promises that hold when engines, clients, gateways or Redis fail while requests run."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lmaas.states import UsageStatus
from lmaas.store.models import BaseModel
from lmaas.web import server
from tests.integration.gateway.stack import CHAT, COMPLETION, Replica, Stack, Stream, Tenant, running
from tests.support.conditions import until, within

PATHS = pytest.mark.parametrize("path", [CHAT, COMPLETION])
LONG = 2000
#: Arguments of an engine whose streams are long enough for a failure in the middle.
SLOW = "--fake-token-ms 30"


@pytest.fixture
async def stack(postgres_url: str, valkey_url: str, tmp_path: Path) -> AsyncIterator[Stack]:
    async with running(postgres_url, valkey_url, tmp_path) as stack:
        yield stack


@pytest.fixture
async def model(stack: Stack) -> BaseModel:
    return await stack.model("base")


@pytest.fixture
async def tenant(stack: Stack) -> Tenant:
    return await stack.tenant()


def ask(path: str, model: str = "base", *, tokens: int = 6, **more: Any) -> dict[str, Any]:
    prompt = {"messages": [{"role": "user", "content": "Say hi."}]} if path == CHAT else {"prompt": "Say hi."}
    return {"model": model, "max_tokens": tokens, "ignore_eos": True, **prompt, **more}


async def post(stack: Stack, tenant: Tenant, path: str, body: dict[str, Any], url: str = "") -> httpx.Response:
    async with stack.client(tenant, url) as http:
        return await http.post(path, json=body)


async def runs(replica: Replica, sequences: int = 1) -> None:
    """Wait until the engine runs this many sequences."""

    async def busy() -> bool:
        return await replica.running() >= sequences

    await until(busy, every_s=0.02)


async def granted(stack: Stack, model: BaseModel, slots: int) -> None:
    """Wait until this many slots are taken."""

    async def taken() -> bool:
        return bool((await stack.scheduler.stats(model.id))["load"] == slots)

    await until(taken, every_s=0.01)


async def queued(stack: Stack, model: BaseModel, tickets: int) -> None:
    """Wait until this many requests wait."""

    async def wait() -> bool:
        return bool((await stack.scheduler.stats(model.id))["queued"] == tickets)

    await until(wait, every_s=0.01)


def usage(events: list[dict[str, Any]]) -> list[tuple[str, str | None, int]]:
    return sorted((event["status"], event["code"], event["completion_tokens"]) for event in events)


async def test_an_engine_lost_before_the_first_byte_costs_only_time(stack: Stack, model: BaseModel, tenant: Tenant) -> None:
    lost = await stack.replica(model)
    lost.freeze()
    plain = [asyncio.create_task(post(stack, tenant, path, ask(path))) for path in (CHAT, COMPLETION) * 3]
    streams = [asyncio.create_task(stack.stream(tenant, path, ask(path))) for path in (CHAT, COMPLETION) * 3]
    await granted(stack, model, 12)
    second = await stack.replica(model)
    lost.kill()
    for response in await asyncio.gather(*plain):
        assert response.status_code == 200
        assert response.json()["usage"]["completion_tokens"] == 6
    for got in await asyncio.gather(*streams):
        assert (got.done, got.error, got.tokens) == (True, None, 6)
    told = await stack.told_once(model, 12)
    assert usage(told) == [("completed", None, 6)] * 12
    assert {event["replica_id"] for event in told} == {second.id}
    await stack.idle(model)
    assert (await second.counters())[1] == 12 * 6 + 1  # and its supervisor's probe


async def test_an_engine_lost_twice_is_given_up(stack: Stack, model: BaseModel, tenant: Tenant) -> None:
    first = await stack.replica(model)
    first.freeze()
    plain = asyncio.create_task(post(stack, tenant, CHAT, ask(CHAT)))
    stream = asyncio.create_task(post(stack, tenant, CHAT, ask(CHAT, stream=True)))
    await granted(stack, model, 2)
    second = await stack.replica(model)
    second.freeze()
    first.kill()
    await until(first.task.done)
    await granted(stack, model, 2)
    third = await stack.replica(model)
    second.kill()
    for response in await asyncio.gather(plain, stream):
        assert (response.status_code, response.json()["error"]["code"]) == (502, "engine_failed")
    assert usage(await stack.told_once(model, 2)) == [("failed", "engine_failed", 0)] * 2
    assert (await third.counters())[1] == 1  # its probe: no request went to a third replica
    await stack.idle(model)


@PATHS
async def test_an_engine_that_ends_a_plain_request_by_itself_is_not_paid_for_it(
    stack: Stack, model: BaseModel, tenant: Tenant, path: str
) -> None:
    """An abort by another party ends the request like this. It is delivered once more; nothing of either attempt has reached the client."""
    replica = await stack.replica(model, SLOW)
    task = asyncio.create_task(post(stack, tenant, path, ask(path, tokens=LONG)))
    for _ in range(2):
        await granted(stack, model, 1)
        before = (await replica.counters())[1]
        await _some_tokens(replica, before + 2)
        tickets: Any = await stack.redis.hkeys(f"lmaas:{{{model.id}}}:tickets")
        (request_id,) = tickets
        name = f"chatcmpl-{request_id}" if path == CHAT else f"cmpl-{request_id}-0"
        async with httpx.AsyncClient(base_url=replica.url) as http:
            await http.post("/inference/v1/abort_requests", json={"request_ids": [name]})
    response = await task
    assert (response.status_code, response.json()["error"]["code"]) == (502, "engine_failed")
    assert usage(await stack.told_once(model, 1)) == [("failed", "engine_failed", 0)]


@PATHS
async def test_an_engine_lost_in_the_middle_is_an_error_event(stack: Stack, model: BaseModel, tenant: Tenant, path: str) -> None:
    replica = await stack.replica(model, SLOW)
    streams = [Stream(), Stream()]
    bodies = [ask(path, tokens=LONG), ask(path, tokens=LONG, n=3)]
    tasks = [asyncio.create_task(stack.stream(tenant, path, body, got)) for got, body in zip(streams, bodies, strict=True)]
    await until(lambda: all(got.tokens >= 9 for got in streams) or any(task.done() for task in tasks))
    await stack.replica(model)  # too late for a stream that has begun
    replica.kill()
    await asyncio.gather(*tasks)
    for got in streams:
        assert not got.done
        assert got.error is not None
        assert (got.error["code"], got.error["type"]) == ("engine_failed", "server_error")
    told = await stack.told_once(model, 2)
    assert {event["request_id"]: event["completion_tokens"] for event in told} == {
        got.headers["x-request-id"]: got.tokens for got in streams
    }
    assert {(event["status"], event["code"]) for event in told} == {("failed", "engine_failed")}
    assert all(event["prompt_tokens"] > 0 for event in told)
    await stack.idle(model)


async def test_an_engine_that_is_told_to_stop_in_the_middle_is_an_error_event_too(stack: Stack, model: BaseModel, tenant: Tenant) -> None:
    replica = await stack.replica(model, SLOW)
    got = Stream()
    task = asyncio.create_task(stack.stream(tenant, CHAT, ask(CHAT, tokens=LONG), got))
    plain = asyncio.create_task(post(stack, tenant, CHAT, ask(CHAT, tokens=200)))
    await until(lambda: got.tokens >= 3)
    second = await stack.replica(model)
    os.kill(replica.pid, signal.SIGTERM)
    await task
    assert got.error is not None
    assert got.error["code"] == "engine_failed"
    assert not got.done
    assert (await plain).json()["usage"]["completion_tokens"] == 200
    told = await stack.told_once(model, 2)
    assert usage(told) == [("completed", None, 200), ("failed", "engine_failed", got.tokens)]
    assert {event["replica_id"] for event in told} == {replica.id, second.id}


async def test_an_engine_that_stands_still_is_cut_off_when_its_replica_goes(stack: Stack, model: BaseModel, tenant: Tenant) -> None:
    replica = await stack.replica(model, SLOW)
    got = Stream()
    task = asyncio.create_task(stack.stream(tenant, CHAT, ask(CHAT, tokens=LONG), got))
    await until(lambda: got.tokens >= 3)
    replica.freeze()
    async with within(10):
        await stack.scheduler.deregister(model.id, replica.id)
        await task
    replica.kill()
    assert got.error is not None
    assert usage(await stack.told_once(model, 1)) == [("failed", "engine_failed", got.tokens)]


@PATHS
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_goes_stops_its_work(stack: Stack, model: BaseModel, tenant: Tenant, path: str, stream: bool, n: int) -> None:
    replica = await stack.replica(model, "--fake-token-ms 10")
    before = await replica.counters()
    body = ask(path, tokens=LONG, n=n)
    if path == COMPLETION:
        body["prompt"] = ["One", "Two"]
    task: asyncio.Task[Any] = asyncio.create_task(
        stack.stream(tenant, path, body) if stream else post(stack, tenant, path, body), name="client"
    )
    await runs(replica, n if path == CHAT else 2 * n)
    await _some_tokens(replica, before[1])

    async def quiet() -> bool:
        return await replica.running() == 0

    async with within(1.5):
        async with within(1):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await until(quiet, every_s=0.02)
        (event,) = await stack.told_once(model, 1)
    after = await replica.counters()
    assert (event["status"], event["completion_tokens"]) == ("aborted", after[1] - before[1])
    assert event["completion_tokens"] > 0
    assert event["prompt_tokens"] * n == after[0] - before[0]
    await stack.idle(model)


async def _some_tokens(replica: Replica, more_than: int) -> None:
    async def generated() -> bool:
        return (await replica.counters())[1] > more_than

    await until(generated, every_s=0.02)


async def test_a_client_that_goes_before_the_engine_knows_its_request_stops_it_too(stack: Stack, model: BaseModel, tenant: Tenant) -> None:
    """While the engine still reads the prompt, an abort finds no request to end."""
    replica = await stack.replica(model, "--fake-token-ms 10 --fake-accept-ms 400")
    before = await replica.counters()
    task = asyncio.create_task(post(stack, tenant, CHAT, ask(CHAT, tokens=LONG)))
    await granted(stack, model, 1)
    async with within(2):
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        (event,) = await stack.told_once(model, 1)
    assert await replica.running() == 0
    assert (event["status"], event["completion_tokens"]) == ("aborted", (await replica.counters())[1] - before[1])
    await stack.idle(model)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_while_it_waits_leaves_nothing(stack: Stack, model: BaseModel, tenant: Tenant, stream: bool) -> None:
    task: asyncio.Task[Any] = asyncio.create_task(
        stack.stream(tenant, CHAT, ask(CHAT)) if stream else post(stack, tenant, CHAT, ask(CHAT)), name="client"
    )
    await queued(stack, model, 1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert usage(await stack.told_once(model, 1)) == [("aborted", None, 0)]
    await stack.idle(model)
    (event,) = await stack.ledger(model, tenant)
    assert (event.status, event.prompt_tokens, event.replica_id, event.run_ms) == (UsageStatus.ABORTED, 0, None, 0)
    replica = await stack.replica(model)
    assert (await replica.counters())[1] == 1  # its probe


async def test_a_client_that_reads_slowly_gets_everything(stack: Stack, model: BaseModel, tenant: Tenant) -> None:
    await stack.replica(model, "--fake-token-ms 0")
    async with (
        stack.client(tenant) as http,
        http.stream("POST", COMPLETION, json=ask(COMPLETION, tokens=LONG, n=4, stream=True)) as response,
    ):
        await asyncio.sleep(1)
        text = (await response.aread()).decode()
    assert text.endswith("data: [DONE]\n\n")
    assert usage(await stack.told_once(model, 1)) == [("completed", None, 4 * LONG)]


async def test_a_client_that_takes_nothing_is_cut_off(
    stack: Stack, model: BaseModel, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "CLIENT_STALL_S", 0.5)
    replica = await stack.replica(model, "--fake-token-ms 0")
    body = ask(COMPLETION, tokens=LONG, n=16, stream=True, prompt=["a"] * 8)  # many megabytes, more than any socket's buffer holds
    async with stack.client(tenant) as http, http.stream("POST", COMPLETION, json=body) as response:
        assert response.status_code == 200
        (event,) = await stack.told_once(model, 1)
        assert event["status"] == "aborted"
        assert event["completion_tokens"] > 0
        with pytest.raises(httpx.TransportError):
            await response.aread()

    async def quiet() -> bool:
        return await replica.running() == 0

    async with within(5):
        await until(quiet)
    await stack.idle(model)


async def test_a_stopping_gateway_lets_requests_end_and_cuts_the_rest_with_an_error(
    stack: Stack, model: BaseModel, tenant: Tenant, caplog: pytest.LogCaptureFixture
) -> None:
    other = await stack.model("other")
    replica = await stack.replica(model, SLOW)
    async with stack.gateway(drain_timeout_s=2) as gateway:
        short, long, waiting = Stream(), Stream(), Stream()
        tasks = [
            asyncio.create_task(stack.stream(tenant, CHAT, ask(CHAT, tokens=30), short, gateway.url)),
            asyncio.create_task(stack.stream(tenant, CHAT, ask(CHAT, tokens=LONG), long, gateway.url)),
            asyncio.create_task(stack.stream(tenant, CHAT, ask(CHAT, "other"), waiting, gateway.url)),
        ]
        plain = asyncio.create_task(post(stack, tenant, COMPLETION, ask(COMPLETION, tokens=LONG), gateway.url))
        await until(lambda: short.tokens >= 3 and long.tokens >= 3 and waiting.comments)
        gateway.stop()
        await asyncio.gather(*tasks)
        response = await plain
    assert (short.done, short.tokens) == (True, 30)
    for got in (long, waiting):
        assert not got.done
        assert got.error is not None
        assert got.error["code"] == "gateway_stopped"
    assert (response.status_code, response.json()["error"]["code"]) == (503, "gateway_stopped")
    assert response.headers["retry-after"] == "1"
    assert usage(await stack.told_once(other, 1)) == [("failed", "gateway_stopped", 0)]
    told = {event["request_id"]: event for event in await stack.told_once(model, 3)}
    assert usage(list(told.values()))[0] == ("completed", None, 30)
    cut = told[long.headers["x-request-id"]]
    assert (cut["status"], cut["code"], cut["completion_tokens"]) == ("failed", "gateway_stopped", long.tokens)

    async def quiet() -> bool:
        return await replica.running() == 0

    async with within(5):
        await until(quiet)
    await stack.idle(model)
    assert [record.message for record in caplog.records if record.levelname == "ERROR" and record.name != "uvicorn.error"] == []


async def test_an_adapter_that_cannot_be_loaded_fails_its_own_requests_only(stack: Stack, model: BaseModel, tenant: Tenant) -> None:
    replica = await stack.replica(model)
    neighbour = await stack.tenant()
    internal = await stack.adapter(tenant, "broken", model, files=False)
    await stack.adapter(neighbour, "fine", model)
    bodies = [(tenant, "broken"), (tenant, "base"), (neighbour, "fine"), (neighbour, "base")] * 3
    answers = await asyncio.gather(*(post(stack, who, CHAT, ask(CHAT, name)) for who, name in bodies))
    for (_, name), response in zip(bodies, answers, strict=True):
        if name == "broken":
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (503, "adapter_load_failed")
            assert int(response.headers["retry-after"]) >= 1
            assert internal not in response.text
            assert str(stack.settings.home) not in response.text
        else:
            assert response.status_code == 200
    told = await stack.told_once(model, 12)
    assert usage(told) == [("completed", None, 6)] * 9 + [("failed", "adapter_load_failed", 0)] * 3
    assert await replica.running() == 0
    await stack.idle(model)


async def test_an_adapter_that_the_engine_has_lost_is_loaded_again(stack: Stack, model: BaseModel, tenant: Tenant) -> None:
    replica = await stack.replica(model)
    internal = await stack.adapter(tenant, "bot", model)
    first = (await post(stack, tenant, CHAT, ask(CHAT, "bot"))).json()
    async with httpx.AsyncClient(base_url=replica.url) as http:
        assert (await http.post("/v1/unload_lora_adapter", json={"lora_name": internal})).status_code == 200
    second = (await post(stack, tenant, CHAT, ask(CHAT, "bot"))).json()
    assert first["choices"] == second["choices"]
    assert usage(await stack.told_once(model, 2)) == [("completed", None, 6)] * 2


async def test_a_redis_that_loses_its_memory_costs_no_request(stack: Stack, model: BaseModel, tenant: Tenant) -> None:
    small = await stack.model("small", slots=2)
    replica = await stack.replica(small, SLOW)
    done = await stack.stream(tenant, CHAT, ask(CHAT, "small"))
    assert done.done
    streaming = [Stream(), Stream()]
    tasks = [asyncio.create_task(stack.stream(tenant, CHAT, ask(CHAT, "small", tokens=120), got)) for got in streaming]
    await until(lambda: all(got.tokens >= 3 for got in streaming) or any(task.done() for task in tasks))
    waiting = [Stream(), Stream()]
    tasks += [asyncio.create_task(stack.stream(tenant, CHAT, ask(CHAT, "small"), got)) for got in waiting]
    plain = asyncio.create_task(post(stack, tenant, COMPLETION, ask(COMPLETION, "small")))
    elsewhere = asyncio.create_task(post(stack, tenant, COMPLETION, ask(COMPLETION)))
    await queued(stack, small, 3)
    await queued(stack, model, 1)
    await stack.redis.flushall()
    await asyncio.gather(*tasks)
    assert all(got.done and got.tokens == 120 for got in streaming)
    assert all(got.done and got.tokens == 6 for got in waiting)
    assert (await plain).status_code == 200
    await stack.replica(model)
    assert (await elsewhere).status_code == 200

    # Events that were recorded just before the loss are recorded again.
    async def known() -> bool:
        events = await stack.ledger(small, tenant)
        return len([event for event in events if event.base_model == "small"]) == 6

    await until(known)
    events = [event for event in await stack.ledger(small, tenant) if event.base_model == "small"]
    assert sorted(event.completion_tokens for event in events) == [6, 6, 6, 6, 120, 120]
    assert {event.status for event in events} == {UsageStatus.COMPLETED}
    assert sum(event.completion_tokens for event in events) + 1 == (await replica.counters())[1]
    await stack.idle(small)


async def test_a_redis_that_loses_its_memory_between_two_deliveries(stack: Stack, model: BaseModel, tenant: Tenant) -> None:
    lost = await stack.replica(model)
    lost.freeze()
    task = asyncio.create_task(post(stack, tenant, CHAT, ask(CHAT)))
    await granted(stack, model, 1)
    lost.kill()
    await queued(stack, model, 1)
    await stack.redis.flushall()
    await stack.replica(model)
    response = await asyncio.wait_for(task, 60)
    assert response.status_code == 200
    assert usage(await stack.told_once(model, 1)) == [("completed", None, 6)]
    await stack.idle(model)


async def test_a_lost_subscription_is_made_again(stack: Stack, model: BaseModel, tenant: Tenant) -> None:
    task = asyncio.create_task(post(stack, tenant, CHAT, ask(CHAT)))
    await queued(stack, model, 1)
    await stack.redis.client_kill_filter(_type="pubsub")
    await stack.replica(model)
    await stack.redis.client_kill_filter(_type="pubsub")
    assert (await asyncio.wait_for(task, 60)).status_code == 200
    await stack.told_once(model, 1)
