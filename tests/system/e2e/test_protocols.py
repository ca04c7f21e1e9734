"""Responses, Messages and counts of tokens with the real engine, each with its own client library."""

import json
from typing import Any

import pytest
from anthropic import Anthropic, BadRequestError
from openai import NotFoundError
from pydantic import BaseModel

from tests.support.response_streams import check
from tests.system.e2e.conftest import EMBEDDING_MODEL, MODEL, Stack


def test_tokens_are_counted_without_an_engine_and_as_an_engine_counts_them(stack: Stack) -> None:
    stack.cool()
    messages: list[Any] = [
        {"role": "user", "content": "How is the weather in Zürich? 🌧️"},
        {"role": "assistant", "content": "It rains."},
        {"role": "user", "content": "ありがとう"},
    ]
    limit = {"max_tokens": 1}
    asked: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
        ("/v1/tokenize", "/v1/chat/completions", {"messages": messages}, limit),
        ("/v1/tokenize", "/v1/completions", {"prompt": "Once upon a time"}, limit),
        ("/v1/messages/count_tokens", "/v1/messages", {"messages": messages, "system": "Be terse."}, limit),
        ("/v1/responses/input_tokens", "/v1/responses", {"input": messages, "instructions": "Be terse."}, {"max_output_tokens": 1}),
    ]
    with stack.http(stack.key("acme")) as client:

        def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
            answer = client.post(path, json=body)
            assert answer.status_code == 200, answer.text
            found: dict[str, Any] = answer.json()
            return found

        counts = [post(path, {"model": "json-bot"} | body) for path, _, body, _ in asked]
        assert not stack.replicas()
        for count, (_, path, body, more) in zip(counts, asked, strict=True):
            usage = post(path, {"model": "json-bot"} | body | more)["usage"]
            # Anthropic's protocol reports tokens from the cache separately.
            prompt = usage.get("prompt_tokens", usage.get("input_tokens")) + usage.get("cache_read_input_tokens", 0)
            assert count.get("count", count.get("input_tokens")) == prompt, path
        embedded = post("/v1/embeddings", {"model": EMBEDDING_MODEL, "input": "Once upon a time"})["usage"]
        assert post("/v1/tokenize", {"model": EMBEDDING_MODEL, "prompt": "Once upon a time"})["count"] == embedded["prompt_tokens"]


class Place(BaseModel):
    """The fields of a structured output."""

    city: str
    country: str


def test_openais_responses(stack: Stack) -> None:
    stack.warm()
    weather: Any = {
        "type": "function",
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    }
    asked: Any = {"model": MODEL, "temperature": 0, "max_output_tokens": 60}
    with stack.openai("acme") as acme, stack.openai("globex") as globex:
        first = acme.responses.create(**asked, input="What is the capital of France?")
        assert (first.status, "Paris" in first.output_text) == ("completed", True)
        with acme.responses.stream(**asked, input="What is the capital of France?") as stream:
            events = list(stream)
        assert events[-1].type == "response.completed"
        assert events[-1].response.output_text == first.output_text

        second = acme.responses.create(**asked, input="Say it again.", previous_response_id=first.id)
        whole: list[Any] = [{"role": "user", "content": "What is the capital of France?"}, *first.output]
        repeated = acme.responses.create(**asked, input=[*whole, {"role": "user", "content": "Say it again."}], store=False)
        assert second.usage is not None
        assert repeated.usage is not None
        assert (second.output_text, second.usage.input_tokens) == (repeated.output_text, repeated.usage.input_tokens)

        called = acme.responses.create(**asked, input="The weather in Rome?", tools=[weather], tool_choice="required")
        (call,) = [item for item in called.output if item.type == "function_call"]
        assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny"}
        assert acme.responses.create(**asked, input=[result], previous_response_id=called.id, tools=[weather]).output
        custom: Any = {"type": "custom", "name": "shell", "description": "Runs a command."}
        (used,) = acme.responses.create(**asked, input="List the files.", tools=[custom], tool_choice="required").output
        assert used.type == "custom_tool_call"

        parsed = acme.responses.parse(model=MODEL, input="Where is the Eiffel Tower?", text_format=Place, temperature=0)
        assert isinstance(parsed.output_parsed, Place)
        conversation = acme.conversations.create()
        for _ in range(2):
            acme.responses.create(**asked | {"max_output_tokens": 5}, input="Hello", conversation=conversation.id)
        assert len(acme.conversations.items.list(conversation.id).data) == 4
        assert acme.responses.retrieve(first.id).output_text == first.output_text
        with pytest.raises(NotFoundError):
            globex.responses.retrieve(first.id)
        acme.responses.delete(first.id)
        with pytest.raises(NotFoundError):
            acme.responses.create(**asked, input="And now?", previous_response_id=second.id)

    body = asked | {"model": "json-bot", "input": "Where is Rome?", "stream": True}
    with stack.http(stack.key("acme")) as client:
        assert check(client.post("/v1/responses", json=body).content)


