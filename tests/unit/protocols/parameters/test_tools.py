"""Tools, the choice among them, and the form of the response."""

import json
from typing import Any

import pytest

from lmaas.protocols.parameters.enforceable import enforceable
from lmaas.protocols.parameters.request import read_chat, read_completion
from tests.unit.protocols.parameters.build import BOTH, CHAT, FUNCTION, Read, chat, nested, refusal, schema, sent, values

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
NAMED = {"type": "function", "function": {"name": "f"}}


def tool(name: str = "f", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    return {
        "type": "allowed_tools",
        "allowed_tools": {"mode": mode, "tools": [{"type": "function", "function": {"name": n}} for n in names]},
    }


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"tools": {}}, "invalid_type", "tools"),
        ({"tools": [tool(parameters={"enum": [[]] * 100_000})], "tool_choice": "none"}, "invalid_schema", "tools"),
        ({"functions": [{"name": "f", "parameters": {"x": [{"a": 1}] * 50_000}}]}, "invalid_schema", "functions"),
        ({"tools": [FUNCTION] * 129}, "invalid_type", "tools"),
        ({"tools": [{"type": "code_interpreter"}]}, "unsupported_parameter", "tools[0].type"),
        ({"tools": [FUNCTION, {"type": "custom", "custom": {"name": "x"}}]}, "unsupported_parameter", "tools[1].type"),
        *(
            ({"tools": [bad]}, "invalid_type", "tools")
            for bad in (
                5,
                {},
                {"type": "function"},
                {"type": "function", "name": "f"},
                tool(""),
                tool('a"b'),
                tool("a\nb"),
                tool("x" * 257),
            )
        ),
        ({"tools": [tool(description=5)]}, "invalid_type", "tools"),
        ({"tools": [tool(strict="yes")]}, "invalid_type", "tools"),
        ({"tools": [tool(parameters=[])]}, "invalid_schema", "tools"),
        ({"tools": [tool(parameters=nested(80))]}, "invalid_schema", "tools"),
        ({"tools": [tool(parameters=nested(5000))]}, "invalid_schema", "tools"),
        ({"tools": [tool(parameters={"const": 1e400})]}, "invalid_schema", "tools"),
        ({"tools": [tool(description="a\0b")]}, "invalid_schema", "tools"),
        ({"tools": [tool(parameters={"type": "string"})], "tool_choice": "required"}, "invalid_schema", "tools"),
        ({"tool_choice": "maybe"}, "out_of_range", "tool_choice"),
        ({"tool_choice": 5}, "invalid_type", "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "invalid_type", "tool_choice"),
        ({"tool_choice": {"type": ["function"]}}, "invalid_type", "tool_choice"),
        pytest.param({"tool_choice": {"type": "function", "function": "f"}}, "invalid_type", "tool_choice"),
        ({"tool_choice": {"type": "custom", "custom": {"name": "f"}}}, "unsupported_parameter", "tool_choice.type"),
        ({"tool_choice": "required"}, "invalid_request", "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "invalid_request", "tool_choice"),
        ({"tool_choice": NAMED}, "invalid_request", "tool_choice"),
        ({"tool_choice": NAMED, "tools": [tool("g")]}, "out_of_range", "tool_choice"),
        ({"tool_choice": allowed("auto", "g"), "tools": [FUNCTION]}, "out_of_range", "tool_choice"),
        ({"tool_choice": allowed("auto"), "tools": [FUNCTION]}, "invalid_type", "tool_choice"),
        ({"tool_choice": allowed("none", "f"), "tools": [FUNCTION]}, "invalid_type", "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": []}, "tools": [FUNCTION]}, "invalid_type", "tool_choice"),
        ({"functions": [{}]}, "invalid_type", "functions"),
        ({"functions": [{"name": "f", "parameters": []}]}, "invalid_schema", "functions"),
        ({"functions": [{"name": "f"}], "tools": [FUNCTION]}, "invalid_request", "functions"),
        ({"function_call": {"name": "f"}}, "invalid_request", "function_call"),
        ({"function_call": {"name": "g"}, "functions": [{"name": "f"}]}, "out_of_range", "function_call"),
        ({"function_call": "required", "functions": [{"name": "f"}]}, "invalid_type", "function_call"),
        ({"function_call": "auto", "tool_choice": "auto"}, "invalid_request", "function_call"),
    ],
)
def test_bad_tools(changes: dict[str, Any], code: str, param: str) -> None:
    assert refusal(read_chat, CHAT | changes) == (code, param)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tools": []}, {}),
        ({"tools": [], "tool_choice": "auto"}, {}),
        ({"tool_choice": "none"}, {}),
        ({"tools": [FUNCTION]}, {"tools": [FUNCTION]}),
        (
            {"tools": [FUNCTION], "tool_choice": "auto", "parallel_tool_calls": False},
            {"tools": [FUNCTION], "tool_choice": "auto", "parallel_tool_calls": False},
        ),
        # Null or unknown fields inside a tool have no effect.
        (
            {"tools": [{"type": None, "cache_control": {}, "function": {"name": "f", "description": None, "strict": None, "x": 1}}]},
            {"tools": [tool()]},
        ),
        ({"tools": [FUNCTION], "tool_choice": {"type": "auto"}}, {"tools": [FUNCTION], "tool_choice": "auto"}),
        # Required calls follow the schema; with `auto` nothing is changed.
        (
            {"tools": [tool(parameters={"type": "string"})], "tool_choice": "auto"},
            {"tools": [tool(parameters={"type": "string"})], "tool_choice": "auto"},
        ),
        (
            {"tools": [tool(parameters=CITY)], "tool_choice": "required"},
            {"tools": [tool(parameters=CITY, strict=True)], "tool_choice": "required"},
        ),
        (
            {"tools": [tool(parameters=CITY, strict=False), tool("g")], "tool_choice": NAMED},
            {"tools": [tool(parameters=CITY, strict=True), tool("g")], "tool_choice": NAMED},
        ),
        (
            {"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "f"}},
            {"tools": [tool(parameters={"type": "object"}, strict=True)], "tool_choice": NAMED},
        ),
        (
            {
                "tools": [tool("f"), tool("g", parameters={"properties": {}}), tool("h", parameters={"type": ["object", "null"]})],
                "tool_choice": "required",
            },
            {
                "tools": [
                    tool("f", parameters={"type": "object", "properties": {}}, strict=True),
                    tool("g", parameters={"properties": {}, "type": "object"}, strict=True),
                    tool("h", parameters={"type": "object"}, strict=True),
                ],
                "tool_choice": "required",
            },
        ),
        (
            {"tools": [tool(parameters={"anyOf": [CITY, {"type": "object"}]})], "tool_choice": "required"},
            {"tools": [tool(parameters={"anyOf": [CITY, {"type": "object"}]}, strict=True)], "tool_choice": "required"},
        ),
        (
            {"tools": [tool("f"), tool("g"), tool("h")], "tool_choice": allowed("auto", "h", "f")},
            {"tools": [tool("f"), tool("h")], "tool_choice": "auto"},
        ),
        (
            {
                "tools": [tool("f"), tool("g")],
                "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "g"}]},
            },
            {"tools": [tool("g", parameters={"type": "object", "properties": {}}, strict=True)], "tool_choice": "required"},
        ),
        ({"functions": [{"name": "f", "parameters": CITY}]}, {"tools": [tool(parameters=CITY)]}),
        ({"functions": [{"name": "f"}], "function_call": "none"}, {"tools": [tool()], "tool_choice": "none"}),
        (
            {"functions": [{"name": "f", "parameters": CITY}, {"name": "g"}], "function_call": {"name": "f"}},
            {"tools": [tool(parameters=CITY, strict=True), tool("g")], "tool_choice": NAMED},
        ),
    ],
)
def test_tools_for_the_engine(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    assert chat(**changes) == expected
    assert read_chat(CHAT | changes).legacy_functions == ("functions" in changes)


HARD = {
    "type": "object",
    "properties": {
        "pattern": {"type": "string", "pattern": r"\p{L}+", "default": {"pattern": r"\b"}},
        "word": {"type": "string", "pattern": r"\\bfoo"},
        "many": {"anyOf": [{"type": "integer", "minimum": 0.5, "maximum": 2**63}, {"type": "number", "minimum": 0.5}]},
        "maximum": {"type": ["integer", "null"], "maximum": 2**53 - 1, "exclusiveMinimum": -(2**70)},
    },
}
EASY = {
    "type": "object",
    "properties": {
        "pattern": {"type": "string", "default": {"pattern": r"\b"}},
        "word": {"type": "string", "pattern": r"\\bfoo"},
        "many": {"anyOf": [{"type": "integer"}, {"type": "number", "minimum": 0.5}]},
        "maximum": {"type": ["integer", "null"], "maximum": 2**53 - 1},
    },
}


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        *(
            (pattern, True)
            for pattern in (r"^\d{4}-\d\d$", r"(?:a|b)+", r"^(?!\.)(?=a).+$", "(?<n>a)", "(?P<n>a)", "(?i)a", r"\\p", r"\(?#")
        ),
        *((pattern, False) for pattern in (r"\P{L}", r"a\b", r"(a)\1", r"(?<n>a)\k<n>", "(?#x)a", "(?>a)", "(?i:a)", "(?<=a)b", "(?<!a)b")),
        *((pattern, False) for pattern in (r"\\\p{L}",)),
    ],
)
def test_patterns_that_the_grammar_library_cannot_enforce(pattern: str, kept: bool) -> None:
    schema = enforceable({"type": "string", "pattern": pattern})
    assert schema == {"type": "string"} | ({"pattern": pattern} if kept else {})


