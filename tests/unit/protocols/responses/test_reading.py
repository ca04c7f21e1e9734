"""The fields of a request, the engine's body, and the field that a refusal names."""

import json
from typing import Any

import pytest
from openai.types.responses import Response

from lmaas.errors import InvalidRequest, NotFound
from lmaas.protocols.responses.parameters import INCLUDABLE, TABLE
from lmaas.protocols.responses.request import ResponsesRequest, read_response
from tests.unit.protocols.parameters.build import model, nested, refusal
from tests.unit.protocols.responses.build import BODY, CUSTOM, FUNCTION, stream, streamed, words

CODEX: dict[str, Any] = {
    "model": "m",
    "instructions": "You are Codex.",
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "<permissions>"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Fix it."}]},
    ],
    "tools": [
        {"type": "function", "name": "shell", "description": "Runs", "strict": False, "parameters": {"type": "object", "properties": {}}},
        {
            "type": "custom",
            "name": "apply_patch",
            "description": "Edits",
            "format": {"type": "grammar", "syntax": "lark", "definition": "start: x"},
        },
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0199",
    "text": {"verbosity": "medium"},
    "client_metadata": {"session": "x"},
}


def read(**changes: Any) -> ResponsesRequest:
    return read_response(BODY | changes)


def sent(**changes: Any) -> dict[str, Any]:
    """Return the engine's body, without the messages and the fields that every request has."""
    found: dict[str, Any] = json.loads(read(**changes).body("engine", "salt"))
    for name in ("model", "messages", "cache_salt", "stream", "stream_options"):
        found.pop(name, None)
    return found


def chat_function(**more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "parameters": FUNCTION["parameters"]} | more}


STRICT = chat_function(strict=True)
AS_FUNCTION: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "apply_patch",
        "description": "",
        "parameters": {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"], "additionalProperties": False},
    },
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
SENT: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({name: None for name in TABLE.by_name if name != "input"}, {}),
    ({"max_output_tokens": 5}, {"max_completion_tokens": 5}),
    (
        {"temperature": 0.5, "top_p": 0.0, "top_k": 5, "seed": 1, "stop": "x"},
        {"temperature": 0.5, "top_p": 1e-6, "top_k": 5, "seed": 1, "stop": "x"},
    ),
    ({"reasoning": {"effort": "high", "summary": "auto", "context": "auto"}}, {"reasoning_effort": "high"}),
    ({"reasoning": {"effort": None}}, {}),
    ({"text": {"verbosity": "low"}}, {}),
    ({"text": {"format": {"type": "text"}}}, {}),
    ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
    (
        {"text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True, "description": None}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}},
    ),
    ({"include": list(INCLUDABLE[1:])}, {}),
    ({"include": ["message.output_text.logprobs"]}, {"logprobs": True, "top_logprobs": 0}),
    ({"include": ["message.output_text.logprobs"], "top_logprobs": 3}, {"logprobs": True, "top_logprobs": 3}),
    ({"top_logprobs": 3}, {}),
    ({"tools": []}, {}),
    ({"tools": [], "tool_choice": "auto"}, {}),
    ({"tools": [FUNCTION]}, {"tools": [chat_function()]}),
    ({"tools": [{"type": "function", "function": chat_function()["function"]}]}, {"tools": [chat_function()]}),
    ({"tools": [FUNCTION | {"strict": True, "defer_loading": False, "async": None}]}, {"tools": [STRICT]}),
    ({"tools": [CUSTOM]}, {"tools": [AS_FUNCTION]}),
    ({"tools": [FUNCTION], "tool_choice": "required"}, {"tools": [STRICT], "tool_choice": "required"}),
    (
        {"tools": [FUNCTION, CUSTOM], "tool_choice": {"type": "function", "name": "weather"}},
        {"tools": [STRICT, AS_FUNCTION], "tool_choice": {"type": "function", "function": {"name": "weather"}}},
    ),
    (
        {"tools": [FUNCTION, CUSTOM], "tool_choice": {"type": "custom", "name": "apply_patch"}},
        {
            "tools": [chat_function(), {"type": "function", "function": AS_FUNCTION["function"] | {"strict": True}}],
            "tool_choice": {"type": "function", "function": {"name": "apply_patch"}},
        },
    ),
    (
        {
            "tools": [FUNCTION, CUSTOM],
            "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "custom", "name": "apply_patch"}]},
        },
        {"tools": [AS_FUNCTION], "tool_choice": "auto"},
    ),
    ({"tools": [FUNCTION], "parallel_tool_calls": False}, {"tools": [chat_function()], "parallel_tool_calls": False}),
    ({"metadata": {"a": "b"}, "user": "u", "safety_identifier": "s", "store": False, "truncation": "auto", "max_tool_calls": 3}, {}),
    ({"background": False, "context_management": [], "n": 1, "stream_options": {"include_obfuscation": False}}, {}),
]