def test_anthropics_client(stack: Stack) -> None:
    stack.warm()
    cached: Any = {"cache_control": {"type": "ephemeral"}}
    system: Any = [{"type": "text", "text": "You answer in one sentence. " * 20} | cached]
    city = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"], "additionalProperties": False}
    tools: Any = [{"name": f"tool{number}", "description": "Does it.", "input_schema": city} | cached for number in range(8)]
    capital: Any = [{"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"} | cached]}]
    asked: Any = {"model": MODEL, "max_tokens": 20_000, "extra_body": {"temperature": 0}, "system": system, "messages": capital}
    with Anthropic(base_url=stack.root, api_key=stack.key("acme"), max_retries=0) as client:
        whole = client.messages.create(**asked)
        assert "Paris" in whole.content[0].text
        assert whole.stop_reason == "end_turn"
        with client.messages.stream(**asked) as stream:
            text = "".join(stream.text_stream)
            streamed = stream.get_final_message()
        assert text == whole.content[0].text
        assert streamed.usage.cache_read_input_tokens >= 0
        assert streamed.usage.input_tokens + streamed.usage.cache_read_input_tokens == (
            whole.usage.input_tokens + whole.usage.cache_read_input_tokens
        )
        stopped = client.messages.create(**asked, stop_sequences=["Paris"])
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "Paris")
        for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "tool3"}):
            called = client.messages.create(
                **asked | {"max_tokens": 100, "extra_body": {"temperature": 1}}, tools=tools, tool_choice=choice
            )
            (call,) = [block for block in called.content if block.type == "tool_use"]
            assert call.input["city"] in ("Paris", "Rome")
            assert called.stop_reason == "tool_use"
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "Sunny."}
        history: Any = [*capital, {"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
        reminder = {"role": "system", "content": "Be brief."}
        assert client.messages.create(**asked | {"messages": [*history, reminder], "max_tokens": 5}, tools=tools).usage.output_tokens > 0
        shaped = client.messages.create(**asked, output_config={"format": {"type": "json_schema", "schema": city}})
        assert json.loads(shaped.content[0].text)["city"] in ("Paris", "Rome")
        adapted = client.messages.create(**asked | {"model": "json-bot", "system": ""})
        assert (set(json.loads(adapted.content[0].text)), adapted.model) == ({"answer", "topic"}, "json-bot")
        prefilled = [*capital, {"role": "assistant", "content": "The capital of France is the city of"}]
        assert "Paris" in client.messages.create(**asked | {"messages": prefilled, "max_tokens": 5}).content[0].text
        with pytest.raises(BadRequestError, match="prompt is too long") as too_long:
            client.messages.create(**asked | {"messages": [{"role": "user", "content": "word " * 5000}]})
        assert too_long.value.error_code == "context_length_exceeded"
