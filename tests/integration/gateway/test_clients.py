"""Typical uses by clients' libraries, with OpenAI's own: tool loops, older forms, and headers that describe the service."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from openai import AsyncOpenAI, BadRequestError, InternalServerError

from lmaas.states import UsageStatus
from lmaas.store.models import BaseModel
from tests.integration.gateway.stack import CHAT, COMPLETION, Stack, Tenant, running

CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city", "days"]}
WEATHER: dict[str, Any] = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
QUESTION: dict[str, Any] = {"role": "user", "content": "Use the tool."}
PATHS = pytest.mark.parametrize("path", [CHAT, COMPLETION])


@dataclass(frozen=True)
class Service:
    """A stack with the model `base`, and a tenant's client."""

    stack: Stack
    base: BaseModel
    tenant: Tenant
    openai: AsyncOpenAI

    async def post(self, path: str, **body: Any) -> dict[str, Any]:
        """Return the response to a plain request."""
        prompt: dict[str, Any] = {"messages": [QUESTION]} if path == CHAT else {"prompt": "one two three"}
        async with self.stack.client(self.tenant) as http:
            response = await http.post(path, json={"model": "base", "max_tokens": 5} | prompt | body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer


@pytest.fixture(scope="module")
async def service(postgres_url: str, valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    async with running(postgres_url, valkey_url, tmp_path_factory.mktemp("stack")) as stack:
        base, tenant = await stack.model("base"), await stack.tenant()
        await stack.replica(base, "--fake-token-ms 1")
        async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key=tenant.key, max_retries=0) as client:
            yield Service(stack, base, tenant, client)


@pytest.mark.parametrize("form", ["object", "model_dump", "without nulls", "as other libraries", "broken"])
async def test_the_documented_tool_loop(service: Service, form: str) -> None:
    create = service.openai.chat.completions.create
    messages: list[Any] = [QUESTION]
    for _ in range(3):
        answer = await create(model="base", messages=messages, tools=[WEATHER])
        assert answer.choices[0].finish_reason == "tool_calls"
        message = answer.choices[0].message
        (call,) = message.tool_calls
        assert json.loads(call.function.arguments).keys() == {"city", "days"}
        returned = {
            "object": message,
            "model_dump": message.model_dump(),
            "without nulls": message.model_dump(exclude_none=True),
            "as other libraries": message.model_dump() | {"provider_specific_fields": {"refusal": None}, "parsed": None, "id": "msg_1"},
            "broken": message.model_dump() | {"tool_calls": [call.model_dump() | {"function": {"name": "weather", "arguments": '{"ci'}}]},
        }[form]
        messages += [returned, {"role": "tool", "tool_call_id": call.id, "content": "Sunny."}]
        final = await create(model="base", messages=messages, tools=[WEATHER], max_tokens=5)
        assert final.choices[0].message.content
        messages += [final.choices[0].message, QUESTION]


async def test_a_streamed_tool_loop(service: Service) -> None:
    async with service.openai.chat.completions.stream(model="base", messages=[QUESTION], tools=[WEATHER]) as stream:
        message = (await stream.get_final_completion()).choices[0].message
    (call,) = message.tool_calls
    messages = [QUESTION, message, {"role": "tool", "tool_call_id": call.id, "content": "Sunny."}]
    assert (await service.openai.chat.completions.create(model="base", messages=messages, max_tokens=5)).choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
async def test_the_deprecated_loop_of_functions(service: Service, stream: bool) -> None:
    functions = [WEATHER["function"]]
    asked = await service.openai.chat.completions.create(
        model="base", messages=[QUESTION], functions=functions, function_call="auto", stream=stream
    )
    if stream:
        parts = [choice async for chunk in asked for choice in chunk.choices]
        assert not any(part.delta.tool_calls for part in parts)
        call = next(part.delta.function_call for part in parts if part.delta.function_call)
        assert parts[-1].finish_reason == "function_call"
        returned: Any = {"role": "assistant", "content": None, "function_call": {"name": call.name, "arguments": call.arguments}}
    else:
        (choice,) = asked.choices
        assert choice.finish_reason == "function_call"
        assert choice.message.tool_calls is None
        returned, call = choice.message, choice.message.function_call
    assert call.name == "weather"
    assert json.loads(call.arguments).keys() == {"city", "days"}
    messages = [QUESTION, returned, {"role": "function", "name": "weather", "content": "Sunny."}]
    final = await service.openai.chat.completions.create(model="base", messages=messages, functions=functions, max_tokens=5)
    assert final.choices[0].message.content


@PATHS
@pytest.mark.parametrize(("asked", "used"), [(None, "default"), ("auto", "default"), ("default", "default"), ("flex", "flex")])
async def test_an_answer_names_its_tier_and_its_fingerprint(service: Service, path: str, asked: str | None, used: str) -> None:
    plain = await service.post(path, service_tier=asked)
    got = await service.stack.stream(
        service.tenant,
        path,
        {"model": "base", "max_tokens": 5, "service_tier": asked, "stream_options": {"include_usage": True}}
        | ({"messages": [QUESTION]} if path == CHAT else {"prompt": "one"}),
    )
    assert got.done
    assert plain["system_fingerprint"].startswith("fp_")
    for answer in (plain, *got.events):
        assert (answer["service_tier"], answer["system_fingerprint"]) == (used, plain["system_fingerprint"])
    for raw in got.raw[:-1]:
        assert raw.count('"system_fingerprint"') == 1
        assert "vllm" not in raw


async def test_an_echo_without_generation(service: Service) -> None:
    plain = await service.post(COMPLETION, echo=True, max_tokens=0, prompt=["one two", "three"])
    assert [choice["text"] for choice in plain["choices"]] == ["one two", "three"]
    assert {choice["finish_reason"] for choice in plain["choices"]} == {"length"}
    usage = {"prompt_tokens": 3, "total_tokens": 3, "completion_tokens": 0}
    assert usage.items() <= plain["usage"].items()
    body = {"model": "base", "prompt": "one two three", "echo": True, "max_tokens": 0, "stream_options": {"include_usage": True}}
    got = await service.stack.stream(service.tenant, COMPLETION, body)
    assert "".join(got.texts()[0]) == "one two three"
    assert usage.items() <= got.events[-1]["usage"].items()
    # The engine counts a token for each prompt, and so does the ledger.
    events = await service.stack.ledger(service.base, service.tenant)
    assert sorted((event.prompt_tokens, event.completion_tokens) for event in events[:2]) == [(3, 1), (3, 2)]


async def test_more_choices_than_a_replica_has_slots(service: Service) -> None:
    answer = await service.post(CHAT, n=128, max_tokens=2)
    assert [choice["index"] for choice in answer["choices"]] == list(range(128))


async def test_several_greedy_answers(service: Service) -> None:
    answer = await service.openai.chat.completions.create(model="base", messages=[QUESTION], n=3, temperature=0, max_tokens=3)
    assert len(answer.choices) == 3


async def test_a_request_that_an_engine_fails_on_is_told_so_and_is_not_tried_again(service: Service) -> None:
    before = await service.stack.ledger(service.base, service.tenant)
    with pytest.raises(InternalServerError) as caught:
        await service.openai.completions.create(model="base", prompt="fail on this request", max_tokens=5)
    assert caught.value.body["code"] == "request_failed"
    assert caught.value.response.headers["x-should-retry"] == "false"
    told = await service.stack.ledger(service.base, service.tenant)
    assert len(told) == len(before) + 1
    assert (told[0].status, told[0].code) == (UsageStatus.FAILED, "request_failed")
    assert (await service.post(COMPLETION))["choices"]


async def test_an_error_names_the_clients_parameter(service: Service) -> None:
    with pytest.raises(BadRequestError) as caught:
        await service.openai.chat.completions.create(model="base", messages=[QUESTION], max_completion_tokens=100_000)
    assert (caught.value.code, caught.value.param) == ("out_of_range", "max_completion_tokens")
    with pytest.raises(BadRequestError) as caught:
        await service.openai.chat.completions.create(model="base", messages=[QUESTION | {"content": "word " * 3000}], max_tokens=5)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