@pytest.mark.parametrize(("body", "expected"), SENT, ids=lambda value: json.dumps(value)[:60])
def test_what_the_engine_gets(body: dict[str, Any], expected: dict[str, Any]) -> None:
    assert sent(**body) == expected


BUILT_IN = (
    *("web_search", "web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11", "file_search", "code_interpreter"),
    *("computer", "computer_use", "computer_use_preview", "mcp", "image_generation", "local_shell", "shell", "apply_patch"),
    *("programmatic_tool_calling", "tool_search", "something_new"),
)
REFUSED: list[tuple[str, Any, str, str]] = [
    ("background", "true", "invalid_type", "background"),
    ("background_options", {"completion_window": "2h"}, "unsupported_parameter", "background_options"),
    ("prompt", {"id": "p"}, "unsupported_parameter", "prompt"),
    ("n", 2, "unsupported_parameter", "n"),
    *((name, "x", "unsupported_parameter", name) for name in ("messages", "max_tokens", "response_format", "cache_salt", "unknown")),
    ("moderation", {"model": "m"}, "unsupported_parameter", "moderation"),
    ("context_management", [{"type": "compaction"}], "unsupported_parameter", "context_management"),
    *(("tools", [FUNCTION, {"type": kind}], "unsupported_parameter", "tools[1].type") for kind in BUILT_IN),
    ("tools", [{"type": "web_search", "external_web_access": True}], "unsupported_parameter", "tools[0].type"),
    ("tools", [{"type": "namespace", "tools": []}], "invalid_type", "tools[0].name"),
    ("tools", [{"type": "namespace", "name": 'a"b', "tools": []}], "invalid_type", "tools[0].name"),
    ("tools", [{"type": "namespace", "name": "n"}], "invalid_type", "tools[0].tools"),
    ("tools", [{"type": "namespace", "name": "n", "tools": [FUNCTION] * 129}], "invalid_type", "tools[0].tools"),
    ("tools", [{"type": "namespace", "name": n, "tools": [FUNCTION] * 100} for n in "ab"], "invalid_type", "tools"),
    ("tools", [{"type": "namespace", "name": "n", "tools": [{"type": "mcp"}]}], "unsupported_parameter", "tools[0].tools[0].type"),
    ("tools", [{"type": "namespace", "name": "n", "tools": [FUNCTION, FUNCTION]}], "invalid_request", "tools"),
    ("tools", [{"type": "namespace", "name": "n", "description": 1, "tools": []}], "invalid_type", "tools[0].description"),
    *(
        ("tool_choice", {"type": kind}, "unsupported_parameter", "tool_choice.type")
        for kind in ("web_search_preview", "file_search", "mcp", "shell", "apply_patch", "programmatic_tool_calling")
    ),
    (
        "tool_choice",
        {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp", "server_label": "x"}]},
        "unsupported_parameter",
        "tool_choice.tools",
    ),
    ("tool_choice", "required", "invalid_request", "tool_choice"),
    ("tool_choice", {"type": "function"}, "invalid_type", "tool_choice"),
    ("tool_choice", {"type": "custom"}, "invalid_type", "tool_choice"),
    ("tool_choice", {"type": "allowed_tools"}, "invalid_type", "tool_choice"),
    ("tool_choice", "sometimes", "out_of_range", "tool_choice"),
    ("tools", {}, "invalid_type", "tools"),
    ("tools", [{"type": "web_search", "external_web_access": False, "filters": nested(500)}], "invalid_schema", "tools"),
    ("tools", [{"type": "web_search", "external_web_access": False, "filters": [[]] * 60_000}] * 2, "invalid_schema", "tools"),
    ("tools", [FUNCTION] * 129, "invalid_type", "tools"),
    ("tools", ["f"], "invalid_type", "tools[0]"),
    ("tools", [{"name": "f"}], "invalid_type", "tools[0]"),
    ("tools", [{"type": "function"}], "invalid_type", "tools"),
    ("tools", [{"type": "custom"}], "invalid_type", "tools"),
    ("tools", [{"type": "custom", "name": 5}], "invalid_type", "tools[0].name"),
    ("tools", [CUSTOM | {"description": 5}], "invalid_type", "tools[0].description"),
    ("tools", [CUSTOM | {"format": {"type": "xml"}}], "out_of_range", "tools[0].format.type"),
    ("tools", [CUSTOM | {"format": "text"}], "out_of_range", "tools[0].format.type"),
    ("tools", [CUSTOM | {"format": {"type": "grammar", "syntax": "ebnf", "definition": "x"}}], "out_of_range", "tools[0].format.syntax"),
    ("tools", [CUSTOM | {"format": {"type": "grammar", "syntax": "lark"}}], "invalid_type", "tools[0].format.definition"),
    ("tools", [CUSTOM, CUSTOM], "invalid_request", "tools"),
    ("tools", [CUSTOM, FUNCTION | {"name": "apply_patch"}], "invalid_request", "tools"),
    ("tools", [FUNCTION | {"parameters": []}], "invalid_schema", "tools"),
    ("instructions", ["x"], "invalid_type", "instructions"),
    ("previous_response_id", 5, "invalid_type", "previous_response_id"),
    ("previous_response_id", "", "invalid_type", "previous_response_id"),
    ("conversation", {}, "invalid_type", "conversation.id"),
    ("conversation", 5, "invalid_type", "conversation"),
    ("truncation", "some", "out_of_range", "truncation"),
    ("reasoning", "high", "invalid_type", "reasoning"),
    ("reasoning", {"effort": "huge"}, "out_of_range", "reasoning.effort"),
    ("reasoning", {"summary": "long"}, "out_of_range", "reasoning.summary"),
    ("text", "json", "invalid_type", "text"),
    ("text", {"verbosity": "loud"}, "out_of_range", "text.verbosity"),
    ("text", {"format": "json"}, "out_of_range", "text.format.type"),
    ("text", {"format": {"type": "xml"}}, "out_of_range", "text.format.type"),
    ("text", {"format": {"type": "json_schema", "name": "n"}}, "invalid_schema", "text.format"),
    ("text", {"format": {"type": "json_schema", "name": "n", "schema": []}}, "invalid_schema", "text.format"),
    ("max_output_tokens", 0, "out_of_range", "max_output_tokens"),
    ("max_output_tokens", "5", "invalid_type", "max_output_tokens"),
    ("include", ["everything"], "unsupported_parameter", "include"),
    ("include", "x", "invalid_type", "include"),
    ("include", [["x"]], "invalid_type", "include"),
    ("top_logprobs", 21, "out_of_range", "top_logprobs"),
    ("temperature", 3, "out_of_range", "temperature"),
    ("store", "yes", "invalid_type", "store"),
    ("stream", 1, "invalid_type", "stream"),
    ("service_tier", "ultrafast", "out_of_range", "service_tier"),
    ("metadata", {str(number): "x" for number in range(17)}, "out_of_range", "metadata"),
    ("metadata", {"k" * 65: "x"}, "out_of_range", "metadata"),
    ("metadata", {"k": "x" * 513}, "out_of_range", "metadata"),
    ("metadata", {"k": 5}, "invalid_type", "metadata"),
    ("metadata", [], "invalid_type", "metadata"),
    ("input", None, "missing_parameter", "input"),
    ("input", [], "empty_prompt", "input"),
    ("input", [{"type": "reasoning", "summary": []}], "empty_prompt", "input"),
    ("input", [{"type": "reasoning", "summary": [{"text": "a"}], "content": []}] * 2, "empty_prompt", "input"),
    ("model", "", "missing_parameter", "model"),
]


@pytest.mark.parametrize(("name", "value", "code", "param"), REFUSED, ids=lambda value: json.dumps(value)[:50])
def test_what_is_refused_names_its_field(name: str, value: Any, code: str, param: str) -> None:
    assert refusal(read_response, BODY | {name: value}) == (code, param)


def test_min_tokens_above_the_limit() -> None:
    assert refusal(read_response, BODY | {"min_tokens": 6, "max_output_tokens": 5}) == ("out_of_range", "min_tokens")


def test_one_kind_of_context() -> None:
    both = {"previous_response_id": "resp_1", "conversation": "conv_1"}
    assert refusal(read_response, BODY | both) == ("invalid_request", "conversation")
    assert refusal(read_response, BODY | {"conversation": "conv_1", "store": False}) == ("invalid_request", "store")
    assert read(conversation={"id": "conv_1"}, store=True).conversation_id == "conv_1"
    for context in ({"previous_response_id": "resp_1"}, {"conversation": "conv_1"}):
        assert read_response({"model": "m"} | context).items == []
        assert read_response({"model": "m", "input": []} | context).items == []


def test_tools_in_a_namespace() -> None:
    space = {"type": "namespace", "name": "agents", "description": "Others.", "tools": [FUNCTION, CUSTOM]}
    idle = {"type": "web_search", "external_web_access": False}
    request = read(tools=[space, FUNCTION, idle])
    name = FUNCTION["name"]
    sent_tools = json.loads(request.body("engine", "salt"))["tools"]
    assert [tool["function"]["name"] for tool in sent_tools] == [f"agents.{name}", "agents.apply_patch", name]
    assert request.custom == {"agents.apply_patch"}
    assert request.namespaces == {f"agents.{name}": ("agents", name), "agents.apply_patch": ("agents", "apply_patch")}
    shown, alone, unused = request.repeated["tools"]
    assert (shown["name"], shown["description"]) == ("agents", "Others.")
    assert [tool["name"] for tool in shown["tools"]] == [name, "apply_patch"]
    assert shown["tools"][0] == alone
    assert unused == idle
    again = read(tools=request.repeated["tools"])
    assert again.repeated["tools"] == request.repeated["tools"]


def test_calls_in_a_namespace() -> None:
    call = {"type": "function_call", "call_id": "c", "name": "close", "arguments": "{}", "namespace": "agents"}
    request = read(input=[{"role": "user", "content": "x"}, call, {"type": "function_call_output", "call_id": "c", "output": ""}])
    sent_call = request.parameters["messages"][1]["tool_calls"][0]
    assert sent_call["function"]["name"] == "agents.close"
    assert request.items[1]["namespace"] == "agents"


def test_codex() -> None:
    request = read_response(CODEX)
    assert request.stream
    assert not request.store
    assert request.custom == {"apply_patch"}
    body = json.loads(request.body("engine", "salt"))
    assert [message["role"] for message in body["messages"]] == ["system", "developer", "user"]
    assert body["parallel_tool_calls"] is False
    assert body["tools"][1]["function"]["description"] == "Edits\n\nThe input must match this grammar (lark):\nstart: x"


def test_engine_errors_name_the_clients_fields() -> None:
    request = read(max_output_tokens=5000)
    assert request.prompt_field == "input"
    with pytest.raises(InvalidRequest) as caught:
        request.check(model(2048))
    assert (caught.value.error_code, caught.value.param) == ("out_of_range", "max_output_tokens")
    assert "'max_output_tokens' is 5000" in caught.value.message
    assert read(text={"format": {"type": "json_object"}}).grammar_field == "text.format"


def test_the_response_repeats_the_request() -> None:
    asked: dict[str, Any] = {
        "instructions": "Be brief.",
        "max_output_tokens": 50,
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "prompt_cache_key": "k",
        "reasoning": {"effort": "low", "summary": "auto"},
        "safety_identifier": "s",
        "store": False,
        "temperature": 0.5,
        "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}, "verbosity": "low"},
        "tool_choice": {"type": "custom", "name": "apply_patch"},
        "tools": [FUNCTION | {"strict": True}, CUSTOM],
        "top_p": 0,
        "truncation": "auto",
        "user": "u",
        "service_tier": "flex",
        "max_tool_calls": 2,
    }
    found = streamed(stream(*words("a")), **asked).response
    shown = {name: found[name] for name in asked}
    assert shown == asked | {
        "text": {
            "format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": False, "description": None},
            "verbosity": "low",
        },
        "tools": [FUNCTION | {"strict": True, "description": None}, CUSTOM | {"description": None, "format": {"type": "text"}}],
    }
    assert Response.model_validate(found).tools[1].type == "custom"


