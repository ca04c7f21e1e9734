"""Responses in the background when a process dies, a server is away, or the service refuses the response."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from lmaas.keys import hash_key, new_key, shown_prefix
from lmaas.states import UsageStatus
from lmaas.store.background import Lease, claim
from lmaas.store.scopes import SYSTEM
from lmaas.store.tenants import create_key, revoke_key, update_tenant
from lmaas.types import Role
from tests.integration.background.runners import Runner, runner
from tests.integration.background.service import Service, create, ended, log_of
from tests.integration.gateway.stack import Tenant, running
from tests.integration.protocols.responses.test_stored import away
from tests.support.conditions import until
from tests.support.processes import free_port
from tests.support.response_streams import check, parse


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_outlives_its_runner(service: Service, tenant: Tenant, client: AsyncOpenAI, stream: bool) -> None:
    async with runner(service.stack) as first:
        made = await create(client, max_output_tokens=400, stream=stream, extra_body={"ignore_eos": True})
        events = aiter(made) if stream else None
        seen = []
        if events is not None:
            async for event in events:
                seen.append(event)
                if event.type == "response.output_text.delta":
                    break
        response_id = seen[0].response.id if stream else made.id

        async def is_running() -> bool:
            return bool((await client.responses.retrieve(response_id)).status == "in_progress")

        await until(is_running)
        await first.kill()
        assert (await client.responses.retrieve(response_id)).status in ("queued", "in_progress")
        async with runner(service.stack):
            done = await ended(client, response_id)
    assert done.usage.output_tokens == 400
    if events is not None:
        seen += [event async for event in events]
        assert (seen[-1].type, seen[-1].code) == ("error", "response_restarted")
        numbers = [event.sequence_number for event in seen]
        assert numbers == list(range(len(seen)))
        # After that event the new run can be read from its beginning, and so can the whole log.
        rest, _ = parse(await log_of(service, tenant, response_id, numbers[-1]))
        assert rest[0]["type"] == "response.in_progress"
        assert rest[0]["sequence_number"] == numbers[-1] + 1
        whole = check(await log_of(service, tenant, response_id), background=True, restarted_at=numbers[-1] + 1)
        assert whole.response == done.to_dict()
        # A client that stopped in the middle of the first run receives that event too.
        assert [event["code"] for event in parse(await log_of(service, tenant, response_id, 3))[0]] == ["response_restarted"]

    async def told() -> bool:
        return len(await service.stack.ledger(service.model, tenant)) == 2

    await until(told)
    by_status = {event.status: event for event in await service.stack.ledger(service.model, tenant)}
    assert set(by_status) == {UsageStatus.WASTED, UsageStatus.COMPLETED}
    assert by_status[UsageStatus.WASTED].charge_picousd == 0
    assert by_status[UsageStatus.COMPLETED].completion_tokens == 400


@asynccontextmanager
async def process(service: Service, command: str, **settings: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a process of the service, which is killed at the end of the block."""
    environment = os.environ | service.stack.settings.environment() | settings
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "lmaas", command, env=environment)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_killed_processes_lose_nothing(service: Service, tenant: Tenant, client: AsyncOpenAI) -> None:
    port = str(free_port())
    url = f"http://127.0.0.1:{port}"
    async with process(service, "gateway", LMAAS_PORT=port) as gateway, process(service, "jobs") as first:

        async def is_ready() -> bool:
            async with httpx.AsyncClient() as http:
                with suppress(httpx.TransportError):
                    return (await http.get(f"{url}/readyz")).status_code == 200
            return False

        await until(is_ready, timeout_s=30)
        async with service.client(tenant, url) as elsewhere:
            made = await create(elsewhere, stream=True, max_output_tokens=600, extra_body={"ignore_eos": True})
            seen = []
            with suppress(httpx.TransportError, openai.APIConnectionError):
                async for event in made:
                    seen.append(event)
                    if len(seen) == 1:
                        gateway.kill()
        response_id = seen[0].response.id

        async def is_running() -> bool:
            return bool((await client.responses.retrieve(response_id)).status == "in_progress")

        await until(is_running, timeout_s=30)
        first.kill()
        await first.wait()
    async with service.stack.db.begin(SYSTEM) as connection:
        await connection.exec_driver_sql("UPDATE job_runners SET seen_at = now() - interval '1 hour'")
    async with process(service, "jobs"):
        done = await ended(client, response_id, timeout_s=60)
    assert done.usage.output_tokens == 600
    restarted = parse(await log_of(service, tenant, response_id, 2))[0][0]
    assert restarted["code"] == "response_restarted"
    whole = check(await log_of(service, tenant, response_id), background=True, restarted_at=restarted["sequence_number"] + 1)
    assert whole.response == done.to_dict()

    async def all_told() -> bool:
        events = await service.stack.ledger(service.model, tenant)
        return [event.request_id[-2:] for event in events if event.status == UsageStatus.COMPLETED] == ["_2"] and len(events) == 2

    await until(all_told, timeout_s=30)


