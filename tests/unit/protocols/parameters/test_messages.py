"""Messages as clients send them: returned by the service, extended by their libraries, or broken by a model."""

import json
from typing import Any

import pytest

from lmaas.protocols.parameters.messages import MAX_MESSAGES, MAX_PARTS
from lmaas.protocols.parameters.request import read_chat
from tests.unit.protocols.parameters.build import CHAT, FUNCTION, USER, nested, refusal, sent, values

#: The maximum number of parts in a request, with calls among them.
MOST_PARTS = [{"role": "assistant", "content": ["a"] * 99, "tool_calls": [{"id": "c", "function": {"name": "f"}}]}] * (MAX_PARTS // 100)
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def engines(*messages: Any) -> list[dict[str, Any]]:
    """Return the messages that the engine receives."""
    received: list[dict[str, Any]] = sent(read_chat(CHAT | {"messages": list(messages)}))["messages"]
    return received


@pytest.mark.parametrize(
    ("messages", "code", "param"),
    [
        ([], "empty_prompt", "messages"),
        ([USER] * (MAX_MESSAGES + 1), "out_of_range", "messages"),
        ([{"role": "user", "content": ["a"] * (MAX_PARTS + 1)}], "out_of_range", "messages"),
        ([{"role": "user", "content": ["a"] * 101}] * 100, "out_of_range", "messages"),
        ([{"role": "assistant", "tool_calls": [CALL] * 100}] * 101, "out_of_range", "messages"),
        ("Hello", "invalid_type", "messages"),
        (["Hello"], "invalid_type", "messages[0]"),
        ([USER, None], "invalid_type", "messages[1]"),
        ([USER, {"role": "root", "content": "x"}], "invalid_type", "messages[1]"),
        ([{"role": {}, "content": "x"}], "invalid_type", "messages[0]"),
        ([{"content": "x"}], "invalid_type", "messages[0]"),
        ([{"role": "user", "content": 5}], "invalid_type", "messages[0].content"),
        ([{"role": "user", "content": {"type": "text", "text": "x"}}], "invalid_type", "messages[0].content"),
        ([{"role": "user", "content": [5]}], "invalid_type", "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "invalid_type", "messages[0].content"),
        *(
            ([{"role": role, "content": [{"type": "text", "text": "x"}, part]}], "unsupported_content", "messages[0].content")
            for role in ("user", "system", "tool", "assistant")
            for part in (
                {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}},
                {"type": "image_url", "image_url": "file:///etc/passwd"},
                {"type": "input_image", "image_url": "http://x"},
                {"type": "image_embeds", "image_embeds": "AAAA"},
                {"type": "input_audio", "input_audio": {}},
                {"type": "video_url", "video_url": {"url": "http://x"}},
                {"type": "file", "file": {"file_id": "f"}},
                {"type": "document", "source": {}},
                {"type": "tool_use", "name": "f"},
                {"type": "prompt_embeds", "data": "AAAA"},
                {"type": "text", "text": "x", "image_url": "http://x", "uuid": "1"},
                {"image_url": "http://x"},
                {"type": ["text"], "text": "x"},
                {},
            )
        ),
        ([{"role": "user", "content": "x", "name": {}}], "invalid_type", "messages[0].name"),
        ([{"role": "tool", "content": "x", "tool_call_id": 5}], "invalid_type", "messages[0].tool_call_id"),
        ([{"role": "assistant", "content": None, "refusal": []}], "invalid_type", "messages[0].refusal"),
        ([{"role": "assistant", "content": "x", "reasoning_content": 5}], "invalid_type", "messages[0].reasoning_content"),
        *(
            ([{"role": "assistant", "content": None, "tool_calls": calls}], "invalid_type", "messages[0].tool_calls")
            for calls in values("x", {"a": 1}, [{}], [5], [{"type": "function", "function": {"name": 5}}], [nested(900)], [CALL] * 129)
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 5}}]}],
            "invalid_type",
            "messages[0].tool_calls",
        ),
        ([{"role": "assistant", "function_call": "x"}], "invalid_type", "messages[0].function_call"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": nested(200)}}]}],
            "invalid_json",
            "messages[0].tool_calls",
        ),
        ([{"role": "assistant", "audio": {"id": "audio_1"}}], "unsupported_content", "messages[0].audio"),
    ],
)
def test_bad_messages(messages: Any, code: str, param: str) -> None:
    # An engine's own failure would be taken for a lost engine, and retried.
    assert refusal(read_chat, CHAT | {"messages": messages}) == (code, param)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "developer", "content": "Be brief."}, USER],
        [{"role": "system", "content": [{"type": "text", "text": "ünï"}]}, USER | {"name": "Ann"}],
        [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "5", "tool_call_id": "c"},
        ],
        [{"role": "user", "content": ""}],
        [USER, {"role": "assistant", "content": "x", "reasoning": "hm", "reasoning_content": "hm"}],
        [{"role": "user", "content": "a\0b"}],
    ],
)
def test_good_messages_reach_the_engine_as_they_came(messages: list[dict[str, Any]]) -> None:
    body = CHAT | {"messages": messages, "tools": [FUNCTION], "tool_choice": {"type": "function", "function": {"name": "f"}}}
    assert sent(read_chat(body))["messages"] == messages


