"""OpenAI's library for Python: responses, conversations and their items."""

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from tests.integration.clients.conftest import Service
from tests.integration.clients.things import CALL, Trip

PATH = "/v1/responses"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
TOOL: Any = {"type": "function", "name": "weather", "description": "Forecast.", "parameters": CITY, "strict": True}


@pytest.fixture
async def client(environment: Service) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI() as client:
        yield client


async def test_an_answer(client: AsyncOpenAI) -> None:
    answer = await client.responses.create(model="base", instructions="Be brief.", input="Hello.", metadata={"a": "b"})
    assert answer.status == "completed"
    assert answer.usage is not None
    assert answer.usage.output_tokens == len(answer.output_text.split())
    assert (answer.instructions, answer.metadata) == ("Be brief.", {"a": "b"})


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_structured_output_is_parsed(client: AsyncOpenAI, streamed: bool) -> None:
    if streamed:
        async with client.responses.stream(model="base", input="Plan a trip.", text_format=Trip) as stream:
            answer = await stream.get_final_response()
    else:
        answer = await client.responses.parse(model="base", input="Plan a trip.", text_format=Trip)
    assert answer.output_parsed is not None
    assert answer.output_parsed.first.days == 1


async def _ask(client: AsyncOpenAI, streamed: bool, **body: Any) -> Any:
    if not streamed:
        return await client.responses.create(model="base", tools=[TOOL], **body)
    async with client.responses.stream(model="base", tools=[TOOL], **body) as stream:
        return await stream.get_final_response()


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("state", ["previous_response_id", "conversation", "input", "input, with nothing stored"])
async def test_a_loop_with_a_tool(client: AsyncOpenAI, streamed: bool, state: str) -> None:
    more: dict[str, Any] = {"store": False} if state == "input, with nothing stored" else {}
    if state == "conversation":
        more["conversation"] = (await client.conversations.create()).id
    history: list[Any] = []

    async def turn(item: dict[str, Any]) -> Any:
        answer = await _ask(client, streamed, input=[*history, item], **more)
        if state == "previous_response_id":
            more["previous_response_id"] = answer.id
        elif state != "conversation":
            history.extend([item, *answer.output])
        return answer

    for _ in range(2):
        asked = await turn({"role": "user", "content": CALL})
        (call,) = (item for item in asked.output if item.type == "function_call")
        assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "x"})
        assert (await turn({"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."})).output_text
    if state == "conversation":
        items = [item.type async for item in client.conversations.items.list(more["conversation"], order="asc")]
        assert items == ["message", "function_call", "function_call_output", "message"] * 2


async def test_errors_become_the_librarys_exceptions(client: AsyncOpenAI) -> None:
    create = client.responses.create
    with pytest.raises(openai.NotFoundError) as unknown:
        await create(model="captain", input="Hello.")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        await create(model="base", input="Hello.", previous_response_id="resp_0")
    for body, param in (
        ({"temperature": 7}, "temperature"),
        ({"background": True, "store": False}, "store"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"previous_response_id": "resp_0", "conversation": "conv_0"}, "conversation"),
    ):
        with pytest.raises(openai.BadRequestError) as bad:
            await create(**{"model": "base", "input": "Hello."} | body)
        assert bad.value.param == param
    with pytest.raises(openai.BadRequestError) as ended:
        await create(model="base", input="word " * 3000, stream=True)
    assert ended.value.code == "context_length_exceeded"


async def test_a_stream_that_is_left(client: AsyncOpenAI, environment: Service) -> None:
    stream = await client.responses.create(model="base", input="Hello.", stream=True)
    async for event in stream:
        if event.type == "response.output_text.delta":
            break
    await stream.close()
    assert (await client.responses.create(model="base", input="Hello.")).output_text


async def test_a_stream_is_accumulated(client: AsyncOpenAI) -> None:
    whole = await client.responses.create(model="base", input="Hello.")
    async with client.responses.stream(model="base", input="Hello.") as stream:
        text = "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])
        final = await stream.get_final_response()
    assert final.output_text == text == whole.output_text
    assert final.id != whole.id
    assert (await client.responses.retrieve(final.id)).output_text == text


async def test_what_is_stored_can_be_read_and_deleted(client: AsyncOpenAI) -> None:
    first = await client.responses.create(model="base", input="Hello.")
    hello: Any = [{"role": "user", "content": "And now?"}, {"role": "user", "content": "And then?"}]
    answer = await client.responses.create(model="base", input=hello, previous_response_id=first.id)
    assert answer.previous_response_id == first.id
    stored = await client.responses.retrieve(answer.id)
    assert stored.model_dump() == answer.model_dump()
    items = [item async for item in client.responses.input_items.list(answer.id, limit=1, order="asc")]
    assert [item.content[0].text for item in items] == ["And now?", "And then?"]
    with pytest.raises(openai.BadRequestError):
        await client.responses.cancel(answer.id)
    await client.responses.delete(answer.id)
    for method in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError):
            await method(answer.id)


async def test_what_is_not_stored_cannot_be_read(client: AsyncOpenAI) -> None:
    answer = await client.responses.create(model="base", input="Hello.", store=False)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(answer.id)


async def test_conversations(client: AsyncOpenAI) -> None:
    hello: Any = {"type": "message", "role": "user", "content": "Hello."}
    made = await client.conversations.create(items=[hello], metadata={"a": "b"})
    await client.responses.create(model="base", conversation=made.id, input="And now?")
    added = await client.conversations.items.create(made.id, items=[hello])
    items = [item async for item in client.conversations.items.list(made.id, limit=2, order="asc")]
    assert [item.role for item in items] == ["user", "user", "assistant", "user"]
    assert items[-1].id == added.data[0].id
    assert (await client.conversations.items.retrieve(items[0].id, conversation_id=made.id)).content[0].text == "Hello."
    await client.conversations.items.delete(items[0].id, conversation_id=made.id)
    assert len([item async for item in client.conversations.items.list(made.id)]) == 3
    assert (await client.conversations.update(made.id, metadata={"c": "d"})).metadata == {"c": "d"}
    assert (await client.conversations.retrieve(made.id)).metadata == {"c": "d"}
    assert (await client.conversations.delete(made.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await client.conversations.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.create(model="base", conversation=made.id, input="And now?")


async def test_input_tokens_are_counted(client: AsyncOpenAI) -> None:
    counted = await client.responses.input_tokens.count(model="base", input="Hello.", tools=[TOOL])
    assert counted.input_tokens > 0