async def test_a_stopped_runner_gives_back_what_runs(service: Service, tenant: Tenant, client: AsyncOpenAI) -> None:
    async with runner(service.stack) as first:
        made = await create(client, max_output_tokens=400, extra_body={"ignore_eos": True})
        await until(lambda: first.runs.running == 1)
        await first.stop()
        assert (await client.responses.retrieve(made.id)).status == "queued"
        async with runner(service.stack):
            assert (await ended(client, made.id)).usage.output_tokens == 400


async def test_a_lease_whose_reply_was_lost_is_given_back(service: Service, client: AsyncOpenAI, jobs: Runner) -> None:
    found: list[Lease] = []

    async def is_leased() -> bool:
        made = await create(client)
        found.extend(await claim(jobs.db, jobs.id, 10))
        assert (await ended(client, made.id)).output_text
        return bool(found)

    # Repeat until the test leases a response before the runner does.
    await until(is_leased, timeout_s=30)


async def test_two_runners_run_each_response_once(service: Service, tenant: Tenant, client: AsyncOpenAI) -> None:
    async with AsyncExitStack() as exits:
        for _ in range(2):
            await exits.enter_async_context(runner(service.stack))
        made = await asyncio.gather(*(create(client, f"Number {number}.") for number in range(30)))
        done = await asyncio.gather(*(ended(client, each.id) for each in made))
    assert {each.status for each in done} <= {"completed", "incomplete"}
    events = await service.stack.ledger(service.model, tenant)
    assert sorted(event.request_id for event in events) == sorted(f"req_{each.id.removeprefix('resp_')}" for each in made)
    assert {event.status for event in events} == {UsageStatus.COMPLETED}


async def test_another_gateway_streams_the_same_log(service: Service, tenant: Tenant, client: AsyncOpenAI, jobs: Runner) -> None:
    async with service.stack.gateway() as other:
        async with service.client(tenant, other.url) as elsewhere:
            made = await create(elsewhere, stream=True, max_output_tokens=200, extra_body={"ignore_eos": True})
            first = await anext(aiter(made))
            await made.close()
        other.stop()
        await other.task
    resumed = await client.responses.retrieve(first.response.id, stream=True, starting_after=first.sequence_number)
    events = [event async for event in resumed]
    assert [event.sequence_number for event in events] == list(range(1, len(events) + 1))
    assert events[-1].response.usage.output_tokens == 200


async def failure(service: Service, client: AsyncOpenAI, response_id: str) -> tuple[str, str]:
    """Run a response that must fail, and return the code and the message of its error."""
    async with runner(service.stack):
        done = await ended(client, response_id)
    assert (done.status, done.output, done.usage) == ("failed", [], None)
    return done.error.code, done.error.message