#: An assistant message as clients' libraries return it: openai-python's object and model_dump(), openai-node, LiteLLM, parsed helpers.
ANSWERS: list[dict[str, Any]] = [
    {"content": "Hi", "refusal": None, "role": "assistant", "annotations": None, "audio": None, "function_call": None, "tool_calls": None},
    {"role": "assistant", "content": "Hi", "annotations": [], "reasoning": None, "reasoning_content": None, "tool_calls": []},
    {"role": "assistant", "content": "Hi", "provider_specific_fields": {"refusal": None, "reasoning": None}, "images": None},
    {"role": "assistant", "content": "Hi", "parsed": {"answer": 5}, "refusal": None, "thinking_blocks": [{"type": "thinking"}]},
    {"role": "assistant", "content": "Hi", "audio": {"id": "audio_1", "transcript": "Hi"}, "reasoning_details": [{"a": 1}]},
    {"role": "assistant", "content": "Hi", "id": "msg_1", "timestamp": 5, "is_error": False, "cache_control": {"type": "ephemeral"}},
    {"role": "assistant", "content": "Hi", "function_call": None, "token_ids": None, "usage": {"a": 1}, "metadata": None, "weight": 0},
    {"role": "assistant", "content": None, "refusal": "Hi"},
    {"role": "assistant", "content": None, "audio": {"id": "audio_1", "transcript": "Hi"}},
]


@pytest.mark.parametrize("answer", ANSWERS)
def test_everything_that_was_returned_is_accepted_back(answer: dict[str, Any]) -> None:
    assert engines(USER, answer, USER) == [USER, {"role": "assistant", "content": "Hi"}, USER]


def test_calls_that_were_returned_are_accepted_back() -> None:
    call = {**CALL, "index": 0, "extra": None, "function": {**CALL["function"], "parsed_arguments": {"a": 1}, "description": None}}  # type: ignore[dict-item]
    answer = ANSWERS[0] | {"content": None, "tool_calls": [call]}
    tool = {"role": "tool", "tool_call_id": "c", "content": "5", "name": "f", "is_error": True, "timestamp": "now"}
    assert engines(USER, answer, tool) == [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "content": "5", "name": "f"},
    ]
    # Without their optional fields.
    assert engines({"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]})[0] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call_0_0", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}, "id": "1", "annotations": []}], ["x"]),
        ([{"type": "input_text", "text": "x"}, {"type": "output_text", "text": "y", "logprobs": []}], ["x", "y"]),
        ([{"type": "refusal", "refusal": "no"}], ["no"]),
        ([{"type": "thinking", "thinking": "hm", "signature": "s"}], ["hm"]),
        ([{"text": "x"}, "y", None, {"type": "text", "text": None}, {"type": "text"}], ["x", "y"]),
        ([{"type": "text", "text": "x", "image_url": None}], ["x"]),
        ([], ""),
        (None, ""),
        ([None], ""),
    ],
)
@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
def test_parts(role: str, content: Any, expected: Any) -> None:
    parts = [{"type": "text", "text": text} for text in expected] if isinstance(expected, list) else expected
    assert engines({"role": role, "content": content}) == [{"role": role, "content": parts}]


def test_the_deprecated_form_of_calls_is_translated() -> None:
    function = {"name": "f", "arguments": '{"a": 1}'}
    assert engines(
        USER, {"role": "assistant", "content": None, "function_call": function}, {"role": "function", "name": "f", "content": "5"}
    ) == [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "call_1", "type": "function", "function": function}]},
        {"role": "tool", "name": "f", "content": "5", "tool_call_id": "call_1"},
    ]


def test_a_custom_tools_call_is_a_function_with_one_argument() -> None:
    call = {"id": "c", "type": "custom", "custom": {"name": "f", "input": "ls"}}
    (received,) = engines({"role": "assistant", "content": None, "tool_calls": [call]})
    assert received["tool_calls"] == [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"input": "ls"}'}}]


def arguments(value: Any) -> str:
    (received,) = engines({"role": "assistant", "content": None, "tool_calls": [CALL | {"function": {"name": "f", "arguments": value}}]})
    found: str = received["tool_calls"][0]["function"]["arguments"]
    return found


@pytest.mark.parametrize(
    "text", ['{"a": 1}', "{}", ' {"a": [1, {"b": null}]} ', '{"a": 1, "a": 2}', '{"a": NaN}', '{"ü": "\\ud83d\\ude00"}']
)
def test_arguments_that_an_engine_takes_are_passed_on(text: str) -> None:
    assert arguments(text) == text


@pytest.mark.parametrize(
    "text",
    [
        *('{"city": "Par', "{", "not JSON", '"gaben_gaben"', "[1, 2]", "5", "null", "true", '{"a": 1} {"b": 2}', "{'a': 1}"),
        *('{"a": "\\ud800"}', "[" * 100_000, '{"a": ' * 200 + "1" + "}" * 200, '{"a": ' + "9" * 5000 + "}", '{"a": "x\ny"}', "\ufeff{}"),
    ],
)
def test_arguments_that_a_model_broke_are_shown_to_it_as_they_are(text: str) -> None:
    assert json.loads(arguments(text)) == {"invalid_arguments": text}


@pytest.mark.parametrize(
    ("value", "expected"), [(None, {}), ("", {}), (" \n", {}), ({}, {}), ({"a": 1}, {"a": 1}), ([1], {"invalid_arguments": "[1]"})]
)
def test_arguments_that_are_no_string(value: Any, expected: Any) -> None:
    assert json.loads(arguments(value)) == expected


def test_as_many_parts_as_a_request_may_have() -> None:
    received = engines(*MOST_PARTS)
    assert sum(len(message["content"]) + len(message["tool_calls"]) for message in received) == MAX_PARTS
