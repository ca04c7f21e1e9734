"""Engines that hang, or that a request crashes: they are taken out of service, and other requests are served."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from lmaas.engine import client, compiling
from lmaas.engine.compiling import Notes
from lmaas.inference import serving
from lmaas.replica import supervisor
from lmaas.states import Observed
from tests.integration.gateway.stack import COMPLETION, Stack, Stream, Tenant, running
from tests.support.conditions import until

POISON = "arsenic"


@pytest.fixture
async def stack(postgres_url: str, valkey_url: str, tmp_path: Path) -> AsyncIterator[Stack]:
    async with running(postgres_url, valkey_url, tmp_path) as stack:
        yield stack


@pytest.fixture
async def tenant(stack: Stack) -> Tenant:
    return await stack.tenant()


def ask(tokens: int, prompt: str = "Say hi.") -> dict[str, object]:
    return {"model": "base", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}


async def post(stack: Stack, tenant: Tenant, body: dict[str, object]) -> httpx.Response:
    async with stack.client(tenant) as http:
        return await http.post(COMPLETION, json=body)


async def test_an_engine_that_stands_still_is_ejected_while_others_flow(
    stack: Stack, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "STALL_S", 2.0)
    monkeypatch.setattr(supervisor, "PROBE_TIMEOUT_S", 1.0)
    monkeypatch.setattr(client, "COUNTERS_TIMEOUT_S", 1.0)
    model = await stack.model("base", slots=4)
    frozen = await stack.replica(model, "--fake-token-ms 30")
    begun = Stream()
    tasks = [asyncio.create_task(stack.stream(tenant, COMPLETION, ask(2000), begun))]
    await until(lambda: begun.tokens >= 3)
    other = await stack.replica(model, "--fake-token-ms 30")
    frozen.freeze()
    # Some of these go to the engine that hangs: its connection is open, and it accepts them.
    plain = [asyncio.create_task(post(stack, tenant, ask(6))) for _ in range(12)]
    flowing = Stream()
    tasks.append(asyncio.create_task(stack.stream(tenant, COMPLETION, ask(30), flowing)))
    await until(lambda: sum(task.done() for task in plain) >= 4)
    assert not frozen.task.done(), "other requests are served before the hang is noticed"
    # The requests that the engine had taken are delivered again.
    assert [response.status_code for response in await asyncio.gather(*plain)] == [200] * 12
    frozen.kill()  # it has ten seconds to end by itself, but is suspended
    await until(frozen.task.done)
    ending = frozen.task.result()
    assert ending.state is Observed.FAILED
    assert "stands still" in ending.reason or "does not generate" in ending.reason
    await asyncio.gather(*tasks)
    assert flowing.done
    assert begun.error is not None
    assert begun.error["code"] == "engine_failed"
    told = {event["request_id"]: event for event in await stack.told_once(model, 14)}
    assert told[begun.headers["x-request-id"]]["completion_tokens"] == begun.tokens
    assert sorted(event["status"] for event in told.values()) == ["completed"] * 13 + ["failed"]
    assert {event["replica_id"] for event in told.values() if event["status"] == "completed"} == {other.id}
    await stack.idle(model)


async def test_an_engine_that_makes_no_token_is_ejected_although_its_server_responds(
    stack: Stack, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Imitates an engine core that hangs in the mask of a grammar: the server is another process.
    model = await stack.model("base", slots=4)
    hung = await stack.replica(model, "--fake-token-ms 8000")
    monkeypatch.setattr(supervisor, "STALL_S", 1.0)
    monkeypatch.setattr(supervisor, "PROBE_TIMEOUT_S", 1.0)
    asked = asyncio.create_task(post(stack, tenant, ask(6)))

    async def runs() -> bool:
        return await hung.running() == 1

    await until(runs)
    other = await stack.replica(model, "--fake-token-ms 5")
    ending = await hung.task
    assert (ending.state, ending.reason.partition(":")[0]) == (Observed.FAILED, "the engine does not generate")
    assert (await asked).status_code == 200
    assert [event["replica_id"] for event in await stack.told_once(model, 1)] == [other.id]


async def test_an_engine_whose_grammar_thread_stands_still_is_replaced_and_plain_requests_are_served(
    stack: Stack, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "WALL_LIMIT_S", 2.0)
    monkeypatch.setattr(serving, "SUSPECT_S", 1.0)
    model = await stack.model("base", slots=4)
    stuck = await stack.replica(model, "--fake-token-ms 30")
    schema = {"response_format": {"type": "json_object"}}
    # The engine generates tokens all the time, so its liveness check does not notice it.
    asked = [asyncio.create_task(post(stack, tenant, body)) for body in (ask(1000), ask(1000) | schema)]

    async def both_run() -> bool:
        return await stuck.running() == 2

    await until(both_run)
    other = await stack.replica(model, "--fake-token-ms 5")
    # This test compiles in place of the engine.
    with Notes(stack.settings.home / "replicas" / stuck.id / "engine.compiling").compiling():
        ending = await stuck.task
    assert ending.state is Observed.FAILED
    assert "compiling one grammar" in ending.reason
    plain, constrained = await asyncio.gather(*asked)
    assert plain.status_code == 200
    assert constrained.status_code == 502
    assert "Simplify its schema" in constrained.json()["error"]["message"]
    assert not other.task.done()
    told = await stack.told_once(model, 2)
    assert {event["status"]: event["replica_id"] for event in told} == {"completed": other.id, "failed": stuck.id}
    await stack.idle(model)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_that_takes_down_two_engines_is_quarantined(stack: Stack, tenant: Tenant, stream: bool) -> None:
    model = await stack.model("base")
    replicas = [await stack.replica(model, f"--fake-poison {POISON}") for _ in range(3)]
    response = await post(stack, tenant, ask(6, f"Taste {POISON}.") | {"stream": stream})
    assert response.status_code == 502 or b"engine_failed" in response.content
    assert b"engine_failed" in response.content

    def dead() -> int:
        return sum(replica.task.done() for replica in replicas)

    await until(lambda: dead() == 2)
    # The third engine never received the request.
    assert (await post(stack, tenant, ask(6))).status_code == 200
    assert dead() == 2
    told = await stack.told_once(model, 2)
    assert sorted((event["status"], event["completion_tokens"]) for event in told) == [("completed", 6), ("failed", 0)]
    await stack.idle(model)
