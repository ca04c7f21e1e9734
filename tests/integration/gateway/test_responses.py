"""Responses through the gateway: output, streams, tools, waiting, failures and usage."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from openai import APIStatusError, AsyncOpenAI
from pydantic import BaseModel as Shape

from lmaas.states import UsageStatus
from lmaas.store.models import BaseModel
from tests.integration.gateway.stack import Stack, Tenant, running
from tests.support.conditions import until
from tests.support.response_streams import ResponseStream, check, parse

RESPONSES = "/v1/responses"
FUNCTION = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CUSTOM = {"type": "custom", "name": "apply_patch", "description": "Edits files."}


@pytest.fixture(scope="module")
async def stack(postgres_url: str, valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    async with running(postgres_url, valkey_url, tmp_path_factory.mktemp("stack")) as stack:
        yield stack


@pytest.fixture(scope="module")
async def base(stack: Stack) -> BaseModel:
    model = await stack.model("base")
    await stack.replica(model, "--fake-token-ms 2")
    return model


@pytest.fixture(scope="module")
async def cold(stack: Stack, base: BaseModel) -> dict[str, BaseModel]:
    """Create models without an engine, which the gateway knows before one of them is called."""
    models = {name: await stack.model(name) for name in ("late", "never")}
    other = await stack.tenant()

    async def known() -> bool:
        async with stack.client(other) as http:
            return (await http.get("/v1/models/never")).status_code == 200

    await until(known)
    return models


@pytest.fixture
async def tenant(stack: Stack) -> Tenant:
    return await stack.tenant()


@pytest.fixture
async def client(stack: Stack, tenant: Tenant, base: BaseModel) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key=tenant.key, max_retries=0) as client:
        yield client


def ask(model: str = "base", tokens: int = 6, **more: Any) -> dict[str, Any]:
    return {"model": model, "input": "Say hi.", "max_output_tokens": tokens, "store": False, **more}


async def post(stack: Stack, tenant: Tenant, body: dict[str, Any], headers: dict[str, str] | None = None) -> httpx.Response:
    async with stack.client(tenant) as http:
        return await http.post(RESPONSES, json=body, headers=headers)


class Reading:
    """The bytes of a stream as they arrive."""

    def __init__(self) -> None:
        self.received = b""

    async def read(self, stack: Stack, tenant: Tenant, body: dict[str, Any], url: str = "") -> ResponseStream:
        """Read a stream to its end and check it."""
        async with stack.client(tenant, url) as http, http.stream("POST", RESPONSES, json=body | {"stream": True}) as response:
            assert response.status_code == 200, await response.aread()
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
            async for chunk in response.aiter_bytes():
                self.received += chunk
            found = check(self.received)
            assert found.response["id"].removeprefix("resp_") == response.headers["x-request-id"].removeprefix("req_")
        return found


async def read(stack: Stack, tenant: Tenant, body: dict[str, Any], url: str = "") -> ResponseStream:
    return await Reading().read(stack, tenant, body, url)


async def test_a_stream_and_a_whole_answer_say_the_same(stack: Stack, base: BaseModel, tenant: Tenant) -> None:
    streamed = await read(stack, tenant, ask())
    whole = (await post(stack, tenant, ask())).json()
    assert streamed.response["status"] == whole["status"] == "incomplete"
    assert streamed.text == whole["output"][0]["content"][0]["text"]
    assert (streamed.response["usage"], streamed.response["model"]) == (whole["usage"], "base")
    assert whole["usage"]["output_tokens"] == 6
    events = await stack.ledger(base, tenant)
    usage = whole["usage"]
    assert [(event.status, event.prompt_tokens, event.completion_tokens) for event in events] == [
        (UsageStatus.COMPLETED, usage["input_tokens"], 6)
    ] * 2
    assert {f"resp_{event.request_id.removeprefix('req_')}" for event in events} == {streamed.response["id"], whole["id"]}


async def test_openais_client(client: AsyncOpenAI) -> None:
    response = await client.responses.create(**ask(tokens=60))
    assert response.status == "completed"
    assert response.output_text
    async with client.responses.stream(**ask(tokens=60)) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert final.output_text == response.output_text
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"


class Weather(Shape):
    """The arguments of a tool."""

    city: str


async def test_functions_and_custom_tools(client: AsyncOpenAI) -> None:
    asked = ask(input="Please use the tool.", tools=[FUNCTION], tokens=60)
    async with client.responses.stream(**asked) as stream:
        call = (await stream.get_final_response()).output[0]
    assert call.type == "function_call"
    assert Weather.model_validate_json(call.arguments)
    custom = (
        await client.responses.create(**asked | {"tools": [CUSTOM], "tool_choice": {"type": "custom", "name": "apply_patch"}})
    ).output[0]
    assert custom.type == "custom_tool_call"
    assert (custom.name, custom.input) == ("apply_patch", "x")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    after = await client.responses.create(
        **asked | {"input": [{"role": "user", "content": "?"}, call.to_dict(), result], "tools": [FUNCTION]}
    )
    assert after.output_text


async def test_an_adapter_by_its_name(stack: Stack, base: BaseModel, tenant: Tenant) -> None:
    internal = await stack.adapter(tenant, "support-bot", base)
    for body in (ask("support-bot@1"), ask("support-bot@1", stream=True)):
        text = (await post(stack, tenant, body)).text
        assert internal not in text
        assert '"model":"support-bot@1"' in text


async def test_refusals_cost_nothing(stack: Stack, base: BaseModel, tenant: Tenant) -> None:
    for changes, status, code, param in (
        ({"background": True, "store": False}, 400, "invalid_request", "store"),
        ({"tools": [{"type": "web_search"}]}, 400, "unsupported_parameter", "tools[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            400,
            "unsupported_content",
            "input[0].content",
        ),
        ({"model": "nothing"}, 404, "model_not_found", "model"),
        ({"max_output_tokens": 5000}, 400, "out_of_range", "max_output_tokens"),
        ({"input": "word " * 3000}, 400, "context_length_exceeded", "input"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": []}}}, 400, "invalid_schema", "text.format"),
        ({"conversation": "c", "previous_response_id": "r"}, 400, "invalid_request", "conversation"),
    ):
        for streams in (False, True):
            response = await post(stack, tenant, ask(stream=streams) | changes)
            assert response.status_code == status, changes
            error = response.json()["error"]
            assert (response.status_code, error["code"], error["param"]) == (status, code, param), changes
    assert {(event.completion_tokens, event.charge_picousd) for event in await stack.ledger(base, tenant)} <= {(0, 0)}


async def test_half_a_character_in_the_input(stack: Stack, base: BaseModel, tenant: Tenant) -> None:
    text = json.dumps(ask(instructions="\ud83c cut")).encode()
    async with stack.client(tenant) as http:
        response = await http.post(RESPONSES, content=text, headers={"content-type": "application/json"})
    assert response.json()["instructions"] == "\ufffd cut"


async def test_any_text_can_be_stored_and_continued(client: AsyncOpenAI) -> None:
    first = await client.responses.create(model="base", input="a\0b \u2028 🎉", instructions="\0", metadata={"k": "é"}, max_output_tokens=4)
    second = await client.responses.create(model="base", input="c", previous_response_id=first.id, max_output_tokens=4)
    assert (second.previous_response_id, first.instructions) == (first.id, "\0")


async def test_a_repeated_request_gets_the_same_response(stack: Stack, base: BaseModel, tenant: Tenant) -> None:
    for streams in (False, True):
        headers = {"idempotency-key": f"key-{streams}"}
        first, second = [await post(stack, tenant, ask(stream=streams), headers) for _ in range(2)]
        assert first.content == second.content
        assert second.headers["idempotency-replayed"] == "true"
    assert len(await stack.ledger(base, tenant)) == 2


async def test_a_client_that_waits_and_an_engine_that_comes(stack: Stack, tenant: Tenant, cold: dict[str, BaseModel]) -> None:
    reading = Reading()
    task = asyncio.create_task(reading.read(stack, tenant, ask("late")))
    await until(lambda: reading.received)
    assert reading.received.startswith(b": queued position=1")
    await stack.replica(cold["late"])
    found = await task
    assert found.comments
    assert found.response["status"] == "incomplete"


async def test_past_its_deadline_a_stream_ends_with_a_failure(stack: Stack, tenant: Tenant, cold: dict[str, BaseModel]) -> None:
    async with stack.gateway(queue_deadline_s=1.2) as gateway:
        found = await read(stack, tenant, ask("never"), gateway.url)
    assert found.comments
    assert found.kinds == ["response.created", "response.in_progress", "response.failed"]
    assert found.response["error"]["code"] == "server_error"
    (event,) = await stack.ledger(cold["never"], tenant)
    assert (event.status, event.code) == (UsageStatus.EXPIRED, "no_capacity")


async def test_an_engine_that_dies_in_the_middle(stack: Stack, tenant: Tenant) -> None:
    pool = await stack.model("dying")
    replica = await stack.replica(pool, "--fake-token-ms 30")
    reading = Reading()
    task = asyncio.create_task(reading.read(stack, tenant, ask("dying", tokens=1000, ignore_eos=True)))
    await until(lambda: reading.received.count(b"output_text.delta") > 4)
    replica.kill()
    found = await task
    assert found.response["status"] == "failed"
    assert found.response["error"]["code"] == "server_error"
    assert found.text == "".join(found.pieces("response.output_text.delta"))
    (event,) = await stack.ledger(pool, tenant)
    assert (event.status, event.code) == (UsageStatus.FAILED, "engine_failed")
    assert event.completion_tokens >= found.response["usage"]["output_tokens"] > 0


async def test_an_engine_lost_before_the_first_byte_costs_only_time(stack: Stack, tenant: Tenant) -> None:
    pool = await stack.model("frozen")
    lost = await stack.replica(pool)
    lost.freeze()
    tasks = [asyncio.create_task(post(stack, tenant, ask("frozen", stream=streams))) for streams in (True, False)]

    async def granted() -> bool:
        return bool((await stack.scheduler.stats(pool.id))["load"] == 2)

    await until(granted)
    await stack.replica(pool)
    lost.kill()
    streamed, whole = await asyncio.gather(*tasks)
    events, _ = parse(streamed.content)
    assert check(streamed.content).text == whole.json()["output"][0]["content"][0]["text"]
    assert events[0]["type"] == "response.created"
    assert {event.status for event in await stack.ledger(pool, tenant)} == {UsageStatus.COMPLETED}


async def test_a_client_that_leaves_is_charged_what_was_made(stack: Stack, tenant: Tenant) -> None:
    pool = await stack.model("left")
    replica = await stack.replica(pool, "--fake-token-ms 20")
    before = (await replica.counters())[1]
    reading = Reading()
    task = asyncio.create_task(reading.read(stack, tenant, ask("left", tokens=1000, ignore_eos=True)))
    await until(lambda: reading.received.count(b"output_text.delta") > 2)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await stack.idle(pool)
    await stack.told_once(pool, 1)
    (event,) = await stack.ledger(pool, tenant)
    assert event.status == UsageStatus.ABORTED
    assert event.completion_tokens == (await replica.counters())[1] - before > 0


async def test_a_chain_of_responses(client: AsyncOpenAI, stack: Stack, base: BaseModel) -> None:
    first = await client.responses.create(model="base", input="One two three.", instructions="Be brief.", max_output_tokens=60)
    second = await client.responses.create(model="base", input="Four.", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    assert second.usage is not None
    assert first.usage is not None
    # The whole conversation without the instructions, which are not inherited.
    said = [
        {"role": "user", "content": "One two three."},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "Four."},
    ]
    again = await client.responses.create(model="base", input=said, store=False)
    assert again.output_text == second.output_text
    assert again.usage is not None
    assert again.usage.input_tokens == second.usage.input_tokens
    referred = [said[0], {"type": "item_reference", "id": first.output[0].id}, said[2]]
    assert (await client.responses.create(model="base", input=referred, store=False)).output_text == second.output_text
    other = await stack.tenant()
    for changes in ({"previous_response_id": first.id}, {"input": referred}, {"previous_response_id": "resp_" + "0" * 24}):
        response = await post(stack, other, {"model": "base", "input": "x"} | changes)
        assert response.status_code == 404
    with pytest.raises(APIStatusError, match="404"):
        await client.responses.create(model="base", input="x", previous_response_id=again.id)


async def test_structured_output(client: AsyncOpenAI) -> None:
    response = await client.responses.create(
        **ask(tokens=60), text={"format": {"type": "json_schema", "name": "w", "schema": Weather.model_json_schema()}}
    )
    assert response.status == "completed"
    assert response.text is not None
    assert response.text.format is not None
    assert response.text.format.type == "json_schema"
