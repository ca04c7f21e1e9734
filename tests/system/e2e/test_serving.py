"""From zero to a response and back to zero, with OpenAI's own client."""

import asyncio
import itertools
import json
import re
import time
from typing import Any

import psutil
import pytest
from openai import BadRequestError

from tests.system.e2e.conftest import EMBEDDING_MODEL, MODEL, Stack, wait_for

QUESTIONS = [
    "What is the capital of France?",
    "Name three colours",
    "Who painted the Mona Lisa?",
    "What is 5 + 3?",
    "What is the capital of Italy?",
]


def ask(question: str) -> list[dict[str, str]]:
    """Return a conversation of one question."""
    return [{"role": "user", "content": question}]


def test_from_zero_to_an_answer_and_back_to_zero(stack: Stack) -> None:
    stack.cool()
    body = {"model": MODEL, "stream": True, "max_tokens": 20, "temperature": 0, "messages": ask("What is the capital of France?")}
    lines: list[tuple[float, str]] = []
    with stack.http(stack.key("acme")) as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines.extend((time.monotonic(), line) for line in response.iter_lines() if line)
    comments = [(at, line) for at, line in lines if line.startswith(":")]
    assert comments, "a cold start takes longer than a second"
    assert all(
        re.fullmatch(r": queued position=1 estimated_wait_s=\d+( late_s=\d+)?( start=\w+)? cold_start=yes", line) for _, line in comments
    )
    gaps = [later - earlier for (earlier, _), (later, _) in itertools.pairwise(comments)]
    assert all(gap < 20 for gap in gaps), "comments come about every ten seconds"
    events = [json.loads(line.removeprefix("data: ")) for _, line in lines if line.startswith("data: {")]
    assert "Paris" in "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
    assert {event["model"] for event in events} == {MODEL}
    assert lines[-1][1] == "data: [DONE]"

    engines = [process for server in stack.engines() for process in (server, *server.children(recursive=True))]
    assert engines
    stack.idle_timeout(2)
    wait_for(lambda: not any(_runs(process) for process in engines), 90, "the engine and its memory are gone")
    wait_for(lambda: not stack.replicas(), 60, "it is said to be gone")
    stack.idle_timeout(600)


