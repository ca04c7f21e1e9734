"""OpenAI's library for Python: chat, completions, models and errors. `test_openai_responses.py` has the rest."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.integration.clients.conftest import Service
from tests.integration.clients.things import CALL, Trip

HELLO: Any = [{"role": "user", "content": "Hello."}]


@pytest.fixture
async def client(environment: Service) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI() as client:
        yield client


async def test_without_asyncio(environment: Service) -> None:
    def run() -> None:
        with OpenAI() as client:
            answer = client.chat.completions.create(model="base", messages=HELLO)
            assert answer.choices[0].message.content
            assert answer.usage is not None
            assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
            stream = client.chat.completions.create(model="pirate", messages=HELLO, stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) not in ("", answer.choices[0].message.content)

    await asyncio.to_thread(run)


async def test_a_stream_is_accumulated(client: AsyncOpenAI) -> None:
    kinds = set()
    async with client.chat.completions.stream(model="base", messages=HELLO, stream_options={"include_usage": True}) as stream:
        async for event in stream:
            kinds.add(event.type)
        final = await stream.get_final_completion()
    assert kinds == {"chunk", "content.delta", "content.done"}
    assert final.usage is not None
    assert final.usage.completion_tokens == len((final.choices[0].message.content or "").split())


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_structured_output_is_parsed(client: AsyncOpenAI, streamed: bool) -> None:
    if streamed:
        async with client.chat.completions.stream(model="base", messages=HELLO, response_format=Trip) as stream:
            message = (await stream.get_final_completion()).choices[0].message
    else:
        message = (await client.chat.completions.parse(model="base", messages=HELLO, response_format=Trip)).choices[0].message
    assert message.parsed is not None
    assert message.parsed.first.days == 1


async def test_arguments_of_a_tool_are_parsed(client: AsyncOpenAI) -> None:
    tool = openai.pydantic_function_tool(Trip, name="book")
    messages: Any = [{"role": "user", "content": CALL}]
    answer = await client.chat.completions.parse(model="base", messages=messages, tools=[tool])
    message = answer.choices[0].message
    assert message.tool_calls is not None
    (call,) = message.tool_calls
    assert isinstance(call.function.parsed_arguments, Trip)
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "Booked."}]
    assert (await client.chat.completions.parse(model="base", messages=messages, tools=[tool])).choices[0].message.content


async def test_completions(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model="base", prompt=["One two", "three"], max_tokens=3)
    assert [len(choice.text.split()) for choice in answer.choices] == [3, 3]
    stream = await client.completions.create(model="base", prompt="One two", max_tokens=3, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == answer.choices[0].text


async def test_embeddings(client: AsyncOpenAI, environment: Service) -> None:
    answer = await client.embeddings.create(model="embedder", input=["One two", "three"])
    # The library requests base64 and decodes it.
    assert environment.exchanges("/v1/embeddings")[0].body["encoding_format"] == "base64"
    plain = await client.embeddings.create(model="embedder", input="three", encoding_format="float")
    assert [each.index for each in answer.data] == [0, 1]
    assert plain.data[0].embedding == pytest.approx(answer.data[1].embedding, abs=1e-6)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0
    tokens = await client.embeddings.create(model="embedder", input=[[1, 2, 3], [4]])
    assert len(tokens.data) == 2
    with pytest.raises(openai.BadRequestError) as refused:
        await client.embeddings.create(model="base", input="three")
    assert refused.value.param == "model"


async def test_models(client: AsyncOpenAI) -> None:
    assert {model.id async for model in await client.models.list()} >= {"base", "pirate"}
    assert (await client.models.retrieve("pirate")).id == "pirate"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("captain")


async def test_errors_become_the_librarys_exceptions(client: AsyncOpenAI) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.AuthenticationError) as refused:
        await client.with_options(api_key="sk-wrong").chat.completions.create(model="base", messages=HELLO)
    assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError) as unknown:
        await create(model="captain", messages=HELLO)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        await create(model="base", messages=HELLO, temperature=7)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as ended:
        await create(model="base", messages=[{"role": "user", "content": "word " * 3000}], stream=True)
    assert ended.value.code == "context_length_exceeded"
