"""The compliance suite of the Open Responses specification (openresponses.org): its requests, and its rules for responses.

The suite itself is a program for Bun. This module makes the same checks: the types of the specification for every response and every event,
the status, and the required items. Requests with images, files and built-in tools are left out, because no model here supports them.
`checks.py` applies the same types to the responses that other clients receive.
"""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.integration.clients.checks import RESPONSES, check_open_response
from tests.integration.clients.conftest import Service
from tests.integration.clients.things import CALL

TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the current weather for a location",
    "parameters": {
        "type": "object",
        "properties": {"location": {"type": "string", "description": "The city and state, e.g. San Francisco, CA"}},
        "required": ["location"],
    },
}


def said(*texts: str) -> list[dict[str, Any]]:
    """Return messages, each written as "role: text"."""
    return [{"type": "message", "role": text.partition(": ")[0], "content": text.partition(": ")[2]} for text in texts]


REQUESTS: dict[str, dict[str, Any]] = {
    "basic": {"input": said("user: Say hello in exactly 3 words.")},
    "system prompt": {"input": said("system: You are a pirate. Always respond in pirate speak.", "user: Say hello.")},
    "developer message": {"input": said("developer: You are a pirate.", "user: Say hello.")},
    "many turns": {"input": said("user: My name is Alice.", "assistant: Hello Alice! Nice to meet you.", "user: What is my name?")},
    "a tool": {"input": said(f"user: {CALL} What's the weather like in San Francisco?"), "tools": [TOOL]},
    "a chosen tool": {"input": "What's the weather?", "tools": [TOOL], "tool_choice": {"type": "function", "name": "get_weather"}},
    "a required tool": {"input": "What's the weather?", "tools": [TOOL], "tool_choice": "required"},
    "allowed tools": {
        "input": f"{CALL} What's the weather?",
        "tools": [TOOL],
        "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_weather"}]},
    },
    "every setting": {
        "input": "Say hello.",
        "instructions": "Be brief.",
        "temperature": 0.5,
        "top_p": 0.5,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "max_output_tokens": 100,
        "max_tool_calls": 2,
        "parallel_tool_calls": False,
        "truncation": "auto",
        "reasoning": {"effort": "low"},
        "text": {"format": {"type": "text"}, "verbosity": "low"},
        "metadata": {"a": "b"},
        "safety_identifier": "someone",
        "prompt_cache_key": "key",
        "store": False,
        "service_tier": "auto",
        "stream_options": None,
    },
}
CALLS = ("a tool", "a chosen tool", "a required tool", "allowed tools")


@pytest.fixture
async def http(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=service.url, headers={"authorization": f"Bearer {service.key}"}) as http:
        yield http


async def ask(http: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    answer = await http.post(RESPONSES, json={"model": "base"} | body)
    assert answer.status_code == 200, answer.text
    response: dict[str, Any] = answer.json()
    check_open_response(response)
    return response


@pytest.mark.parametrize("name", REQUESTS)
async def test_a_request(http: httpx.AsyncClient, name: str) -> None:
    response = await ask(http, REQUESTS[name])
    assert response["status"] == "completed"
    assert [item["type"] for item in response["output"]] == ["function_call" if name in CALLS else "message"]


@pytest.mark.parametrize("name", REQUESTS)
async def test_a_streamed_request(service: Service, http: httpx.AsyncClient, name: str) -> None:
    async with http.stream("POST", RESPONSES, json={"model": "base", "stream": True} | REQUESTS[name]) as answer:
        events = [line.removeprefix("event: ") async for line in answer.aiter_lines() if line.startswith("event: ")]
    assert events[-1] == "response.completed"
    pieces = "response.function_call_arguments" if name in CALLS else "response.output_text"
    assert {f"{pieces}.delta", f"{pieces}.done", "response.output_item.added", "response.output_item.done"} <= set(events)


async def test_a_function_call_round_trip(http: httpx.AsyncClient) -> None:
    first = REQUESTS["a chosen tool"]
    (call,) = (await ask(http, first))["output"]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": '{"temperature": "18 °C"}'}
    response = await ask(http, {"input": [*said("user: What's the weather?"), call, result], "tools": [TOOL]})
    assert response["output"][0]["type"] == "message"


async def test_a_previous_response(http: httpx.AsyncClient) -> None:
    first = await ask(http, {"input": "Remember this code word: papaya. Reply with only OK."})
    second = await ask(http, {"input": "What code word did I ask you to remember?", "previous_response_id": first["id"]})
    assert second["previous_response_id"] == first["id"]


async def test_an_answer_that_is_cut_off(service: Service, http: httpx.AsyncClient) -> None:
    response = await ask(http, {"input": "Say hello.", "max_output_tokens": 2})
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    streamed = await http.post(RESPONSES, json={"model": "base", "input": "Say hello.", "max_output_tokens": 2, "stream": True})
    assert "event: response.incomplete\n" in streamed.text


async def test_what_no_model_here_has_is_refused_by_name(http: httpx.AsyncClient) -> None:
    image = [{"type": "message", "role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,"}]}]
    for body in ({"input": image}, {"input": "x", "tools": [{"type": "file_search", "vector_store_ids": ["x"]}]}):
        answer = await http.post(RESPONSES, json={"model": "base"} | body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"].startswith("tools" if "tools" in body else "input")
