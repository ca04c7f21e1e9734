"""The parts of an engine's HTTP on which lmaas relies: the same assertions against vLLM and against the fake that stands in for it."""

import asyncio
import json
import re
import secrets
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from lmaas.engine.client import EngineClient, EngineError
from lmaas.inference.protocol import Inference
from lmaas.protocols.messages.protocol import Messages
from lmaas.protocols.sse import Rewriter, rewrite_whole
from tests.support.anthropic_stream import check_message, check_stream
from tests.support.collector import Collector
from tests.support.conditions import until
from tests.system.engine.conftest import (
    ADAPTER,
    BASE,
    CHAT,
    COMPLETION,
    MAX_LEN,
    PATHS,
    STREAM,
    TOKENS,
    Engine,
    Events,
    ask,
    engine_ids,
    total,
)


async def test_it_is_ready_and_says_that_it_keeps_adapters_apart(engine: Engine) -> None:
    assert engine.process.keeps_adapters_apart()
    assert (await engine.http.get("/health")).status_code == 200
    models = (await engine.http.get("/v1/models")).json()
    assert [card["id"] for card in models["data"]] == [BASE]


async def test_chat_stream_has_the_shape_that_the_relay_rewrites(engine: Engine) -> None:
    before = await engine.idle()
    events = await engine.stream(CHAT, ask(CHAT, tokens=4, temperature=0) | STREAM, "shape")
    head = ["id", "object", "created", "model", "choices"]
    role, *rest, usage = events.parsed
    assert list(role) == [*head, "usage", "prompt_token_ids", "prompt_text"]
    assert role["choices"] == [{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}]
    assert all(list(event) == [*head, "usage"] for event in rest)
    for event in rest[:-1]:
        assert list(event["choices"][0]) == ["index", "delta", "logprobs", "finish_reason", "token_ids"]
        assert list(event["choices"][0]["delta"]) == ["content"]
    assert list(rest[-1]["choices"][0]) == ["index", "delta", "logprobs", "finish_reason", "stop_reason", "token_ids"]
    assert events.finish_reasons() == {0: "length"}
    assert events.text()
    assert list(usage) == [*head, "usage", "system_fingerprint"]
    assert usage["choices"] == []
    assert usage["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert all(event["id"] == "chatcmpl-shape" and event["model"] == BASE for event in events.parsed)
    assert all(event["object"] == "chat.completion.chunk" for event in events.parsed)
    assert [total(event["usage"])[1] for event in events.parsed] == sorted(total(event["usage"])[1] for event in events.parsed)
    assert events.raw[-1] == b"data: [DONE]"
    assert total(usage["usage"])[1] == 4
    assert (await engine.idle()).since(before) == total(usage["usage"])


async def test_completion_stream_has_the_shape_that_the_relay_rewrites(engine: Engine) -> None:
    before = await engine.idle()
    events = await engine.stream(COMPLETION, ask(COMPLETION, tokens=3, temperature=0) | STREAM, "shape")
    head = ["id", "object", "created", "model", "choices"]
    *rest, usage = events.parsed
    assert all(list(event) == [*head, "usage"] for event in rest)
    keys = ["index", "text", "logprobs", "finish_reason", "stop_reason", "prompt_token_ids", "token_ids"]
    assert all(list(event["choices"][0]) == keys for event in rest)
    assert list(usage) == [*head, "usage", "system_fingerprint"]
    assert usage["choices"] == []
    assert all(event["id"] == "cmpl-shape" and event["object"] == "text_completion" for event in events.parsed)
    assert events.finish_reasons() == {0: "length"}
    assert events.raw[-1] == b"data: [DONE]"
    assert (await engine.idle()).since(before) == total(usage["usage"])


@PATHS
async def test_a_request_continues_the_trace_that_it_is_sent_with(engine: Engine, collected: Collector, path: str) -> None:
    words, before = "the-secret-word", len(collected.spans)
    sampled, other, last = (secrets.token_hex(16) for _ in range(3))
    for request_id, headers in {
        "traced": {"traceparent": f"00-{sampled}-b7ad6b7169203331-01", "tracestate": "a=1"},
        "not-sampled": {"traceparent": f"00-{other}-b7ad6b7169203331-00"},
        "without": {},
        "last": {"traceparent": f"00-{last}-b7ad6b7169203331-01"},
    }.items():
        body = ask(path, words, tokens=3)
        response = await engine.http.post(path, json=body, headers={"x-request-id": request_id, **headers})
        assert response.status_code == 200
    await until(lambda: collected.trace(last) and collected.trace(sampled))
    (span,) = collected.trace(sampled).values()
    assert (span.name, span.parent_id, span.service, span.kind) == ("llm_request", "b7ad6b7169203331", "lmaas-engine", 2)
    assert "traced" in span.attributes["gen_ai.request.id"]
    assert 0 < span.end_ns - span.start_ns < 60e9
    # An engine begins no traces: neither for the request without one, nor for its own work, such as its start.
    assert {span.trace_id for span in collected.spans[before:]} == {sampled, last}
    assert {span.name for span in collected.spans} == {"llm_request"}
    assert words.encode() not in collected.raw


@PATHS
async def test_the_rewriter_leaves_nothing_internal_in_a_stream(engine: Engine, path: str) -> None:
    events = await engine.stream(path, ask(path, tokens=5) | STREAM)
    rewrite = Rewriter(BASE, "asked", include_usage=False, continuous_usage=False)
    out = [rewrite(event) for event in events.raw[:-1]]
    assert rewrite.complete
    assert rewrite.usage is not None
    assert total(rewrite.usage)[1] == 5
    for event in out[:-1]:
        assert event is not None
        value = json.loads(event.removeprefix(b"data: "))
        assert value["model"] == "asked"
        assert "usage" not in value
        assert BASE.encode() not in event
    assert out[-1] is None


async def test_a_running_usage_is_of_one_choice_and_the_last_of_all(engine: Engine) -> None:
    before = await engine.idle()
    body = ask(COMPLETION, tokens=4, n=2, temperature=1) | {"prompt": [TOKENS[:5], TOKENS[:9]]} | STREAM
    events = await engine.stream(COMPLETION, body)
    assert set(events.finish_reasons()) == {0, 1, 2, 3}
    for event in events.of_choices:
        (choice,) = event["choices"]
        assert event["usage"]["prompt_tokens"] == (5 if choice["index"] < 2 else 9)
        assert 1 <= event["usage"]["completion_tokens"] <= 4
    assert total(events.parsed[-1]["usage"]) == (14, 16)
    # A prompt is billed once for all its choices, while the engine's own counter has it once for each.
    assert (await engine.idle()).since(before) == (28, 16)


async def test_the_choices_of_a_chat_share_their_prompt(engine: Engine) -> None:
    before = await engine.idle()
    events = await engine.stream(CHAT, ask(CHAT, tokens=4, n=2, temperature=1) | STREAM)
    prompt, completion = total(events.parsed[-1]["usage"])
    assert completion == 8
    assert {total(event["usage"])[0] for event in events.of_choices} == {prompt}
    assert max(total(event["usage"])[1] for event in events.of_choices) == 4
    assert (await engine.idle()).since(before) == (2 * prompt, 8)


@PATHS
@pytest.mark.parametrize("options", [None, {"include_usage": True}])
async def test_usage_comes_only_as_asked_for(engine: Engine, path: str, options: dict[str, Any] | None) -> None:
    events = await engine.stream(path, ask(path, tokens=3, stream=True, stream_options=options))
    assert all("usage" not in event for event in events.of_choices)
    with_usage = [event for event in events.parsed if "usage" in event]
    assert [total(event["usage"])[1] for event in with_usage] == ([3] if options else [])
    assert ("system_fingerprint" in events.of_choices[-1]) is (options is None)


@PATHS
async def test_a_plain_answer(engine: Engine, path: str) -> None:
    before = await engine.idle()
    response = await engine.post(path, ask(path, tokens=4, n=2, temperature=1), "plain")
    answer = response.json()
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert list(answer)[:5] == ["id", "object", "created", "model", "choices"]
    assert answer["id"] == ("chatcmpl-plain" if path == CHAT else "cmpl-plain")
    assert answer["object"] == ("chat.completion" if path == CHAT else "text_completion")
    assert answer["model"] == BASE
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert all(choice["finish_reason"] == "length" for choice in answer["choices"])
    prompt, completion = total(answer["usage"])
    assert completion == 8
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert (await engine.idle()).since(before) == (2 * prompt, 8)


@PATHS
async def test_a_plain_answer_says_of_the_service_where_the_relay_changes_it(engine: Engine, path: str) -> None:
    text = (await engine.post(path, ask(path, tokens=2))).content
    facts = {"service_tier": "flex", "system_fingerprint": "fp_1"}
    assert re.search(rb',"service_tier":null,"system_fingerprint":"[^"]+","usage":{', text)
    out, usage, aborted = rewrite_whole(text, BASE, "asked", facts)
    assert (total(usage)[1], aborted) == (2, False)
    assert json.loads(out) == json.loads(text) | {"model": "asked"} | facts
    assert out.index(b'"service_tier"') > out.index(b'"choices"'), "changed as bytes"


async def test_an_echo_without_generation_counts_one_token(engine: Engine) -> None:
    before = await engine.idle()
    answer = (await engine.post(COMPLETION, ask(COMPLETION, "One two three", tokens=0, echo=True))).json()
    assert answer["choices"][0]["text"] == "One two three"
    assert total(answer["usage"])[1] == 1
    assert (await engine.idle()).since(before) == total(answer["usage"])


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]},
    },
}


