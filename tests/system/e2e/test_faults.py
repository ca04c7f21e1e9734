"""Processes that die, and the promises that hold then."""

import asyncio
import contextlib
import itertools
import os
import signal
import sys
from typing import Any

import httpx
from openai import AsyncOpenAI

from tests.system.e2e.conftest import MODEL, Stack, wait_for

#: Tokens of a completion for whose end no client waits.
WHOLE = 1900


def events(stack: Stack) -> list[dict[str, Any]]:
    """Return the ledger, newest first."""
    with stack.operator() as client:
        data: list[dict[str, Any]] = client.get("/admin/v1/usage/events?limit=1000").json()["data"]
        return data


def counters(stack: Stack, url: str) -> tuple[int, int]:
    """Return prompt and generated tokens, as the engine counts them."""
    with stack.operator() as client:
        lines = client.get(f"{url}/metrics").text.splitlines()
    totals = []
    for name in ("vllm:prompt_tokens_total", "vllm:generation_tokens_total"):
        totals.append(round(sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))))
    return totals[0], totals[1]


def ledger(stack: Stack, replica: str) -> tuple[int, int]:
    """Return prompt and completion tokens that the ledger has of one replica."""
    mine = [event for event in events(stack) if event["replica_id"] == replica]
    return sum(event["prompt_tokens"] for event in mine), sum(event["completion_tokens"] for event in mine)


async def test_the_ledger_equals_the_engines_counters_also_for_a_client_that_was_killed(stack: Stack) -> None:
    stack.cool()
    url = await asyncio.to_thread(stack.warm)
    replica = next(row["id"] for row in stack.replicas() if row["url"] == url)
    script = (
        "import sys; from openai import OpenAI\n"
        "stream = OpenAI(base_url=sys.argv[1], api_key=sys.argv[2]).completions.create(model=sys.argv[3], prompt='Once', max_tokens=1500,"
        " stream=True, extra_body={'ignore_eos': True})\n"
        "for part in stream: print(part.choices[0].text, flush=True)\n"
    )
    command = [sys.executable, "-c", script, stack.credentials["base_url"], stack.key("acme"), MODEL]
    client = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert client.stdout is not None
    for _ in range(20):
        await client.stdout.readline()
    client.kill()
    await client.communicate()

    def aborted() -> list[dict[str, Any]]:
        return [event for event in events(stack) if event["status"] == "aborted" and event["replica_id"] == replica]

    # The slot is free and the ledger has the request within about a second: the engine stops generating tokens.
    cut = await asyncio.to_thread(wait_for, aborted, 60, "the cut stream is in the ledger")
    # A token may be more than one line.
    assert 5 <= cut[0]["completion_tokens"] < 1500
    async with stack.async_openai("acme") as acme, stack.async_openai("globex") as globex:
        await asyncio.gather(
            *(acme.completions.create(model="json-bot", prompt="One", max_tokens=10) for _ in range(6)),
            *(globex.completions.create(model="pirate-bot", prompt="Two", max_tokens=10) for _ in range(6)),
        )
    await asyncio.to_thread(wait_for, lambda: ledger(stack, replica) == counters(stack, url), 60, "the ledger equals the engine's counters")
    ids = [event["request_id"] for event in events(stack)]
    assert len(ids) == len(set(ids))


