"""The output of fake engines for requests with schemas."""

from typing import Any

import pytest

from lmaas.testing.generation import formatted


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, '{"a": 1}'),
        ({"type": ["string", "null"]}, '"x"'),
        ({"type": "object", "properties": {"a": {"type": ["null", "string"]}}, "required": ["a"]}, '{"a": null}'),
        ({}, "{}"),
        # Schemas that a real engine refuses, or that have no small value.
        ({"type": "object", "required": True}, "{}"),
        ({"anyOf": []}, "{}"),
        ({"enum": []}, "{}"),
        ({"$ref": "#/$defs/none"}, "{}"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "{}"),
        ({"type": "object", "properties": {"a": True}, "required": ["a"]}, "{}"),
    ],
    ids=str,
)
def test_a_format_never_breaks_an_engine(schema: dict[str, Any], text: str) -> None:
    assert formatted({"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}) == text
