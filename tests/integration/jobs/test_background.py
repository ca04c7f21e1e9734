"""Responses in the background over HTTP, as OpenAI's client uses them."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from lmaas.keys import hash_key, new_key, shown_prefix
from lmaas.states import UsageStatus
from lmaas.store.models import BaseModel
from lmaas.store.scopes import SYSTEM
from lmaas.store.tenants import create_key, revoke_key, update_tenant
from lmaas.types import Role
from tests.integration.gateway.stack import Replica, Stack, Tenant, running
from tests.integration.jobs.background import Runner, runner
from tests.integration.protocols.responses.test_stored import away
from tests.support.conditions import until
from tests.support.processes import free_port
from tests.support.response_streams import check, parse

RESPONSES = "/v1/responses"
ENDS = {"completed", "incomplete", "failed", "cancelled"}


@dataclass(frozen=True)
class Service:
    stack: Stack
    model: BaseModel
    replica: Replica

    def client(self, tenant: Tenant, url: str = "") -> AsyncOpenAI:
        """Return OpenAI's client, whose answers are compared with the OpenAPI document."""
        http = self.stack.client(tenant, url)
        return AsyncOpenAI(base_url=f"{url or self.stack.url}/v1", api_key=tenant.key, max_retries=0, http_client=http)


@pytest.fixture(scope="module")
async def service(postgres_url: str, valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    async with running(postgres_url, valkey_url, tmp_path_factory.mktemp("stack")) as stack:
        model = await stack.model("base")
        yield Service(stack, model, await stack.replica(model, "--fake-token-ms 5"))


@pytest.fixture
async def tenant(service: Service) -> Tenant:
    return await service.stack.tenant()


@pytest.fixture
async def client(service: Service, tenant: Tenant) -> AsyncIterator[AsyncOpenAI]:
    async with service.client(tenant) as client:
        yield client


@pytest.fixture
async def jobs(service: Service) -> AsyncIterator[Runner]:
    async with runner(service.stack) as jobs:
        yield jobs


async def create(client: AsyncOpenAI, words: str = "Say hi.", **more: Any) -> Any:
    more.setdefault("max_output_tokens", 8)
    return await client.responses.create(model="base", input=words, background=True, **more)


async def ended(client: AsyncOpenAI, response_id: str, timeout_s: float = 20) -> Any:
    """Poll as OpenAI's guide does, until the response has ended."""
    found: list[Any] = []

    async def is_over() -> bool:
        found.append(await client.responses.retrieve(response_id))
        return found[-1].status in ENDS

    await until(is_over, timeout_s=timeout_s)
    return found[-1]


async def log_of(service: Service, tenant: Tenant, response_id: str, after: int | None = None) -> bytes:
    """Stream a response from its log to its end."""
    query: dict[str, Any] = {"stream": "true"} | ({} if after is None else {"starting_after": after})
    async with service.stack.client(tenant) as http:
        answer = await http.get(f"{RESPONSES}/{response_id}", params=query)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return answer.content


async def test_a_response_is_queued_and_completes(service: Service, tenant: Tenant, client: AsyncOpenAI) -> None:
    queued = await create(client, metadata={"a": "b"})
    assert (queued.status, queued.background, queued.output, queued.usage) == ("queued", True, [], None)
    assert (await client.responses.retrieve(queued.id)).to_dict() == queued.to_dict()
    own = await client.responses.input_items.list(queued.id)
    async with runner(service.stack):
        done = await ended(client, queued.id)
    assert done.status == "incomplete" if done.incomplete_details else done.status == "completed"
    assert done.output_text
    assert done.created_at == queued.created_at
    assert (done.id, done.metadata, done.background) == (queued.id, {"a": "b"}, True)
    assert [item.to_dict() for item in (await client.responses.input_items.list(queued.id)).data] == [each.to_dict() for each in own.data]
    (event,) = await service.stack.ledger(service.model, tenant)
    assert event.status == UsageStatus.COMPLETED
    assert event.request_id == f"req_{queued.id.removeprefix('resp_')}"
    assert (event.prompt_tokens, event.completion_tokens) == (done.usage.input_tokens, done.usage.output_tokens)
    following = await client.responses.create(model="base", input="And?", previous_response_id=queued.id, max_output_tokens=4)
    assert following.usage.input_tokens > done.usage.input_tokens


async def test_a_stream_can_be_resumed_after_every_event(service: Service, tenant: Tenant, client: AsyncOpenAI, jobs: Runner) -> None:
    events = [event async for event in await create(client, stream=True)]
    response_id = events[0].response.id
    whole = await log_of(service, tenant, response_id)
    checked = check(whole, background=True)
    parsed, _ = parse(whole)
    assert [event.to_dict()["type"] for event in events] == [event["type"] for event in parsed]
    assert checked.response == (await client.responses.retrieve(response_id)).to_dict() == events[-1].response.to_dict()
    for number in range(len(parsed)):
        rest = await log_of(service, tenant, response_id, number)
        assert (parse(rest)[0] if rest else []) == parsed[number + 1 :]
    resumed = await client.responses.retrieve(response_id, stream=True, starting_after=2)
    assert [event.sequence_number async for event in resumed] == list(range(3, len(parsed)))


async def test_a_client_that_leaves_at_the_first_event_has_its_response(service: Service, client: AsyncOpenAI) -> None:
    stream = await create(client, stream=True)
    first = await anext(aiter(stream))
    assert (first.type, first.response.status) == ("response.created", "queued")
    await stream.close()
    async with runner(service.stack):
        assert (await ended(client, first.response.id)).output_text


@pytest.mark.parametrize("stream", [False, True])
async def test_cancelling_is_idempotent_and_charges_what_ran(
    service: Service, tenant: Tenant, client: AsyncOpenAI, jobs: Runner, stream: bool
) -> None:
    made = await create(client, max_output_tokens=1900, stream=stream, extra_body={"ignore_eos": True})
    response_id = (await anext(aiter(made))).response.id if stream else made.id

    async def is_running() -> bool:
        return bool((await client.responses.retrieve(response_id)).status == "in_progress")

    await until(is_running)
    cancelled = await client.responses.cancel(response_id)
    assert (cancelled.status, cancelled.output, cancelled.usage) == ("cancelled", [], None)
    assert (await client.responses.cancel(response_id)).to_dict() == cancelled.to_dict()
    assert (await client.responses.retrieve(response_id)).to_dict() == cancelled.to_dict()

    async def is_settled() -> bool:
        events = await service.stack.ledger(service.model, tenant)
        return [event.status for event in events] == [UsageStatus.ABORTED]

    await until(is_settled)
    await until(lambda: jobs.runs.running == 0)
    (event,) = await service.stack.ledger(service.model, tenant)
    assert 0 < event.completion_tokens < 1900
    if stream:
        rest = [event async for event in made]
        assert (rest[-1].type, rest[-1].code) == ("error", "response_cancelled")
        numbers = [event.sequence_number for event in rest]
        assert numbers == list(range(1, len(rest) + 1))


async def test_a_queued_response_is_cancelled_at_once(service: Service, tenant: Tenant, client: AsyncOpenAI) -> None:
    made = await create(client)
    assert (await client.responses.cancel(made.id)).status == "cancelled"
    async with runner(service.stack):
        other = await create(client)
        assert (await ended(client, other.id)).output_text
    assert (await client.responses.retrieve(made.id)).status == "cancelled"
    assert len(await service.stack.ledger(service.model, tenant)) == 1


async def test_what_has_ended_cannot_be_cancelled_any_more(client: AsyncOpenAI, jobs: Runner) -> None:
    made = await create(client)
    done = await ended(client, made.id)
    assert (await client.responses.cancel(made.id)).to_dict() == done.to_dict()
    foreground = await client.responses.create(model="base", input="Hi.", max_output_tokens=2)
    with pytest.raises(openai.BadRequestError) as refused:
        await client.responses.cancel(foreground.id)
    assert refused.value.code == "not_cancellable"
    with pytest.raises(openai.NotFoundError):
        await client.responses.cancel("resp_unknown")


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
        # A client that stopped in the middle of the first run hears that too.
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


async def test_deletion_at_every_stage(service: Service, tenant: Tenant, client: AsyncOpenAI) -> None:
    queued = await create(client, stream=True)
    response_id = (await anext(aiter(queued))).response.id
    await client.responses.delete(response_id)
    rest = [event async for event in queued]
    assert rest[-1].code == "response_deleted"
    async with runner(service.stack) as jobs:
        running_one = await create(client, max_output_tokens=1900, extra_body={"ignore_eos": True})

        async def is_running() -> bool:
            return bool((await client.responses.retrieve(running_one.id)).status == "in_progress")

        await until(is_running)
        await client.responses.delete(running_one.id)
        await until(lambda: jobs.runs.running == 0)
        made = await create(client)
        await ended(client, made.id)
        await client.responses.delete(made.id)
    for gone in (response_id, running_one.id, made.id):
        for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
            with pytest.raises(openai.NotFoundError):
                await call(gone)
    statuses = sorted(event.status for event in await service.stack.ledger(service.model, tenant))
    assert statuses == [UsageStatus.ABORTED, UsageStatus.COMPLETED]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"store": False}, 400, "invalid_request"),
        ({"background_options": {"completion_window": "2h"}}, 400, "unsupported_parameter"),
        ({"background": "yes"}, 400, "invalid_type"),
        ({"model": "captain"}, 404, "model_not_found"),
        ({"previous_response_id": "resp_unknown"}, 404, "previous_response_not_found"),
        ({"conversation": "conv_unknown"}, 404, "conversation_not_found"),
        ({"input": []}, 400, "empty_prompt"),
        ({"max_output_tokens": 5000}, 400, "out_of_range"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": []}}}, 400, "invalid_schema"),
    ],
)
async def test_a_request_is_checked_before_it_is_stored(
    service: Service, tenant: Tenant, body: dict[str, Any], status: int, code: str
) -> None:
    async with service.stack.client(tenant) as http:
        answer = await http.post(RESPONSES, json={"model": "base", "input": "Hi.", "background": True} | body)
    assert (answer.status_code, answer.json().get("error", {}).get("code")) == (status, code)


