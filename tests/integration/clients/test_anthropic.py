"""Anthropic's library for Python."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic, beta_async_tool

from tests.integration.clients.conftest import Service
from tests.integration.clients.things import CALL, Trip, Weather

PATH = "/v1/messages"
HELLO: Any = [{"role": "user", "content": "Hello."}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: Any = {"name": "weather", "description": "Forecast.", "input_schema": CITY}
LIMIT: Any = {"model": "base", "max_tokens": 1024}


@pytest.fixture
async def client(environment: Service) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic() as client:
        yield client


async def test_without_asyncio(environment: Service) -> None:
    def run() -> None:
        with Anthropic() as client:
            answer = client.messages.create(**LIMIT, messages=HELLO)
            assert answer.stop_reason == "end_turn"
            with client.messages.stream(**LIMIT, messages=HELLO) as stream:
                assert "".join(stream.text_stream) == answer.content[0].text

    await asyncio.to_thread(run)


async def test_a_stream_is_accumulated(client: AsyncAnthropic) -> None:
    whole = await client.messages.create(**LIMIT, system="Be brief.", messages=HELLO)
    async with client.messages.stream(**LIMIT, system="Be brief.", messages=HELLO) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        final = await stream.get_final_message()
    assert text == final.content[0].text == whole.content[0].text
    assert final.stop_reason == whole.stop_reason == "end_turn"
    assert final.usage.input_tokens > 0
    assert final.usage.output_tokens == whole.usage.output_tokens == len(text.split())


async def test_limits_and_stop_sequences(client: AsyncAnthropic) -> None:
    short = await client.messages.create(model="base", max_tokens=3, messages=HELLO)
    assert (short.stop_reason, short.usage.output_tokens) == ("max_tokens", 3)
    word = short.content[0].text.split()[1]
    stopped = await client.messages.create(**LIMIT, messages=HELLO, stop_sequences=[word])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", word)
    # Clients send the same limit to all models.
    assert (await client.messages.create(model="base", max_tokens=16384, messages=HELLO)).stop_reason == "end_turn"


async def test_an_adapter_and_a_bearer_token(environment: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    monkeypatch.setenv("ANTHROPIC_AUTH_TOKEN", environment.key)
    async with AsyncAnthropic() as client:
        assert (await client.messages.create(model="pirate", max_tokens=5, messages=HELLO)).model == "pirate"


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_loop_with_a_tool(client: AsyncAnthropic, streamed: bool) -> None:
    async def ask(**body: Any) -> Any:
        if not streamed:
            return await client.messages.create(**LIMIT, **body)
        async with client.messages.stream(**LIMIT, **body) as stream:
            return await stream.get_final_message()

    cached = {"cache_control": {"type": "ephemeral"}}
    system = [{"type": "text", "text": "Be brief.", **cached}]
    messages: list[Any] = []
    for _ in range(2):
        messages += [{"role": "user", "content": [{"type": "text", "text": CALL, **cached}]}]
        asked = await ask(system=system, messages=messages, tools=[{**TOOL, **cached}])
        assert asked.stop_reason == "tool_use"
        (call,) = (block for block in asked.content if block.type == "tool_use")
        assert (call.name, call.input) == ("weather", {"city": "x"})
        result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "Sunny."}]}
        messages += [{"role": "assistant", "content": asked.content}, {"role": "user", "content": [result]}]
        final = await ask(system=system, messages=messages, tools=[TOOL])
        assert final.stop_reason == "end_turn"
        messages += [{"role": "assistant", "content": final.content}]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}, {"type": "none"}, {"type": "auto"}])
async def test_the_choice_of_a_tool(client: AsyncAnthropic, choice: Any) -> None:
    answer = await client.messages.create(**LIMIT, messages=HELLO, tools=[TOOL], tool_choice=choice)
    assert answer.stop_reason == ("end_turn" if choice["type"] in ("none", "auto") else "tool_use")


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_librarys_own_loop(client: AsyncAnthropic, streamed: bool) -> None:
    weather = Weather()

    async def ask(city: str) -> str:
        return weather(city, 1)

    tool = beta_async_tool(ask, name="weather", description="Forecast.", input_schema=CITY)
    runner: Any = client.beta.messages.tool_runner(
        **LIMIT, messages=[{"role": "user", "content": CALL}], tools=[tool], stream=streamed, betas=["context-management-2025-06-27"]
    )
    final = await runner.until_done()
    assert final.stop_reason == "end_turn"
    assert len(weather.asked) == 1


async def test_a_structured_output_is_parsed(client: AsyncAnthropic) -> None:
    answer = await client.messages.parse(**LIMIT, messages=HELLO, output_format=Trip)
    assert answer.parsed_output is not None
    assert answer.parsed_output.first.days == 1


async def test_errors_become_the_librarys_exceptions(client: AsyncAnthropic) -> None:
    def kind(caught: pytest.ExceptionInfo[Any]) -> Any:
        assert caught.value.request_id
        assert caught.value.body["type"] == "error"
        return caught.value.body["error"]["type"]

    with pytest.raises(anthropic.AuthenticationError) as refused:
        await client.with_options(api_key="sk-wrong").messages.create(**LIMIT, messages=HELLO)
    assert kind(refused) == "authentication_error"
    with pytest.raises(anthropic.NotFoundError) as unknown:
        await client.messages.create(model="captain", max_tokens=5, messages=HELLO)
    assert kind(unknown) == "not_found_error"
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("temperature", {"extra_body": {"temperature": 7}}),
        ("max_tokens", {"max_tokens": 0}),
        ("messages", {"messages": []}),
        ("tools.0", {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}),
    ]
    for name, body in wrong:
        with pytest.raises(anthropic.BadRequestError) as bad:
            await client.messages.create(**LIMIT | {"messages": HELLO} | body)
        assert kind(bad) == "invalid_request_error", body
        assert name in bad.value.message
    with pytest.raises(anthropic.BadRequestError) as ended:
        await client.messages.create(**LIMIT, messages=[{"role": "user", "content": "word " * 3000}])
    assert kind(ended) == "invalid_request_error"
    assert "prompt is too long" in ended.value.message


async def test_tokens_are_counted(client: AsyncAnthropic) -> None:
    counted = await client.messages.count_tokens(model="pirate", system="Be brief.", messages=HELLO, tools=[TOOL])
    assert counted.input_tokens > 0
    beta = await client.beta.messages.count_tokens(model="base", messages=HELLO)
    assert 0 < beta.input_tokens < counted.input_tokens


async def test_models(client: AsyncAnthropic) -> None:
    assert {model.id async for model in client.models.list(limit=1)} >= {"base", "pirate"}
    assert (await client.models.retrieve("pirate")).type == "model"
    with pytest.raises(anthropic.NotFoundError):
        await client.models.retrieve("captain")
