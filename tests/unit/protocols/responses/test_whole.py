"""Whole answers, and what the protocol stores and looks up."""

import json
from typing import Any

import pytest
from openai.types.responses import Response

from lmaas.errors import NotFound
from lmaas.protocols.responses.answer import StreamedResponse, WholeResponse
from lmaas.protocols.responses.protocol import Responses
from tests.unit.protocols.responses.build import BODY, HEX, TOOLS, NoState, inference, stream, whole, words


def body(message: dict[str, Any], finish: str = "stop", **choice: Any) -> bytes:
    """Return the engine's response."""
    plain = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "reasoning": None,
    }
    details = {"cached_tokens": 3, "created_cache_tokens": 2, "multimodal_tokens": None}
    usage = {"prompt_tokens": 7, "total_tokens": 12, "completion_tokens": 5, "prompt_tokens_details": details}
    answer = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m", "service_tier": None, "system_fingerprint": "x"}
    told = {
        "index": 0,
        "message": plain | message,
        "logprobs": None,
        "finish_reason": finish,
        "stop_reason": None,
        "token_ids": None,
    } | choice
    return json.dumps(answer | {"choices": [told], "usage": usage | {"completion_tokens_details": {"reasoning_tokens": 2}}}).encode()


def call(name: str, arguments: str) -> dict[str, Any]:
    return {"id": "chatcmpl-tool-1", "type": "function", "function": {"name": name, "arguments": arguments}}


CASES: dict[str, tuple[bytes, list[tuple[str, str, str]]]] = {
    "text": (body({"content": "Hi"}), [("message", "completed", "Hi")]),
    "nothing": (body({"content": ""}), [("message", "completed", "")]),
    "no content": (body({}), [("message", "completed", "")]),
    "cut": (body({"content": "Hi"}, "length"), [("message", "incomplete", "Hi")]),
    "reasoning": (body({"content": "\n\nHi", "reasoning": "Hm"}), [("reasoning", "completed", "Hm"), ("message", "completed", "\n\nHi")]),
    "calls": (
        body({"content": "\n", "tool_calls": [call("weather", "{}"), call("apply_patch", '{"input": "x"}')]}, "tool_calls"),
        [("function_call", "completed", "{}"), ("custom_tool_call", "completed", "x")],
    ),
    "text and a call": (
        body({"content": "Well.", "tool_calls": [call("weather", "{}")]}, "tool_calls"),
        [("message", "completed", "Well."), ("function_call", "completed", "{}")],
    ),
    "a call that is cut": (body({"tool_calls": [call("weather", "{")]}, "length"), [("function_call", "incomplete", "{")]),
}


@pytest.mark.parametrize(("engine", "expected"), CASES.values(), ids=CASES)
def test_items(engine: bytes, expected: list[tuple[str, str, str]]) -> None:
    response = whole(engine, tools=TOOLS)
    found = []
    for item in response["output"]:
        text = "".join(part["text"] for part in item["content"]) if "content" in item else item.get("arguments", item.get("input"))
        found.append((item["type"], item["status"], text))
    assert found == expected
    is_cut = expected[-1][1] == "incomplete"
    assert response["status"] == ("incomplete" if is_cut else "completed")
    assert response["incomplete_details"] == ({"reason": "max_output_tokens"} if is_cut else None)
    assert (response["completed_at"] is None) is is_cut
    assert response["usage"] == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 2},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 12,
    }
    parsed = Response.model_validate(response)
    assert json.loads(parsed.model_dump_json(exclude_unset=True)) == response


def test_log_probabilities() -> None:
    token = {"token": "Hi", "logprob": -0.5, "bytes": [72, 105], "top_logprobs": []}
    asked = {"include": ["message.output_text.logprobs"]}
    response = whole(body({"content": "Hi"}, logprobs={"content": [token]}), **asked)
    assert response["output"][0]["content"][0]["logprobs"] == [token]
    response = whole(body({"content": "Hi", "reasoning": "Hm"}, logprobs={"content": [token]}), **asked)
    assert response["output"][1]["content"][0]["logprobs"] == []


@pytest.mark.parametrize("engine", [b"", b"{", b"[]", b'{"choices":[]}', b'{"choices":[{"index":0}]}', body({"content": 5})])
def test_bytes_that_are_no_answer(engine: bytes) -> None:
    answer = WholeResponse(inference())
    with pytest.raises(ValueError):  # noqa: PT011 (any error, by the contract)
        answer.take(engine)


def test_an_aborted_answer() -> None:
    answer = WholeResponse(inference())
    answer.take(body({"content": "Hi"}, "abort"))
    assert answer.aborted
    assert answer.usage is not None
    assert answer.usage["completion_tokens"] == 5


def test_ids() -> None:
    protocol = Responses(NoState())
    assert (protocol.path, protocol.engine_path) == ("/v1/responses", "/v1/chat/completions")
    assert protocol.engine_ids(f"req_{HEX}", protocol.read(BODY)) == [f"chatcmpl-req_{HEX}"]
    assert isinstance(protocol.answer(inference()), WholeResponse)
    assert isinstance(protocol.answer(inference(stream=True)), StreamedResponse)


@pytest.mark.parametrize("streams", [True, False])
async def test_a_response_is_stored_before_its_end(streams: bool) -> None:
    state = NoState()
    protocol, request = (
        Responses(state),
        inference(stream=streams, previous_response_id="resp_1", input=[{"role": "user", "content": "Hi"}]),
    )
    answer = request.answer = protocol.answer(request)
    if streams:
        answer.feed(stream(*words("a")))
    else:
        answer.take(body({"content": "a"}))
    await protocol.keep(request)
    (new,) = state.stored
    assert (new.id, new.previous_response_id, new.conversation_id) == (f"resp_{HEX}", "resp_1", None)
    assert [part["text"] for item in json.loads(new.body)["output"] for part in item["content"]] == ["a"]
    message = {"type": "message", "role": "user", "status": "completed", "content": [{"type": "input_text", "text": "Hi"}]}
    assert new.input_items == [{"id": f"msg_{HEX}8000"} | message]
    # The client receives the stored response.
    assert new.body in answer.end()


async def test_a_response_that_is_not_to_be_stored() -> None:
    state = NoState()
    protocol, request = Responses(state), inference(store=False)
    request.answer = protocol.answer(request)
    request.answer.take(body({"content": "a"}))
    await protocol.keep(request)
    assert state.stored == []


async def test_what_a_request_refers_to() -> None:
    state = NoState(msg_1={"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "B"}]})
    state.context = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "A"}]}]
    protocol = Responses(state)
    items = [{"id": "msg_1"}, {"role": "user", "content": "C"}]
    for more, expected in (({}, ["B", "C"]), ({"previous_response_id": "r"}, ["A", "B", "C"]), ({"conversation": "c"}, ["A", "B", "C"])):
        request = protocol.read(BODY | more | {"input": items, "instructions": "S"})
        await protocol.expand("ten_1", request)
        assert [message["content"] for message in request.parameters["messages"]] == ["S", *expected]
    with pytest.raises(NotFound, match="msg_2"):
        await protocol.expand("ten_1", protocol.read(BODY | {"input": [{"id": "msg_2"}]}))
    plain = protocol.read(BODY)
    await protocol.expand("ten_1", plain)
    assert plain.parameters == protocol.read(BODY).parameters