async def test_an_unfinished_response_cannot_be_continued(client: AsyncOpenAI) -> None:
    made = await create(client)
    for background in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            await client.responses.create(model="base", input="And?", previous_response_id=made.id, background=background)
        assert refused.value.code == "previous_response_not_finished"


async def test_conversations_and_tools_work_in_the_background(client: AsyncOpenAI, jobs: Runner) -> None:
    conversation = await client.conversations.create()
    tool: Any = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
    first = await create(client, conversation=conversation.id)
    await ended(client, first.id)
    second = await create(client, conversation=conversation.id, tools=[tool], tool_choice="required", max_output_tokens=200)
    done = await ended(client, second.id)
    assert [item.type for item in done.output] == ["function_call"]
    items = [item.type async for item in client.conversations.items.list(conversation.id, order="asc")]
    assert items == ["message", "message", "message", "function_call"]


@pytest.mark.parametrize("number", ["-1", "x", "1.5", "999999999999999999999", "2147483647", "1e3", ""])
async def test_hostile_numbers(service: Service, tenant: Tenant, client: AsyncOpenAI, number: str) -> None:
    made = await create(client, stream=True)
    response_id = (await anext(aiter(made))).response.id
    await made.close()
    async with service.stack.client(tenant) as http:
        answer = await http.get(f"{RESPONSES}/{response_id}", params={"stream": "true", "starting_after": number})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == "starting_after"
        ahead = await http.get(f"{RESPONSES}/{response_id}", params={"stream": "true", "starting_after": "2"})
        assert (ahead.status_code, ahead.json()["error"]["code"]) == (400, "invalid_cursor")
        alone = await http.get(f"{RESPONSES}/{response_id}", params={"starting_after": "1"})
        assert (alone.status_code, alone.json()["error"]["param"]) == (400, "starting_after")
        await http.delete(f"{RESPONSES}/{response_id}")


