"""The input: items from clients, and the messages for the model."""

import json
from typing import Any

import pytest

from lmaas.errors import InvalidRequest
from lmaas.protocols.responses.items import MAX_ITEMS, item_id, messages_of, named, read_items, response_of
from tests.unit.protocols.responses.build import HEX, TOOLS, calling, stream, streamed, words

USER = {"role": "user", "content": "Hi"}
CALL = {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": '{"a": 1}'}
RESULT = {"type": "function_call_output", "call_id": "call_1", "output": "5"}
CUSTOM = {"type": "custom_tool_call", "call_id": "call_2", "name": "patch", "input": 'a "b"\n'}
REASONING = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}


def messages(value: Any, instructions: str | None = None) -> list[dict[str, Any]]:
    return messages_of(instructions, read_items("input", value))


def called(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


F = called("call_1", "f", '{"a": 1}')
G = called("call_2", "patch", json.dumps({"input": CUSTOM["input"]}))
READ: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "a string": ("Hi", [USER]),
    "the easy form": ([USER], [USER]),
    "the full form": (
        [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}], "status": "completed"}],
        [USER],
    ),
    "two parts": (
        [{"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "text", "text": "b"}]}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
    ),
    "no parts": ([{"role": "user", "content": []}, {"role": "user", "content": None}], [{"role": "user", "content": ""}] * 2),
    "roles": (
        [{"role": role, "content": "x"} for role in ("system", "developer", "user", "assistant")],
        [{"role": role, "content": "x"} for role in ("system", "developer", "user", "assistant")],
    ),
    "an output message": (
        [
            {
                "id": "msg_1",
                "type": "message",
                "role": "assistant",
                "status": "completed",
                "phase": None,
                "content": [{"type": "output_text", "text": "Yes", "annotations": [], "logprobs": [], "parsed": None}],
                "extra": {"x": 1},
            }
        ],
        [{"role": "assistant", "content": "Yes"}],
    ),
    "a refusal": ([{"role": "assistant", "content": [{"type": "refusal", "refusal": "No"}]}], [{"role": "assistant", "content": "No"}]),
    "a call and its result": (
        [USER, CALL, RESULT],
        [USER, {"role": "assistant", "content": None, "tool_calls": [F]}, {"role": "tool", "tool_call_id": "call_1", "content": "5"}],
    ),
    "a turn is one message": (
        [
            REASONING,
            {"role": "assistant", "content": "Well."},
            CALL,
            CUSTOM,
            RESULT,
            RESULT | {"call_id": "call_2", "type": "custom_tool_call_output"},
        ],
        [
            {"role": "assistant", "content": "Well.", "reasoning": "Hm.", "tool_calls": [F, G]},
            {"role": "tool", "tool_call_id": "call_1", "content": "5"},
            {"role": "tool", "tool_call_id": "call_2", "content": "5"},
        ],
    ),
    "text after a call": ([CALL, {"role": "assistant", "content": "x"}], [{"role": "assistant", "content": "x", "tool_calls": [F]}]),
    "two answers": (
        [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}],
    ),
    "reasoning begins a turn": (
        [CALL, REASONING, CUSTOM],
        [
            {"role": "assistant", "content": None, "tool_calls": [F]},
            {"role": "assistant", "content": None, "reasoning": "Hm.", "tool_calls": [G]},
        ],
    ),
    "only reasoning": ([REASONING], [{"role": "assistant", "content": "", "reasoning": "Hm."}]),
    "encrypted reasoning of another service": (
        [{"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAA", "content": None}, USER],
        [USER],
    ),
    "a result in parts": (
        [RESULT | {"output": [{"type": "input_text", "text": "5"}]}],
        [{"role": "tool", "tool_call_id": "call_1", "content": "5"}],
    ),
    "no result": ([RESULT | {"output": None}], [{"role": "tool", "tool_call_id": "call_1", "content": ""}]),
    "arguments that are no JSON": (
        [CALL | {"arguments": '{"a'}],
        [{"role": "assistant", "content": None, "tool_calls": [called("call_1", "f", '{"invalid_arguments": "{\\"a"}')]}],
    ),
    "arguments as an object": ([CALL | {"arguments": {"a": 1}}], [{"role": "assistant", "content": None, "tool_calls": [F]}]),
}


@pytest.mark.parametrize(("value", "expected"), READ.values(), ids=READ)
def test_what_the_model_reads(value: Any, expected: list[dict[str, Any]]) -> None:
    assert messages(value) == expected
    assert messages(value, "Be brief.") == [{"role": "system", "content": "Be brief."}, *expected]
    # Items that have been read once can be stored and read again.
    assert messages(read_items("input", value)) == expected


