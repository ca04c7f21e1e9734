"""Responses in the background over HTTP, as OpenAI's client uses them."""

import asyncio
import json
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from lmaas.inference.observers import Observers
from lmaas.inference.request_log import RequestLog
from lmaas.inference.request_traces import RequestTraces
from lmaas.states import UsageStatus
from lmaas.store.tenants import update_tenant
from lmaas.tracing.context import OWN_PREFIX
from lmaas.tracing.trace import Span
from tests.integration.background.runners import Runner, runner
from tests.integration.background.service import RESPONSES, Service, create, ended, log_of
from tests.integration.gateway.stack import Tenant
from tests.support.conditions import until
from tests.support.response_streams import check, parse


async def test_a_response_is_queued_and_completes(service: Service, tenant: Tenant, client: AsyncOpenAI) -> None:
    queued = await create(client, metadata={"a": "b"})
    assert (queued.status, queued.background, queued.output, queued.usage) == ("queued", True, [], None)
    assert (await client.responses.retrieve(queued.id)).to_dict() == queued.to_dict()
    own = await client.responses.input_items.list(queued.id)
    lines: list[str] = []
    traces: list[list[Span]] = []
    async with runner(service.stack, Observers(RequestLog(lines.append), RequestTraces(traces.append, 1.0))):
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
    # The run is logged, and belongs to the trace of the request that created the response.
    (line,) = [json.loads(line) for line in lines]
    assert (line["action"], line["belongs_to"], line["request_id"], line["outcome"]) == (
        "background",
        queued.id,
        event.request_id,
        "completed",
    )
    ((root, *stages),) = traces
    assert (root.name, root.trace_id) == ("background response", OWN_PREFIX + queued.id.removeprefix("resp_"))
    assert (root.attributes["lmaas.response.id"], [span.name for span in stages]) == (queued.id, ["admission", "queue", "delivery"])
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
            # The first client disconnects at the first event.
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


async def test_the_number_of_unfinished_responses_is_limited(service: Service, tenant: Tenant, client: AsyncOpenAI) -> None:
    await update_tenant(service.stack.db, tenant.id, {"tier": "free"})
    made = await asyncio.gather(*(create(client) for _ in range(20)))
    with pytest.raises(openai.RateLimitError) as refused:
        await create(client)
    assert refused.value.code == "background_limit_exceeded"
    for each in made:
        await client.responses.cancel(each.id)
    await create(client)


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