async def test_nothing_of_another_tenant_is_seen(service: Service, client: AsyncOpenAI) -> None:
    made = await create(client, stream=True)
    response_id = (await anext(aiter(made))).response.id
    await made.close()
    async with service.client(await service.stack.tenant()) as other:
        for call in (other.responses.retrieve, other.responses.cancel, other.responses.delete, other.responses.input_items.list):
            with pytest.raises(openai.NotFoundError):
                await call(response_id)
        with pytest.raises(openai.NotFoundError):
            await other.responses.retrieve(response_id, stream=True)
    await client.responses.delete(response_id)


async def test_only_a_streamed_response_can_be_streamed_again(client: AsyncOpenAI, jobs: Runner) -> None:
    made = await create(client)
    with pytest.raises(openai.BadRequestError) as refused:
        await client.responses.retrieve(made.id, stream=True)
    assert refused.value.code == "events_not_kept"
    await ended(client, made.id)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_repeat_with_the_same_key_gets_the_same_response(service: Service, tenant: Tenant, jobs: Runner, stream: bool) -> None:
    body = {"model": "base", "input": "Hi.", "background": True, "stream": stream, "max_output_tokens": 4}
    headers = {"idempotency-key": f"key-{stream}"}
    async with service.stack.client(tenant) as http:
        if stream:
            # The first client leaves at the first event.
            async with http.stream("POST", RESPONSES, json=body, headers=headers) as answer:
                await anext(answer.aiter_bytes())
        else:
            await http.post(RESPONSES, json=body, headers=headers)
        answers = [await http.post(RESPONSES, json=body, headers=headers) for _ in range(2)]
        assert {answer.status_code for answer in answers} == {200}
        assert {answer.headers["idempotency-replayed"] for answer in answers} == {"true"}
        if stream:
            ids = {check(answer.content, background=True).response["id"] for answer in answers}
        else:
            ids = {answer.json()["id"] for answer in answers}
            assert {answer.json()["status"] for answer in answers} == {"queued"}
        other = await http.post(RESPONSES, json=body | {"input": "Other."}, headers=headers)
        assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_mismatch")
    assert len(ids) == 1