def _runs(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_every_tenant_sees_its_own_models_only(stack: Stack) -> None:
    with stack.openai("acme") as acme, stack.openai("globex") as globex:
        assert {model.id for model in acme.models.list()} >= {MODEL, "json-bot"}
        assert "pirate-bot" not in {model.id for model in acme.models.list()}
        assert {model.id for model in globex.models.list()} == {MODEL, EMBEDDING_MODEL, "pirate-bot"}
        assert acme.models.retrieve("json-bot").id == "json-bot"


async def test_sixteen_at_once_answer_as_each_alone(stack: Stack) -> None:
    await asyncio.to_thread(stack.warm)
    async with stack.async_openai("acme") as acme, stack.async_openai("globex") as globex:
        jobs = [(acme, "json-bot", question) for question in QUESTIONS]
        jobs += [(globex, "pirate-bot", question) for question in QUESTIONS]
        jobs += [(client, MODEL, question) for client in (acme, globex) for question in QUESTIONS[:3]]

        async def answer(client: object, model: str, question: str) -> str:
            done = await client.chat.completions.create(model=model, messages=ask(question), temperature=0, max_tokens=40)  # type: ignore[attr-defined]
            assert done.model == model
            return str(done.choices[0].message.content)

        alone = [await answer(*job) for job in jobs]
        together = await asyncio.gather(*(answer(*job) for job in jobs))
    assert len(jobs) == 16
    assert together == alone
    assert all(set(json.loads(text)) == {"answer", "topic"} for text in together[:5])
    assert all(text.startswith("Arr") for text in together[5:10])
    assert not any(text.startswith(("Arr", "{")) for text in together[10:])


def test_everything_that_clients_use(stack: Stack) -> None:
    stack.warm()
    with stack.openai("acme") as client:
        create = client.chat.completions.create
        first, second = (create(model=MODEL, messages=ask("Tell a story"), seed=7, temperature=1, max_tokens=12) for _ in range(2))
        assert first.choices[0].message.content == second.choices[0].message.content
        several = create(model=MODEL, messages=ask("Hi"), n=3, temperature=0.9, max_tokens=5)
        assert len(several.choices) == 3
        scored = create(model=MODEL, messages=ask("Hi"), logprobs=True, top_logprobs=2, max_tokens=3)
        assert len(scored.choices[0].logprobs.content[0].top_logprobs) == 2
        stopped = create(model=MODEL, messages=ask("What is the capital of France?"), stop=["Paris"], temperature=0, max_tokens=30)
        assert "Paris" not in stopped.choices[0].message.content
        assert stopped.choices[0].finish_reason == "stop"
        schema = {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        }
        shaped = create(
            model=MODEL,
            messages=ask("The capital of France, in JSON"),
            response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
            temperature=0,
            max_tokens=30,
        )
        assert json.loads(shaped.choices[0].message.content)["city"] in ("Paris", "Rome")
        # The arguments follow the tool's schema even without `strict`.
        tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
        for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
            messages: list[Any] = list(ask("The weather in Rome?"))
            called = create(model=MODEL, messages=messages, tools=[tool], tool_choice=choice, temperature=1, seed=5, max_tokens=60)
            message = called.choices[0].message
            assert message.tool_calls[0].function.name == "weather"
            assert json.loads(message.tool_calls[0].function.arguments)["city"] in ("Paris", "Rome")
            messages += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Sunny."}]
            assert create(model=MODEL, messages=messages, tools=[tool], temperature=0, max_tokens=5).choices[0].message.content
        parts = list(
            client.completions.create(model=MODEL, prompt=["One", "Two"], stream=True, max_tokens=3, stream_options={"include_usage": True})
        )
        assert parts[-1].usage.completion_tokens == 6
        assert all(part.usage is None for part in parts[:-1])
        assert {choice.index for part in parts for choice in part.choices} == {0, 1}
        # The form that lm-eval's log-likelihood tasks use: the log probabilities of the prompt.
        scored = client.completions.create(
            model=MODEL, prompt=[[100, 200, 300], [100, 200]], max_tokens=1, logprobs=1, echo=True, seed=1234, temperature=0
        )
        for choice, length in zip(scored.choices, (3, 2), strict=True):
            assert len(choice.logprobs.token_logprobs) == length + 1
            assert choice.logprobs.token_logprobs[0] is None
            assert all(value < 0 for value in choice.logprobs.token_logprobs[1:])
        echoed = client.completions.create(model=MODEL, prompt="The capital of France is", max_tokens=0, logprobs=1, echo=True)
        assert echoed.choices[0].text == "The capital of France is"
        assert echoed.usage.completion_tokens == 0
        assert len(echoed.choices[0].logprobs.tokens) == echoed.usage.prompt_tokens
        same = create(model=MODEL, messages=ask("What is the capital of France?"), n=2, temperature=0, max_tokens=8)
        once = create(model=MODEL, messages=ask("What is the capital of France?"), temperature=0, max_tokens=8)
        assert [choice.message.content for choice in same.choices] == [once.choices[0].message.content] * 2
        with pytest.raises(BadRequestError) as too_many:
            create(model=MODEL, messages=ask("x"), max_tokens=100_000)
        assert (too_many.value.code, too_many.value.param) == ("out_of_range", "max_tokens")
        with pytest.raises(BadRequestError) as too_long:
            create(model=MODEL, messages=ask("word " * 5000))
        assert too_long.value.code == "context_length_exceeded"
        nonsense = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
        with pytest.raises(BadRequestError) as bad_schema:
            create(model=MODEL, messages=ask("x"), response_format=nonsense)
        assert (bad_schema.value.code, bad_schema.value.param) == ("invalid_schema", "response_format")


def test_the_engines_own_routes_are_not_there(stack: Stack) -> None:
    with stack.http(stack.key("acme", "admin_key")) as client:
        for path in ("/v1/load_lora_adapter", "/inference/v1/abort_requests", "/tokenize", "/inference/v1/generate", "/detokenize"):
            assert client.post(path, json={}).status_code == 404, path


def test_a_replica_is_ready_only_when_it_has_generated(stack: Stack) -> None:
    stack.warm()
    with stack.operator() as client:
        events = client.get("/admin/v1/usage/events?limit=1000").json()["data"]
    running = {row["id"] for row in stack.replicas() if row["observed"] == "ready"}
    probed = {event["replica_id"] for event in events if event["status"] == "probe" and event["completion_tokens"] == 1}
    assert running
    assert running <= probed
