"""The form of schemas: refusals before an engine or a chat template reads them."""

from typing import Any

import pytest

from lmaas.errors import InvalidRequest
from lmaas.inference.schemas import check_schema
from lmaas.protocols.messages.request import read_messages
from lmaas.protocols.parameters.request import read_chat, read_completion
from lmaas.protocols.responses.request import read_response

MALFORMED: list[Any] = [
    True,
    [],
    "object",
    {"type": []},
    {"type": {}},
    {"type": 5},
    {"type": ["string", None]},
    {"properties": True},
    {"properties": []},
    {"properties": {"a": []}},
    {"properties": {"a": "string"}},
    {"properties": {"a": None}},
    {"properties": {"a": {"type": [[]]}}},
    {"properties": {"type": {"properties": 1}}},
    {"$defs": {"a": 5}},
    {"definitions": []},
    {"patternProperties": {"^a": "string"}},
    {"anyOf": {}},
    {"anyOf": [5]},
    {"allOf": "x"},
    {"oneOf": [{"type": "string"}, []]},
    {"prefixItems": {}},
    {"items": "string"},
    {"items": [{"type": []}]},
    {"additionalProperties": "no"},
    {"additionalProperties": {"type": []}},
    {"not": []},
    {"if": {}, "then": 5},
]
WELL_FORMED: list[dict[str, Any]] = [
    {},
    {"type": "object", "properties": {"a": {"type": ["string", "null"]}, "b": True}, "required": ["a"], "additionalProperties": False},
    {"type": "object", "properties": {"type": {"type": "string"}, "items": {"items": {}}, "properties": {"type": "object"}}},
    {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/a"}], "$defs": {"a": {"const": []}}},
    {"enum": [[], {"type": []}], "default": {"properties": True}, "examples": [{"type": 5}], "const": {"items": 5}},
    {"items": [{"type": "string"}, False], "additionalProperties": None, "description": "x", "title": None, "x-own": {"type": []}},
]


@pytest.mark.parametrize("schema", MALFORMED, ids=str)
def test_a_schema_without_its_form(schema: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_schema("tools", schema)
    assert (caught.value.status, caught.value.error_code, caught.value.param) == (400, "invalid_schema", "tools")
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("schema", WELL_FORMED, ids=str)
def test_a_schema_with_its_form(schema: dict[str, Any]) -> None:
    check_schema("tools", schema)


CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
MESSAGE = CHAT | {"max_tokens": 5}


@pytest.mark.parametrize("schema", [{"type": []}, {"properties": True}, {"properties": {"a": []}}], ids=str)
def test_every_protocol_refuses_it(schema: dict[str, Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    flat = {"type": "json_schema", "name": "a", "schema": schema}
    function = {"name": "f", "parameters": schema}
    for read, body in (
        (read_chat, CHAT | {"tools": [{"type": "function", "function": function}]}),
        (read_chat, CHAT | {"functions": [function]}),
        (read_chat, CHAT | {"response_format": form}),
        (read_completion, {"model": "m", "prompt": "x", "structured_outputs": {"json": schema}}),
        (read_completion, {"model": "m", "prompt": "x", "guided_json": schema}),
        (read_response, {"model": "m", "input": "x", "tools": [{"type": "function"} | function]}),
        (read_response, {"model": "m", "input": "x", "text": {"format": flat}}),
        (read_messages, MESSAGE | {"tools": [{"name": "f", "input_schema": schema}]}),
        (read_messages, MESSAGE | {"output_config": {"format": {"type": "json_schema", "schema": schema}}}),
    ):
        with pytest.raises(InvalidRequest) as caught:
            read(body)
        assert caught.value.error_code == "invalid_schema", body