async def test_the_number_of_unfinished_responses_is_limited(service: Service, client: AsyncOpenAI) -> None:
    limit = 200
    made = [await asyncio.gather(*(create(client) for _ in range(20))) for _ in range(limit // 20)]
    with pytest.raises(openai.RateLimitError) as refused:
        await create(client)
    assert refused.value.code == "background_limit_exceeded"
    await client.responses.cancel(made[0][0].id)
    await create(client)


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


async def test_an_adapter_in_the_background(service: Service, tenant: Tenant, client: AsyncOpenAI, jobs: Runner) -> None:
    name = await service.stack.adapter(tenant, "pirate", service.model)
    made = await client.responses.create(model="pirate", input="Hi.", background=True, max_output_tokens=4)
    assert (await ended(client, made.id)).model == "pirate"
    (event,) = await service.stack.ledger(service.model, tenant)
    assert (event.model, event.adapter) == ("pirate", name)


async def test_the_events_are_gone_before_the_response(service: Service, tenant: Tenant, client: AsyncOpenAI, jobs: Runner) -> None:
    events = [event async for event in await create(client, stream=True)]
    response_id = events[0].response.id
    async with service.stack.client(tenant) as http:
        head = await http.head(f"{RESPONSES}/{response_id}", params={"stream": "true"})
        assert (head.status_code, head.content) == (200, b"")
    async with service.stack.db.begin(tenant.id) as connection:
        found = await connection.exec_driver_sql(
            "SELECT extract(epoch FROM expires_at - ended_at) FROM background_responses WHERE id = %s", (response_id,)
        )
        assert found.scalar_one() == 600
        await connection.exec_driver_sql("UPDATE background_responses SET expires_at = now() WHERE id = %s", (response_id,))
    for after in (openai.omit, 1):
        with pytest.raises(openai.BadRequestError) as refused:
            await client.responses.retrieve(response_id, stream=True, starting_after=after)
        assert refused.value.code == "events_not_kept"
    assert (await client.responses.retrieve(response_id)).to_dict() == events[-1].response.to_dict()


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