async def test_a_response_fails_after_its_deadline(service: Service, tenant: Tenant, client: AsyncOpenAI) -> None:
    stream = await create(client, stream=True)
    response_id = (await anext(aiter(stream))).response.id
    async with service.stack.db.begin(tenant.id) as connection:
        await connection.exec_driver_sql("UPDATE background_responses SET deadline_at = now() WHERE id = %s", (response_id,))
    code, message = await failure(service, client, response_id)
    assert (code, message) == ("response_expired", "The response could not run within its deadline. Create it again.")
    events = [event async for event in stream]
    assert [(event.type, event.sequence_number) for event in events] == [("response.queued", 1), ("response.failed", 2)]
    assert await service.stack.ledger(service.model, tenant) == []


async def test_what_the_engine_refuses_fails(service: Service, client: AsyncOpenAI) -> None:
    made = await create(client, "word " * 5000)
    code, message = await failure(service, client, made.id)
    assert code == "context_length_exceeded"
    assert "maximum context length" in message


async def test_a_revoked_key_fails_its_responses(service: Service, tenant: Tenant, client: AsyncOpenAI) -> None:
    made = await create(client)
    key = new_key()
    await create_key(service.stack.db, tenant.id, Role.INFERENCE, "other", hash_key(key), shown_prefix(key))
    await revoke_key(service.stack.db, tenant.id, tenant.key_id)
    async with service.client(replace(tenant, key=key)) as other:
        code, message = await failure(service, other, made.id)
    assert code == "invalid_api_key"
    assert "revoked" in message


async def test_a_spent_quota_fails_a_response(service: Service, tenant: Tenant, client: AsyncOpenAI) -> None:
    await update_tenant(service.stack.db, tenant.id, {"tokens_per_month": 1})
    made = await create(client)
    code, message = await failure(service, client, made.id)
    assert code == "insufficient_quota"
    assert "tokens per month" in message


async def test_a_database_that_is_away_for_a_while(service: Service, tenant: Tenant, client: AsyncOpenAI, jobs: Runner) -> None:
    stream = await create(client, stream=True, max_output_tokens=400, extra_body={"ignore_eos": True})
    seen = []
    async for event in stream:
        seen.append(event)
        if event.type == "response.output_text.delta":
            break

    async def engine_is_done() -> bool:
        return not await service.replica.running()

    with away(str(service.stack.settings.database_url)):
        await until(engine_is_done)
    seen += [event async for event in stream]
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert seen[-1].response.usage.output_tokens == 400
    assert check(await log_of(service, tenant, seen[0].response.id), background=True).response == seen[-1].response.to_dict()

    async def told() -> bool:
        return [event.status for event in await service.stack.ledger(service.model, tenant)] == [UsageStatus.COMPLETED]

    await until(told)


async def test_a_response_survives_its_engine(postgres_url: str, valkey_url: str, tmp_path: Path) -> None:
    async with running(postgres_url, valkey_url, tmp_path) as stack:
        model = await stack.model("base")
        replicas = [await stack.replica(model, "--fake-token-ms 5") for _ in range(2)]
        service, tenant = Service(stack, model, replicas[0]), await stack.tenant()
        async with service.client(tenant) as client, runner(stack):
            stream = await create(client, stream=True, max_output_tokens=400, extra_body={"ignore_eos": True})
            seen = []
            async for event in stream:
                seen.append(event)
                if event.type == "response.output_text.delta":
                    break
            (busy,) = [replica for replica in replicas if await replica.running()]
            busy.kill()
            seen += [event async for event in stream]
            assert seen[-1].code == "response_restarted"
            resumed = await client.responses.retrieve(seen[0].response.id, stream=True, starting_after=seen[-1].sequence_number)
            rest = [event async for event in resumed]
            assert (rest[0].type, rest[-1].type) == ("response.in_progress", "response.incomplete")
            assert rest[-1].response.usage.output_tokens == 400

            async def told() -> bool:
                return len(await stack.ledger(model, tenant)) == 2

            await until(told)
            assert sorted(event.status for event in await stack.ledger(model, tenant)) == [UsageStatus.COMPLETED, UsageStatus.WASTED]