async def test_a_required_call(engine: Engine) -> None:
    body = {"model": BASE, "messages": [{"role": "user", "content": "x"}], "tools": [TOOL], "tool_choice": "required", "max_tokens": 100}
    body |= {"parallel_tool_calls": False, "temperature": 1}
    (choice,) = (await engine.post(CHAT, body)).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert (call["type"], call["function"]["name"]) == ("function", "weather")
    assert json.loads(call["function"]["arguments"])["city"] in ("Rome", "Oslo")
    events = await engine.stream(CHAT, body | STREAM)
    calls = [part for event in events.of_choices for part in event["choices"][0]["delta"].get("tool_calls", ())]
    assert {part["index"] for part in calls} == {0}
    assert "".join(part["function"].get("name") or "" for part in calls) == "weather"
    assert json.loads("".join(part["function"].get("arguments") or "" for part in calls))["city"] in ("Rome", "Oslo")
    assert events.finish_reasons() == {0: "tool_calls"}


CITIES = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
HELLO: dict[str, Any] = {"role": "user", "content": "Say hello."}
ONE_CALL = {"type": "any", "disable_parallel_tool_use": True}
MESSAGES: list[dict[str, Any]] = [
    {},
    {"system": "Be brief.", "thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}, "top_k": 0, "top_p": 1},
    {"messages": [HELLO, {"role": "system", "content": "Be brief."}]},
    {"messages": [HELLO, {"role": "assistant", "content": "Hello, my name is "}]},
    {"tools": [{"name": "weather", "input_schema": CITIES}], "tool_choice": ONE_CALL, "temperature": 1, "max_tokens": 100},
]


@pytest.mark.parametrize("more", MESSAGES)
async def test_messages_are_made_of_its_chats(engine: Engine, more: dict[str, Any]) -> None:
    protocol = Messages()
    found = []
    for stream in (False, True):
        body = {"model": "robot", "max_tokens": 40, "temperature": 0, "messages": [HELLO], "stream": stream}
        request = protocol.read(body | more)
        answer = protocol.answer(Inference("req_1", protocol, request))
        sent = json.loads(request.body(BASE, "salt"))
        if stream:
            events = await engine.stream(protocol.engine_path, sent)
            out = answer.feed(b"\n\n".join([*events.raw, b""])) + answer.close() + answer.end()
            message = check_stream(out).message
        else:
            answer.take((await engine.post(protocol.engine_path, sent)).content)
            message = json.loads(answer.end())
            check_message(message)
        assert answer.complete
        found.append(message)
    plain, streamed = found
    if "tools" in more:
        for message in found:
            (call,) = message["content"]
            assert (message["stop_reason"], call["name"]) == ("tool_use", "weather")
            assert call["input"]["city"] in ("Rome", "Oslo")
        return
    assert plain["content"] == streamed["content"]
    assert plain["stop_reason"] == streamed["stop_reason"] in ("end_turn", "max_tokens")
    assert plain["usage"]["output_tokens"] == streamed["usage"]["output_tokens"] > 0


async def test_greedy_answers_are_the_same_again_and_stop_where_told(engine: Engine) -> None:
    async def answer(**more: Any) -> dict[str, Any]:
        choice: dict[str, Any] = (await engine.post(COMPLETION, ask(COMPLETION, tokens=12, temperature=0, **more))).json()["choices"][0]
        return choice

    text = (await answer())["text"]
    assert (await answer())["text"] == text
    stop = text[len(text) // 2 :][:4]
    stopped = await answer(stop=[stop])
    assert stopped["text"] == text[: text.index(stop)]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", stop)


async def test_counters_are_the_sum_of_all_usage(engine: Engine) -> None:
    before = await engine.idle()
    paths = [CHAT, COMPLETION] * 8
    plain = [engine.post(path, ask(path, f"Question {number}", tokens=5 + number % 3)) for number, path in enumerate(paths)]
    streams = [engine.stream(path, ask(path, f"Stream {number}", tokens=5 + number % 3) | STREAM) for number, path in enumerate(paths)]
    answers, events = await asyncio.gather(asyncio.gather(*plain), asyncio.gather(*streams))
    usages = [total(answer.json()["usage"]) for answer in answers] + [total(stream.parsed[-1]["usage"]) for stream in events]
    assert (await engine.idle()).since(before) == (sum(usage[0] for usage in usages), sum(usage[1] for usage in usages))


@PATHS
async def test_an_aborted_stream_ends_by_itself_with_its_usage(engine: Engine, path: str) -> None:
    before = await engine.idle()
    task = asyncio.create_task(engine.stream(path, ask(path, tokens=1500) | STREAM, "cut"))
    await engine.runs(1)
    assert (await engine.post("/inference/v1/abort_requests", {"request_ids": engine_ids(path, "cut")})).status_code == 200
    events = await asyncio.wait_for(task, 30)
    assert events.finish_reasons() == {0: "abort"}
    assert any(b'"finish_reason":"abort"' in event for event in events.raw)
    assert events.parsed[-1]["choices"] == []
    assert events.raw[-1] == b"data: [DONE]"
    usage = total(events.parsed[-1]["usage"])
    assert 0 < usage[1] < 1500
    assert (await engine.idle()).since(before) == usage


@PATHS
async def test_an_aborted_plain_request_is_answered_with_its_usage(engine: Engine, path: str) -> None:
    before = await engine.idle()
    task = asyncio.create_task(engine.post(path, ask(path, tokens=1500), "cut"))
    await engine.runs(1)
    await engine.post("/inference/v1/abort_requests", {"request_ids": engine_ids(path, "cut")})
    response = await asyncio.wait_for(task, 30)
    assert response.status_code == 200
    assert response.json()["choices"][0]["finish_reason"] == "abort"
    usage = total(response.json()["usage"])
    assert 0 < usage[1] < 1500
    assert (await engine.idle()).since(before) == usage


async def test_each_prompt_of_a_completion_is_aborted_by_its_own_id(engine: Engine) -> None:
    before = await engine.idle()
    body = ask(COMPLETION, tokens=1500) | {"prompt": ["One two three", "Four five six"]}
    task = asyncio.create_task(engine.post(COMPLETION, body, "pair"))
    await engine.runs(2)
    await engine.post("/inference/v1/abort_requests", {"request_ids": ["cmpl-pair", "chatcmpl-pair", "cmpl-pair-0"]})

    async def one_left() -> bool:
        return (await engine.counters()).running == 1

    await until(one_left)
    assert not task.done()
    await engine.post("/inference/v1/abort_requests", {"request_ids": ["cmpl-pair-1"]})
    response = await asyncio.wait_for(task, 30)
    assert {choice["finish_reason"] for choice in response.json()["choices"]} == {"abort"}
    assert (await engine.idle()).since(before) == total(response.json()["usage"])


async def test_what_waits_in_the_engine_can_be_aborted(engine: Engine) -> None:
    before = await engine.idle()
    running = [asyncio.create_task(engine.post(COMPLETION, ask(COMPLETION, tokens=1500), f"run{number}")) for number in range(8)]
    await engine.runs(8)
    events = Events()
    waiting = asyncio.create_task(engine.stream(COMPLETION, ask(COMPLETION, tokens=1500) | STREAM, "wait", events))

    async def queued() -> bool:
        return (await engine.counters()).waiting == 1

    await until(queued)
    await engine.post("/inference/v1/abort_requests", {"request_ids": ["cmpl-wait-0"]})
    await asyncio.wait_for(waiting, 30)
    assert events.parsed[-1]["usage"]["completion_tokens"] == 0
    await engine.post("/inference/v1/abort_requests", {"request_ids": [f"cmpl-run{number}-0" for number in range(8)]})
    usages = [total(response.json()["usage"]) for response in await asyncio.gather(*running)]
    # It never ran, so the engine has not counted its prompt, although its usage includes it.
    assert (await engine.idle()).since(before) == (sum(usage[0] for usage in usages), sum(usage[1] for usage in usages))


@PATHS
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_hangs_up_stops_the_work(engine: Engine, path: str, stream: bool) -> None:
    await engine.idle()
    body = ask(path, tokens=1500) | (STREAM if stream else {})
    task: asyncio.Task[Any] = asyncio.create_task(engine.stream(path, body) if stream else engine.post(path, body))
    await engine.runs(1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    after = await engine.idle()
    await asyncio.sleep(0.2)
    assert (await engine.counters()).generated == after.generated


async def test_adapters_come_and_go(engine: Engine, tmp_path: Path) -> None:
    client = EngineClient()
    async with client:
        url = engine.process.url
        body = {"lora_name": "acme", "lora_path": str(ADAPTER)}
        loaded = await engine.post("/v1/load_lora_adapter", body)
        assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'acme' added successfully.")
        again = await engine.post("/v1/load_lora_adapter", body)
        assert again.status_code == 400
        assert "already been loaded" in again.json()["error"]["message"]
        await client.load_adapter(url, "acme", str(ADAPTER))

        words = "Reply with the capital of France."
        answers = [(await engine.post(CHAT, ask(CHAT, words, tokens=8, temperature=0, model=model))).json() for model in (BASE, "acme")]
        assert [answer["model"] for answer in answers] == [BASE, "acme"]
        assert answers[0]["choices"][0]["message"]["content"] != answers[1]["choices"][0]["message"]["content"]
        models = (await engine.http.get("/v1/models")).json()["data"]
        assert [(card["id"], card["parent"]) for card in models] == [(BASE, None), ("acme", BASE)]

        for name, path, status in (("other", tmp_path / "missing", 404), (BASE, ADAPTER, 400)):
            with pytest.raises(EngineError) as refused:
                await client.load_adapter(url, name, str(path))
            assert refused.value.status == status
        broken = tmp_path / "broken"
        broken.mkdir()
        (broken / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        with pytest.raises(EngineError):
            await client.load_adapter(url, "broken", str(broken))

        gone = await engine.post("/v1/unload_lora_adapter", {"lora_name": "acme"})
        assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'acme' removed successfully.")
        assert (await engine.post("/v1/unload_lora_adapter", {"lora_name": "acme"})).status_code == 404
        await client.unload_adapter(url, "acme")
        assert (await engine.post(CHAT, ask(CHAT, model="acme"))).status_code == 404


@PATHS
@pytest.mark.parametrize("stream", [True, False])
async def test_an_unknown_model(engine: Engine, path: str, stream: bool) -> None:
    response = await engine.post(path, ask(path, model="nope", stream=stream))
    assert response.status_code == 404
    message = f"The model `nope` does not exist. Valid aliases: {BASE}."
    assert response.json() == {"error": {"message": message, "type": "NotFoundError", "param": "model", "code": 404}}


async def test_what_does_not_fit_the_context(engine: Engine) -> None:
    async def refused(path: str, body: dict[str, Any]) -> str:
        response = await engine.post(path, body)
        assert response.status_code == 400
        error = response.json()["error"]
        assert list(error) == ["message", "type", "param", "code"]
        assert (error["type"], error["code"]) == ("BadRequestError", 400)
        message: str = error["message"]
        return message

    long = "word " * (MAX_LEN + 500)
    for path in (CHAT, COMPLETION):
        assert f"maximum context length is {MAX_LEN} tokens" in await refused(path, ask(path, long))
        assert f"max_tokens=3000 cannot be greater than max_model_len={MAX_LEN}" in await refused(path, ask(path, tokens=3000))
    tokens = (TOKENS * 10)[: MAX_LEN + 52]
    assert f"your prompt contains {MAX_LEN + 52} input tokens" in await refused(COMPLETION, ask(COMPLETION) | {"prompt": tokens})
    assert "max_tokens must be at least 1, got 0" in await refused(COMPLETION, ask(COMPLETION) | {"prompt": tokens[:MAX_LEN]})
    # A prompt that fits with fewer tokens than requested is not an error: the completion is shorter.
    short = await engine.post(COMPLETION, ask(COMPLETION, tokens=100) | {"prompt": tokens[: MAX_LEN - 2]})
    assert total(short.json()["usage"]) == (MAX_LEN - 2, 2)
    assert short.json()["choices"][0]["finish_reason"] == "length"


async def test_requests_that_the_engine_refuses(engine: Engine) -> None:
    greedy = await engine.post(COMPLETION, ask(COMPLETION, n=2, temperature=0))
    assert greedy.status_code == 400
    assert greedy.json()["error"]["message"] == "n must be 1 when using greedy sampling, got 2."
    nonsense = await engine.http.post(COMPLETION, content=b'{"model":', headers={"content-type": "application/json"})
    assert nonsense.status_code == 400
    assert nonsense.json()["error"]["code"] == 400


async def test_cached_tokens_are_told_and_salts_keep_tenants_apart(engine: Engine) -> None:
    async def cached(salt: str) -> int:
        answer = (await engine.post(COMPLETION, ask(COMPLETION, cache_salt=salt) | {"prompt": TOKENS})).json()
        assert answer["usage"]["prompt_tokens"] == len(TOKENS)
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert await cached("tenant-1") == 0
    assert await cached("tenant-1") == 256
    assert await cached("tenant-2") == 0
    events = await engine.stream(COMPLETION, ask(COMPLETION, cache_salt="tenant-2") | {"prompt": TOKENS} | STREAM)
    assert events.parsed[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 256
    # The running usage has no cached tokens, so a stream that is cut is charged without its discount.
    assert all("prompt_tokens_details" not in event["usage"] for event in events.of_choices)


async def test_our_client_probes_it(engine: Engine) -> None:
    async with EngineClient() as client:
        before = await client.counted_tokens(engine.process.url)
        result = await client.generate_token(engine.process.url, BASE, "probe", 60)
        assert (result.prompt_tokens, result.completion_tokens) == (1, 1)
        assert await client.counted_tokens(engine.process.url) == before + 2


async def test_background_requests_give_way_and_lose_nothing(engine: Engine) -> None:
    long = " ".join(f"Number {number} comes before number {number + 1}." for number in range(20))

    def asked(number: int) -> dict[str, Any]:
        return ask(COMPLETION, f"{long} Count from {number} to one hundred:", tokens=64, temperature=0) | STREAM

    alone = await asyncio.gather(*(engine.stream(COMPLETION, asked(number), f"alone-{number}") for number in range(8)))
    before, background = await engine.idle(), [Events() for _ in range(8)]
    first = {"temperature": 0, "cache_salt": "other"}  # nothing is cached, so all prompts are computed again
    async with asyncio.TaskGroup() as group:
        # An interactive request runs, and the prompts of the others are computed in pieces beside it.
        interactive = group.create_task(engine.stream(COMPLETION, ask(COMPLETION, tokens=120) | STREAM, "interactive"))
        await engine.runs(1)
        for number, events in enumerate(background):
            group.create_task(engine.stream(COMPLETION, asked(number) | first | {"priority": 1}, f"background-{number}", events))
        await until(lambda: sum(bool(events.of_choices) for events in background) >= 7)
        # All slots are taken, but interactive requests are served at once.
        urgent = await asyncio.gather(*(engine.stream(COMPLETION, ask(COMPLETION, tokens=3) | STREAM, f"urgent-{n}") for n in range(2)))
        assert not any(events.raw[-1:] == [b"data: [DONE]"] for events in background)
    assert [events.text() for events in background] == [events.text() for events in alone]
    usages = [events.parsed[-1]["usage"] for events in (*background, *urgent, interactive.result())]
    counted = sum(usage["prompt_tokens"] for usage in usages), sum(usage["completion_tokens"] for usage in usages)
    assert counted == (await engine.idle()).since(before), "what is computed again is not counted again"
    assert counted[1] == 8 * 64 + 120 + 2 * 3


async def test_a_dying_engine_never_seems_to_succeed_and_leaves_nothing_behind(engine: Engine) -> None:
    """This test is the last in its file, because it ends the engine."""
    family = [psutil.Process(engine.process.pid), *psutil.Process(engine.process.pid).children(recursive=True)]
    events = Events()
    stream = asyncio.create_task(engine.stream(CHAT, ask(CHAT, tokens=1800) | STREAM, into=events))
    plain = asyncio.create_task(engine.post(COMPLETION, ask(COMPLETION, tokens=1800)))
    await engine.runs(2)
    # vLLM then either reports an error of its engine, and `[DONE]` after that, or sends nothing until it is killed.
    await engine.process.stop(grace_s=5)
    ends = await asyncio.wait_for(asyncio.gather(stream, plain, return_exceptions=True), 30)
    if b"data: [DONE]" in events.raw:
        assert events.raw[-2].startswith(b'data: {"error"')
    else:
        assert isinstance(ends[0], httpx.TransportError)
    assert all(event.get("choices") for event in events.parsed if "error" not in event)
    assert isinstance(ends[1], httpx.TransportError) or (isinstance(ends[1], httpx.Response) and ends[1].status_code == 500)

    def gone() -> bool:
        return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family)

    await until(gone)