BAD: dict[str, tuple[Any, str, str]] = {
    "a number": (5, "invalid_type", "input"),
    "an object": (USER, "invalid_type", "input"),
    "a list of strings": (["Hi"], "invalid_type", "input[0]"),
    "too many": ([USER] * (MAX_ITEMS + 1), "out_of_range", "input"),
    "too many parts": ([{"role": "user", "content": ["a"] * 101}] * 100, "out_of_range", "input"),
    "too many parts of results": ([RESULT | {"output": ["a"] * 10_001}], "out_of_range", "input"),
    "too many thoughts": (
        [{"type": "reasoning", "summary": [""] * 5_001, "content": ["a"] * 5_000}],
        "out_of_range",
        "input",
    ),
    "no role": ([USER, {"type": "message", "content": "x"}], "invalid_type", "input[1].role"),
    "a tool's role": ([{"role": "tool", "content": "x"}], "invalid_type", "input[0].role"),
    "a strange role": ([{"role": ["user"], "content": "x"}], "invalid_type", "input[0].role"),
    "an image": (
        [{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}],
        "unsupported_content",
        "input[0].content",
    ),
    "a file": ([{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}], "unsupported_content", "input[0].content"),
    "a sound": ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}], "unsupported_content", "input[0].content"),
    "an image in a result": (
        [RESULT | {"output": [{"type": "input_image", "file_id": "f"}]}],
        "unsupported_content",
        "input[0].output",
    ),
    "content of another type": ([{"role": "user", "content": 5}], "invalid_type", "input[0].content"),
    "a call without a name": ([CALL | {"name": None}], "invalid_type", "input[0].name"),
    "a call without an id": ([CALL | {"call_id": None}], "invalid_type", "input[0].call_id"),
    "arguments of another type": ([CALL | {"arguments": 5}], "invalid_type", "input[0].arguments"),
    "a result without an id": ([{"type": "function_call_output", "output": "x"}], "invalid_type", "input[0].call_id"),
    "a result of another type": ([RESULT | {"output": {"a": 1}}], "invalid_type", "input[0].output"),
    "a custom call without input": ([CUSTOM | {"input": None}], "invalid_type", "input[0].input"),
    "a strange summary": ([{"type": "reasoning", "summary": "x"}], "invalid_type", "input[0].summary"),
    "a strange summary's text": ([{"type": "reasoning", "summary": [{"text": 5}]}], "invalid_type", "input[0].summary"),
    "a reference without an id": ([{"type": "item_reference"}], "invalid_type", "input[0].id"),
    "a reference to nothing": ([{"type": "item_reference", "id": ""}], "out_of_range", "input[0].id"),
    "a strange type": ([{"type": 5}], "unsupported_content", "input[0].type"),
}
FOREIGN = (
    *("web_search_call", "file_search_call", "computer_call", "computer_call_output", "code_interpreter_call", "image_generation_call"),
    *("local_shell_call", "local_shell_call_output", "shell_call", "shell_call_output", "apply_patch_call", "apply_patch_call_output"),
    *("mcp_call", "mcp_list_tools", "mcp_approval_request", "mcp_approval_response", "compaction", "tool_search_call", "additional_tools"),
)


@pytest.mark.parametrize(
    ("value", "code", "param"),
    [*BAD.values(), *(([{"type": kind, "id": "x"}], "unsupported_content", "input[0].type") for kind in FOREIGN)],
    ids=[*BAD, *FOREIGN],
)
def test_what_is_refused(value: Any, code: str, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_items("input", value)
    assert (caught.value.error_code, caught.value.param) == (code, param)
    assert param.partition(".")[0] in caught.value.message


def test_references() -> None:
    assert read_items("input", [{"type": "item_reference", "id": "msg_1"}, {"id": "rs_1"}]) == [
        {"type": "item_reference", "id": "msg_1"},
        {"type": "item_reference", "id": "rs_1"},
    ]


def test_an_output_is_accepted_back() -> None:
    engine = stream({"reasoning": "r"}, *words("a"), calling(0, "weather", '{"city":"x"}'), calling(1, "apply_patch", '{"input":"p"}'))
    output = streamed(engine, tools=TOOLS).response["output"]
    turn = messages(output)
    assert turn == [
        {
            "role": "assistant",
            "content": "a",
            "reasoning": "r",
            "tool_calls": [
                called(f"call_{HEX}0002", "weather", '{"city":"x"}'),
                called(f"call_{HEX}0003", "apply_patch", '{"input": "p"}'),
            ],
        }
    ]
    assert [item["id"] for item in read_items("input", output)] == [item["id"] for item in output]


def test_ids() -> None:
    response = f"resp_{HEX}"
    items = named(read_items("input", [USER, CALL, RESULT, CUSTOM, REASONING]), response)
    prefixes = ("msg", "fc", "fco", "ctc", "rs")
    assert [item["id"] for item in items] == [f"{prefix}_{HEX}800{number}" for number, prefix in enumerate(prefixes)]
    assert {response_of(item["id"]) for item in items} == {response}
    assert response_of(item_id("message", response, 5)) == response
    assert messages_of(None, items) == messages([USER, CALL, RESULT, CUSTOM, REASONING])
