"""Forms of responses that only some clients use."""

import json
from typing import Any

from lmaas.protocols.answers import events_in_clients_form, in_clients_form
from lmaas.protocols.parameters.request import read_chat, read_completion

FUNCTIONS = read_chat({"model": "m", "messages": [{"role": "user", "content": "x"}], "functions": [{"name": "f"}]})
ECHO = read_completion({"model": "m", "prompt": "x", "echo": True, "max_tokens": 0})
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"ü": 1}'}}


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


def test_a_call_is_a_function_call_for_clients_of_functions() -> None:
    other = {**CALL, "function": {"name": "g", "arguments": "{}"}}
    message = {"role": "assistant", "content": None, "tool_calls": [CALL, other], "function_call": None}
    answer = {"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}], "usage": {"prompt_tokens": 5}}
    (choice,) = json.loads(in_clients_form(encoded(answer), FUNCTIONS))["choices"]
    assert choice["finish_reason"] == "function_call"
    assert choice["message"] == {"role": "assistant", "content": None, "function_call": CALL["function"]}


def test_text_stays_text_for_clients_of_functions() -> None:
    answer = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}]}
    assert json.loads(in_clients_form(encoded(answer), FUNCTIONS)) == answer


def deltas(*choices: dict[str, Any]) -> bytes:
    return b"".join(b"data: " + encoded({"choices": [choice]}) + b"\n\n" for choice in choices)


def test_a_streamed_call_is_a_function_call_for_clients_of_functions() -> None:
    stream = deltas(
        {"delta": {"role": "assistant", "content": ""}, "finish_reason": None},
        {"delta": {"tool_calls": [{"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}]}},
        {"delta": {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]}},
        {"delta": {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]}},
        {"delta": {"tool_calls": [{"index": 1, "function": {"name": "g", "arguments": "{}"}}]}},
        {"delta": {}, "finish_reason": "tool_calls"},
    )
    out = events_in_clients_form(stream + b'data: {"choices":[],"usage":{}}\n\ndata: [DONE]\n\n', FUNCTIONS)
    assert out.endswith(b"}\n\ndata: [DONE]\n\n")
    events = [json.loads(event.removeprefix(b"data: ")) for event in out.split(b"\n\n")[:-2]]
    choices = [event["choices"][0] for event in events[:-1]]
    calls = [choice["delta"].get("function_call") for choice in choices]
    assert calls == [None, {"name": "f", "arguments": ""}, {"arguments": '{"a"'}, {"arguments": ": 1}"}, None, None]
    assert all("tool_calls" not in choice["delta"] for choice in choices)
    assert choices[-1]["finish_reason"] == "function_call"


def test_an_echo_without_generation_has_no_completion_tokens() -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8}
    choice = {"index": 0, "text": "x", "finish_reason": "stop", "stop_reason": 5, "token_ids": [1]}
    answer = json.loads(in_clients_form(encoded({"choices": [choice], "usage": usage}), ECHO))
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 0, "total_tokens": 7}
    assert answer["choices"] == [{"index": 0, "text": "x", "finish_reason": "length", "stop_reason": None, "token_ids": []}]
    out = events_in_clients_form(b"data: " + encoded({"choices": [], "usage": usage}) + b"\n\ndata: [DONE]\n\n", ECHO)
    assert json.loads(out.split(b"\n\n")[0].removeprefix(b"data: "))["usage"] == answer["usage"]