def test_what_the_grammar_library_cannot_enforce_is_left_out_unless_a_tool_is_strict() -> None:
    assert chat(tools=[tool(parameters=HARD)], tool_choice="required")["tools"] == [tool(parameters=EASY, strict=True)]
    # A strict tool is refused by the check of its grammar, and without a required call nothing is changed.
    for changes in ({"tools": [tool(parameters=HARD, strict=True)], "tool_choice": "required"}, {"tools": [tool(parameters=HARD)]}):
        assert chat(**changes)["tools"] == changes["tools"]


@pytest.mark.parametrize(
    ("changes", "constrained"),
    [
        ({}, False),
        ({"tools": [FUNCTION]}, False),
        ({"tools": [FUNCTION], "tool_choice": "none"}, False),
        ({"tools": [FUNCTION], "parallel_tool_calls": True}, False),
        ({"tools": [FUNCTION], "parallel_tool_calls": False}, True),
        ({"tools": [FUNCTION], "tool_choice": "required"}, True),
        ({"tools": [FUNCTION], "tool_choice": NAMED}, True),
        ({"tools": [FUNCTION, tool("g", strict=True)]}, True),
        ({"tools": [tool(strict=True)], "tool_choice": "none"}, False),
        ({"response_format": {"type": "text"}}, False),
        ({"response_format": {"type": "json_object"}}, True),
        ({"structured_outputs": {"regex": "a"}}, True),
        ({"structured_outputs": {"json_object": False}}, False),
        ({"guided_choice": ["a"]}, True),
    ],
)
def test_whether_an_engine_compiles_a_grammar(changes: dict[str, Any], constrained: bool) -> None:
    request = read_chat(CHAT | changes)
    assert request.constrained is constrained
    # Even where this engine compiles no grammar, another tool parser may.
    assert request.must_be_checked is (constrained or (bool(changes.get("tools")) and changes.get("tool_choice") != "none"))
    # Every parameter that affects the grammar, and no other.
    names = ("response_format", "tools", "tool_choice", "parallel_tool_calls", "structured_outputs")
    assert request.grammar == {name: request.parameters[name] for name in names if name in request.parameters}


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        *(("response_format", value, "invalid_type") for value in values("json", {}, {"type": "grammar"}, [], {"type": {}}, 5)),
        ("response_format", {"type": "json_schema"}, "invalid_schema"),
        ("response_format", {"type": "json_schema", "json_schema": {"name": 5, "schema": {}}}, "invalid_schema"),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "s", "schema": {}, "description": 5}}, "invalid_schema"),
        *(("response_format", schema(value), "invalid_schema") for value in values(None, "x", [], True)),
        ("response_format", schema(nested(80)), "invalid_schema"),
        pytest.param("response_format", schema(nested(5000)), "invalid_schema"),
        ("response_format", schema({"maximum": 1e400}), "invalid_schema"),
        ("response_format", schema({"const": "a\0"}), "invalid_schema"),
        ("response_format", {"type": "structural_tag", "format": {"json_schema": nested(80)}}, "invalid_schema"),
        *(("structured_outputs", value, "invalid_type") for value in values("x", [], 5, {"regex": 5}, {"choice": "a"}, {"choice": []})),
        *(("structured_outputs", value, "invalid_type") for value in values({"choice": [1]}, {"choice": ["a"] * 1001}, {"grammar": ""})),
        *(("structured_outputs", value, "invalid_schema") for value in values({"json": "{"}, {"json": "[]"}, {"json": True}, {"json": 5})),
        *(("structured_outputs", value, "invalid_schema") for value in values({"structural_tag": "x"}, {"structural_tag": "[]"})),
        ("structured_outputs", {"json": {"type": "object"}, "regex": "a"}, "invalid_request"),
        ("guided_json", "{", "invalid_schema"),
        ("guided_regex", 5, "invalid_type"),
        ("guided_choice", [], "invalid_type"),
        ("guided_grammar", " ", "invalid_type"),
    ],
)
@BOTH
def test_bad_formats(read: Read, body: dict[str, Any], name: str, value: Any, code: str) -> None:
    assert refusal(read, body | {name: value}) == (code, name)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "guided_regex": "a"}, "guided_regex"),
        ({"structured_outputs": {"regex": "a"}, "tools": [FUNCTION], "tool_choice": NAMED}, "structured_outputs"),
    ],
)
def test_formats_that_exclude_each_other(changes: dict[str, Any], param: str) -> None:
    assert refusal(read_chat, CHAT | changes) == ("invalid_request", param)


