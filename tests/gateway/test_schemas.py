"""Schemas that an engine may compile, and those that would stop it."""

from typing import Any

import pytest

from lmaas.errors import InvalidRequest, OverLimit
from lmaas.gateway.schemas import MAX_COST, MAX_NEW, NewSchemas, check_schema, pattern_cost

TREE: dict[str, Any] = {
    "$defs": {"node": {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#/$defs/node"}}}}},
    "$ref": "#/$defs/node",
}


@pytest.mark.parametrize(
    ("pattern", "cost"),
    [
        ("", 0),
        ("abc", 3),
        (r"^\d{4}-\d{2}-\d{2}$", 12),
        (r"a{3}{4}", 12),
        (r"(ab{2}){5}", 15),
        (r"[a-z\]]{3}", 3),
        (r"[^\]{9}]{2}", 2),
        (r"\{1,30000\}", 9),
        (r"x{2,}", 2),
        (r"x{,7}", 5),
        (r"(", 0),
        (r"a)", 2),
        (r"(a{1,30000}b{1,30000}){1,30000}", MAX_COST + 1),
        (r"((((a{99}){99}){99}){99}){99}", MAX_COST + 1),
        ("a{" + "9" * 5000 + "}", MAX_COST + 1),
        ("a" * 1001, MAX_COST + 1),
    ],
)
def test_the_cost_of_a_pattern(pattern: str, cost: int) -> None:
    assert pattern_cost(pattern) == cost


@pytest.mark.parametrize(
    "schema",
    [
        {},
        TREE,
        {"type": "string", "pattern": r"^[a-z0-9._%+-]{1,64}@[a-z0-9.-]{1,255}\.[a-z]{2,}$"},
        {"type": "array", "maxItems": 100, "items": {"type": "string", "maxLength": 200}},
        {"type": "object", "properties": {"pattern": {"type": "string"}, "minItems": {"type": "integer"}}},
        {"anyOf": [{"type": "string"}, {"type": "object", "properties": {"again": {"$ref": "#"}}}]},
    ],
)
def test_what_people_use_passes(schema: dict[str, Any]) -> None:
    check_schema("response_format", schema)


@pytest.mark.parametrize(
    "schema",
    [
        None,
        [],
        {"type": "string", "pattern": r"^(a{1,30000}b{1,30000}){1,30000}$"},
        {"type": "object", "patternProperties": {r"(a{999}){999}": {}}},
        {"type": "string", "minLength": 10**9},
        {"type": "array", "maxItems": 1000, "items": {"type": "array", "minItems": 1000, "items": {"type": "string"}}},
        {"$ref": "#"},
        {"$ref": "http://127.0.0.1:1/x"},
        {"$ref": "#/$defs/none"},
        {"$ref": 7},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"anyOf": [{"type": "string"}, {"$ref": "#"}]},
        {"properties": {"x": {"allOf": [{"$ref": "#/properties/x"}]}}},
        {"enum": ["x" * 70_000]},
    ],
)
def test_what_would_stop_an_engine_is_refused(schema: Any) -> None:
    with pytest.raises(InvalidRequest) as raised:
        check_schema("response_format", schema)
    assert (raised.value.error_code, raised.value.param) == ("invalid_schema", "response_format")


def test_no_depth_breaks_it() -> None:
    schema: dict[str, Any] = {}
    for _ in range(100_000):
        schema = {"not": schema}
    with pytest.raises(InvalidRequest):
        check_schema("tools", schema)


def test_a_flood_of_new_schemas_is_refused_and_known_ones_are_not() -> None:
    now = [0.0]
    seen = NewSchemas(lambda: now[0])
    for number in range(MAX_NEW):
        now[0] = number / 10
        seen.admit("a", [{"title": str(number)}, None])
    for _ in range(100):
        seen.admit("a", [{"title": "7"}, None])
    with pytest.raises(OverLimit) as caught:
        seen.admit("a", [{"title": "new"}, None])
    assert caught.value.error_code == "too_many_new_schemas"
    assert caught.value.retry_after_s == 60 - now[0]
    seen.admit("b", [{"title": "new"}, None])
    now[0] = 60.0
    seen.admit("a", [{"title": "new"}, None])
    with pytest.raises(OverLimit):
        seen.admit("a", [{"title": "newer"}, None])
