"""Messages in one piece."""

from typing import Any

import pytest

from tests.support.anthropic_stream import check_message
from tests.unit.protocols.messages.build import PROMPT_TOKENS, REQUEST_ID, THINKING, TOOL, answer, engine_whole, whole_of


def test_a_whole_message() -> None:
    message = whole_of(engine_whole("Hello 😀", made=3, cached=16))
    check_message(message)
    assert message == {
        "id": REQUEST_ID.replace("req_", "msg_"),
        "type": "message",
        "role": "assistant",
        "model": "robot",
        "content": [{"type": "text", "text": "Hello 😀"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": PROMPT_TOKENS - 16,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 16,
            "output_tokens": 3,
            "service_tier": "standard",
        },
    }


@pytest.mark.parametrize(
    ("given", "more", "kinds"),
    [
        ({"content": "a"}, {}, ["text"]),
        ({"content": ""}, {}, []),
        ({"content": None}, {}, []),
        ({"content": "\n"}, {}, ["text"]),
        ({"content": "\n", "calls": [("f", "{}")]}, {}, ["tool_use"]),
        ({"content": "a", "calls": [("f", "{}"), ("g", "")]}, {}, ["text", "tool_use", "tool_use"]),
        ({"content": "a", "reasoning": "b"}, THINKING, ["thinking", "text"]),
        ({"content": "\n", "reasoning": "b"}, THINKING, ["thinking"]),
        ({"content": "a", "reasoning": "b"}, {}, ["text"]),
        ({"content": "a", "reasoning": "b"}, {"thinking": {"type": "disabled"}}, ["text"]),
    ],
)
def test_blocks(given: dict[str, Any], more: dict[str, Any], kinds: list[str]) -> None:
    message = whole_of(engine_whole(given.pop("content"), **given), **more)
    check_message(message)
    assert [block["type"] for block in message["content"]] == kinds
    assert all(block["signature"] for block in message["content"] if block["type"] == "thinking")
    assert len({block["id"] for block in message["content"] if "id" in block}) == kinds.count("tool_use")


@pytest.mark.parametrize(
    ("arguments", "read"),
    [
        ('{"a": 1}', {"a": 1}),
        ("", {}),
        (" ", {}),
        ('{"a": 123456789012345678901234567890}', {"a": 123456789012345678901234567890}),
        ('{"a": ', {"invalid_arguments": '{"a": '}),
        ("[1]", {"invalid_arguments": "[1]"}),
        ("null", {"invalid_arguments": "null"}),
        ('{"a": NaN}', {"invalid_arguments": '{"a": NaN}'}),
        ("[" * 5000, {"invalid_arguments": "[" * 5000}),
    ],
)
def test_arguments_are_an_object(arguments: str, read: dict[str, Any]) -> None:
    message = whole_of(engine_whole(None, "tool_calls", calls=[("f", arguments)]), tools=[TOOL])
    check_message(message)
    assert message["content"][0]["input"] == read


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"content": "a", "finish": "length", "made": 100}, ("max_tokens", None)),
        ({"content": "a", "finish": "length", "made": 99}, ("model_context_window_exceeded", None)),
        ({"content": "a", "finish": "stop", "stop": "END"}, ("stop_sequence", "END")),
        ({"content": "a", "finish": "stop", "stop": 2}, ("end_turn", None)),
        ({"content": "a", "finish": "content_filter"}, ("refusal", None)),
        ({"content": "", "finish": "stop", "calls": [("f", "{}")]}, ("tool_use", None)),
        ({"content": "", "finish": "tool_calls", "stop": "END", "calls": [("f", "{}")]}, ("tool_use", None)),
    ],
)
def test_stop_reasons(given: dict[str, Any], expected: tuple[str, str | None]) -> None:
    message = whole_of(engine_whole(given.pop("content"), **given))
    check_message(message)
    assert (message["stop_reason"], message["stop_sequence"]) == expected


def test_the_ledger_counts_the_whole_prompt() -> None:
    made = answer(stream=False)
    assert made.usage is None
    made.take(engine_whole("a", made=3, cached=16))
    assert made.usage == {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 16}}


def test_an_answer_that_the_engine_aborts() -> None:
    made = answer(stream=False)
    made.take(engine_whole("a", "abort"))
    assert made.aborted


@pytest.mark.parametrize("text", [b"", b"hello", b"[]", b"{}", b'{"choices":[],"usage":{}}', b'{"choices":[{"message":7}],"usage":{}}'])
def test_bytes_that_are_no_answer(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        answer(stream=False).take(text)


def test_a_call_without_a_name_is_no_answer() -> None:
    text = engine_whole(None, calls=[("f", "{}")]).replace(b'"name": "f"', b'"name": null')
    with pytest.raises(ValueError, match="name"):
        answer(stream=False).take(text)