def test_defaults_of_the_response() -> None:
    found = streamed(stream(*words("a"))).response
    usual = {
        "object": "response",
        "background": False,
        "conversation": None,
        "error": None,
        "frequency_penalty": 0.0,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": None,
        "max_tool_calls": None,
        "metadata": {},
        "model": "m",
        "parallel_tool_calls": True,
        "presence_penalty": 0.0,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": None,
        "service_tier": "default",
        "store": True,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 1.0,
        "truncation": "disabled",
        "user": None,
    }
    assert {name: found[name] for name in usual} == usual
    Response.model_validate(found)


def test_large_numbers_in_a_schema() -> None:
    large = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 2**80}}}
    response = streamed(stream(*words("a")), tools=[FUNCTION | {"parameters": large}]).response
    assert response["tools"][0]["parameters"] == large


def test_references_are_put_in_their_places() -> None:
    request = read(input=[{"type": "item_reference", "id": "msg_1"}, {"role": "user", "content": "Go on."}])
    assert request.references == {"msg_1": "input[0].id"}
    request.expand([{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "A"}]}], {"msg_1": SAID})
    assert [message["content"] for message in request.parameters["messages"]] == ["A", "B", "Go on."]
    assert [item["type"] for item in request.items] == ["message", "message"]
    assert request.references == {}