def test_what_is_not_offered_of_structured_outputs() -> None:
    refused = refusal(read_chat, CHAT | {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}})
    assert refused == ("unsupported_parameter", "structured_outputs.whitespace_pattern")
    # A name that is not vLLM's has no effect, and one that only vLLM itself may set is not forwarded.
    assert chat(structured_outputs={"regex": "a", "x": 1, "_backend": "guidance"}) == {"structured_outputs": {"regex": "a"}}


TAG = {
    "type": "structural_tag",
    "format": {"type": "tag", "begin": "<a>", "content": {"type": "json_schema", "json_schema": CITY}, "end": "</a>"},
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # Nulls and unknown fields have no effect; the name that vLLM needs is added.
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": CITY, "strict": None, "x": 1}, "x": None}},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": CITY}}},
        ),
        (
            {"response_format": {"type": "json_object", "schema": CITY}},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": CITY}}},
        ),
        ({"response_format": {"type": "json_object", "schema": None}}, {"response_format": {"type": "json_object"}}),
        ({"response_format": TAG}, {"response_format": TAG}),
        ({"structured_outputs": {"json": CITY, "regex": None}}, {"structured_outputs": {"json": CITY}}),
        ({"structured_outputs": {"json": json.dumps(CITY)}}, {"structured_outputs": {"json": CITY}}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"structured_outputs": {"choice": ["a", "b"]}}),
        ({"structured_outputs": {"regex": "[ab]+", "json_object": False}}, {"structured_outputs": {"regex": "[ab]+"}}),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, {"structured_outputs": {"grammar": 'root ::= "a"'}}),
        (
            {"structured_outputs": {"json_object": True, "disable_any_whitespace": True}},
            {"structured_outputs": {"json_object": True, "disable_any_whitespace": True}},
        ),
        ({"structured_outputs": {"structural_tag": TAG}}, {"structured_outputs": {"structural_tag": json.dumps(TAG)}}),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "text"}},
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "text"}},
        ),
        ({"guided_json": CITY}, {"structured_outputs": {"json": CITY}}),
        ({"guided_regex": "a+"}, {"structured_outputs": {"regex": "a+"}}),
        ({"guided_choice": ["a"]}, {"structured_outputs": {"choice": ["a"]}}),
        ({"guided_grammar": 'root ::= "a"', "guided_decoding_backend": "xgrammar"}, {"structured_outputs": {"grammar": 'root ::= "a"'}}),
    ],
)
@BOTH
def test_formats_for_the_engine(read: Read, body: dict[str, Any], changes: dict[str, Any], expected: dict[str, Any]) -> None:
    assert sent(read(body | changes)) == sent(read(body)) | expected


def test_a_completion_may_have_a_format() -> None:
    assert read_completion({"model": "m", "prompt": "x", "structured_outputs": {"regex": "a"}}).constrained