async def test_the_ledger_equals_the_engines_counters_under_a_mix_with_clients_that_go(stack: Stack) -> None:
    """The mix has plain and streamed requests, three models, both endpoints, and clients that disconnect in the middle, before the first
    token and while they wait."""
    stack.cool()
    url = await asyncio.to_thread(stack.warm)
    replica = next(row["id"] for row in stack.replicas() if row["url"] == url)
    words = itertools.count()

    async def plain(client: AsyncOpenAI, model: str) -> None:
        await client.completions.create(model=model, prompt=f"Count from {next(words)}", max_tokens=12)

    async def streamed(client: AsyncOpenAI, model: str, leave_after: int | None) -> None:
        message = {"role": "user", "content": f"Tell me about the number {next(words)}."}
        # Clients that disconnect do so long before the end, unless this process stands still meanwhile.
        max_tokens = WHOLE if leave_after else 40
        stream = await client.chat.completions.create(
            model=model, messages=[message], max_tokens=max_tokens, stream=True, extra_body={"ignore_eos": True}
        )
        async with stream:
            pieces = 0
            async for _ in stream:
                pieces += 1
                if pieces == leave_after:
                    return

    async def responded(client: AsyncOpenAI, model: str, leave_after: int | None) -> None:
        limit = WHOLE if leave_after else 40
        stream = await client.responses.create(
            model=model,
            input=f"Tell me about the number {next(words)}.",
            max_output_tokens=limit,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        async with stream:
            pieces = 0
            async for event in stream:
                pieces += event.type == "response.output_text.delta"
                if pieces == leave_after:
                    return

    async def messaged(client: AsyncOpenAI, model: str, leave_after: int | None) -> None:
        content = f"Tell me about the number {next(words)}, and about all the numbers after it, one by one."
        body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": WHOLE if leave_after else 40}
        headers = {"x-api-key": client.api_key}
        async with (
            httpx.AsyncClient(base_url=stack.root, headers=headers, timeout=120) as http,
            http.stream("POST", "/v1/messages", json=body | {"stream": True}) as response,
        ):
            assert response.status_code == 200
            pieces = 0
            async for line in response.aiter_lines():
                pieces += line == "event: content_block_delta"
                if pieces == leave_after:
                    return

    async def impatient(client: AsyncOpenAI, model: str, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await client.completions.create(
                    model=model, prompt=f"Wait for {next(words)}", max_tokens=100, extra_body={"ignore_eos": True}
                )

    async with stack.async_openai("acme") as acme, stack.async_openai("globex") as globex:
        jobs = []
        # More than the engine's slots: some wait, and disconnect while they do.
        for number in range(5):
            for client, model in ((acme, "json-bot"), (globex, "pirate-bot"), (acme, MODEL)):
                jobs += [plain(client, model), streamed(client, model, None), streamed(client, model, 1 + 5 * number)]
                jobs += [impatient(client, model, 0.02 + 0.4 * number)]
            for client, model in ((acme, "json-bot"), (globex, MODEL)):
                for speak in (responded, messaged):
                    jobs += [speak(client, model, None), speak(client, model, 1 + 5 * number)]
        await asyncio.gather(*jobs)

    await asyncio.to_thread(wait_for, lambda: ledger(stack, replica) == counters(stack, url), 60, "the ledger equals the engine's counters")
    mine = [event for event in events(stack) if event["replica_id"] == replica]
    assert {event["status"] for event in mine} == {"completed", "aborted", "probe"}
    assert any(event["status"] == "aborted" and event["completion_tokens"] for event in mine)
    # Every client that left in the middle, or would have if its response had not been complete first.
    assert sum(event["status"] == "aborted" or event["completion_tokens"] == WHOLE for event in mine) >= 15


async def test_requests_outlive_an_engine_that_is_killed(stack: Stack) -> None:
    await asyncio.to_thread(stack.warm)
    async with stack.async_openai("acme") as acme, stack.async_openai("globex") as globex:
        jobs = [
            asyncio.create_task(
                client.completions.create(model=model, prompt=f"Number {number}", max_tokens=60, extra_body={"ignore_eos": True})
            )
            for number in range(10)
            for client, model in ((acme, "json-bot"), (globex, "pirate-bot"), (acme, MODEL))
        ]
        # Some run, some wait; none has received a byte, since none of them streams.
        await asyncio.sleep(0.5)
        for engine in stack.engines():
            os.kill(engine.pid, signal.SIGKILL)
        answers = await asyncio.gather(*jobs)
    assert all(answer.usage.completion_tokens == 60 for answer in answers)

    ids = {answer.id.removeprefix("cmpl-") for answer in answers}
    assert len(ids) == len(jobs)

    def settled() -> list[dict[str, Any]] | None:
        mine = [event for event in events(stack) if event["request_id"] in ids]
        return mine if len(mine) == len(jobs) else None

    mine = await asyncio.to_thread(wait_for, settled, 60, "every request is in the ledger once")
    assert {event["status"] for event in mine} == {"completed"}
    failed = next(row for row in stack.cli("replica", "list", "--ended") if row["observed"] == "failed")
    assert failed["reason"]


def test_no_engine_outlives_its_supervisor(stack: Stack) -> None:
    stack.warm()
    (supervisor,) = stack.processes("lmaas supervise")
    # After a plain start, the engine is a child of the supervisor; after a fork, of its keeper.
    family = [process for engine in stack.engines() for process in (engine, *engine.children(recursive=True))]
    assert len(family) >= 2
    supervisor.kill()
    wait_for(lambda: not any(process.is_running() for process in family), 60, "the engine is gone with its supervisor")
    wait_for(lambda: any(row["observed"] == "lost" for row in stack.cli("replica", "list", "--ended")), 60, "the replica is written off")
    stack.warm()


def test_the_controller_may_die_at_any_time(stack: Stack) -> None:
    url = stack.warm()
    (controller,) = stack.processes("lmaas controller")
    controller.kill()
    assert stack.warm() == url, "the replica serves without a controller, and is adopted"
    wait_for(lambda: stack.processes("lmaas controller"), 60, "the controller is started again")
    assert stack.warm() == url