SAID = {"id": "msg_1", "type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "B"}]}


def test_a_reference_to_nothing() -> None:
    request = read(input=[{"role": "user", "content": "x"}, {"id": "msg_2"}])
    with pytest.raises(NotFound) as caught:
        request.expand([], {"msg_1": SAID})
    assert caught.value.param == "input[1].id"


def test_an_empty_conversation_without_input() -> None:
    request = read_response({"model": "m", "conversation": "conv_1"})
    with pytest.raises(InvalidRequest) as caught:
        request.expand([], {})
    assert (caught.value.error_code, caught.value.param) == ("empty_prompt", "input")


def truncated(max_model_len: int, *, limit: int | None = None) -> list[str]:
    """Return the remaining messages of a long conversation, each by its first letters."""
    long = " word" * 60
    items = [
        {"role": "user", "content": "u1" + long},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "t1" + long},
        {"role": "developer", "content": "d1"},
        {"role": "assistant", "content": "a1" + long},
        {"role": "user", "content": "u2" + long},
    ]
    request = read(input=items, instructions="s1", truncation="auto", max_output_tokens=limit)
    request.check(model(max_model_len))
    return [(message["content"] or "call")[:2] for message in request.parameters["messages"]]


def test_the_oldest_messages_are_left_out() -> None:
    assert truncated(2000) == ["s1", "u1", "ca", "t1", "d1", "a1", "u2"]
    assert truncated(400) == ["s1", "d1", "ca", "t1", "a1", "u2"]
    # A result never remains without its call.
    assert truncated(350) == ["s1", "d1", "a1", "u2"]
    assert truncated(2000, limit=1650) == ["s1", "u1", "ca", "t1", "d1", "a1", "u2"]
    assert truncated(500, limit=200) == ["s1", "d1", "a1", "u2"]
    assert truncated(50) == ["s1", "d1", "u2"]
