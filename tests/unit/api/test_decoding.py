"""Bodies and queries are decoded by their types; an error names the field, the rule and the value."""

from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import UNSET, Meta, UnsetType, field

from lmaas.api.decoding import decode
from lmaas.api.shapes.common import Name, Query, Shape
from lmaas.api.shapes.tenants import NewTenant
from lmaas.api.shapes.usage import CogsQuery
from lmaas.errors import InvalidRequest
from lmaas.states import Desired


class Item(Shape, frozen=True, kw_only=True):
    """An object inside a list."""

    weight: Annotated[float, Meta(ge=0.5, le=2)]


class Body(Shape, frozen=True, kw_only=True):
    """A body with a field of each kind."""

    name: Name
    count: Annotated[int, Meta(ge=1, le=1000)] | UnsetType | None = UNSET
    note: Annotated[str, Meta(max_length=3)] = ""
    kind: Literal["a", "b"] = "a"
    desired: Desired = Desired.RUNNING
    flag: bool = False
    items: list[Item] = field(default_factory=list)
    first: Item | None = None
    any: list[Any] | None = None
    fields: dict[str, Any] | None = None


class Asked(Query, frozen=True, kw_only=True):
    """A query with a field of each kind."""

    limit: Annotated[int, Meta(ge=1, le=10)] = 5
    flag: bool = False


FAULTS: list[tuple[dict[str, Any], str, str, str]] = [
    ({}, "missing_parameter", "name", "'name' is required."),
    ({"name": "x", "nmae": 1}, "unsupported_parameter", "nmae", "The field 'nmae' is not known. Known are: name, count,"),
    ({"name": 5}, "invalid_type", "name", "'name' must be 1 to 63 lower-case letters"),
    ({"name": "X"}, "invalid_name", "name", 'with a letter or digit, not "X".'),
    ({"name": "x\n"}, "invalid_name", "name", ""),
    ({"name": "x", "count": 0}, "out_of_range", "count", "'count' must be a whole number from 1 to 1,000, or null, not 0."),
    ({"name": "x", "count": 10**30}, "out_of_range", "count", ""),
    ({"name": "x", "count": "5"}, "invalid_type", "count", "'count' must be a whole number from 1 to 1,000, or null, not \"5\"."),
    ({"name": "x", "count": True}, "invalid_type", "count", ""),
    ({"name": "x", "count": 1.5}, "invalid_type", "count", ""),
    ({"name": "x", "note": "long"}, "out_of_range", "note", "'note' must be text of at most 3 characters, not \"long\"."),
    ({"name": "x", "note": None}, "invalid_type", "note", ""),
    ({"name": "x", "kind": "c"}, "out_of_range", "kind", "'kind' must be one of: a, b, not \"c\"."),
    ({"name": "x", "kind": 1}, "invalid_type", "kind", ""),
    ({"name": "x", "desired": "gone"}, "out_of_range", "desired", "'desired' must be one of: running, stopped, not \"gone\"."),
    ({"name": "x", "flag": "true"}, "invalid_type", "flag", "'flag' must be true or false, not \"true\"."),
    ({"name": "x", "items": {}}, "invalid_type", "items", "'items' must be a list, not {}."),
    ({"name": "x", "items": [{"weight": 1}, {"weight": 9}]}, "out_of_range", "items[1].weight", "a number from 0.5 to 2, not 9."),
    ({"name": "x", "items": [{}]}, "missing_parameter", "items[0].weight", "'items[0].weight' is required."),
    ({"name": "x", "items": [3]}, "invalid_type", "items[0]", "'items[0]' must be an object, not 3."),
    ({"name": "x", "first": {"wieght": 1}}, "unsupported_parameter", "first.wieght", "The field 'first.wieght' is not known."),
    ({"name": "x", "first": []}, "invalid_type", "first", "'first' must be an object, or null, not []."),
    ({"name": "x", "any": [{"a": 1}, None, 5], "fields": True}, "invalid_type", "fields", "'fields' must be an object, or null, not true."),
    ({"name": "x", "any": {}}, "invalid_type", "any", "'any' must be a list, or null, not {}."),
    ({"name": "x", "y" * 500: 1}, "unsupported_parameter", "y" * 100, ""),
    ({"name": "x" * 500}, "invalid_name", "name", "xxx..."),
]


@pytest.mark.parametrize(("given", "code", "param", "words"), FAULTS)
def test_a_fault_is_named(given: dict[str, Any], code: str, param: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        decode(Body, given)
    assert (raised.value.error_code, raised.value.param) == (code, param)
    assert words in raised.value.message
    assert len(raised.value.message) < 400


def test_values_are_kept_and_what_is_not_given_is_told_apart_from_null() -> None:
    body = decode(Body, {"name": "x", "items": [{"weight": 2}]})
    assert (body.count, body.items) == (UNSET, [Item(weight=2)])
    assert decode(Body, {"name": "x", "count": None}).count is None
    assert decode(NewTenant, {"name": "x", "max_concurrent": 0}).max_concurrent == 0


@pytest.mark.parametrize(
    ("given", "code", "param"),
    [
        ({"limit": "0"}, "out_of_range", "limit"),
        ({"limit": "11"}, "out_of_range", "limit"),
        ({"limit": "x"}, "invalid_type", "limit"),
        ({"limit": ""}, "invalid_type", "limit"),
        ({"flag": "perhaps"}, "invalid_type", "flag"),
    ],
)
def test_a_query_is_text(given: dict[str, str], code: str, param: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        decode(Asked, given, text=True)
    assert (raised.value.error_code, raised.value.param) == (code, param)


def test_other_parameters_of_a_query_have_no_effect() -> None:
    assert decode(Asked, {"limit": "3", "flag": "true", "api-version": "1"}, text=True) == Asked(limit=3, flag=True)
    with pytest.raises(InvalidRequest, match="a day such as"):
        decode(CogsQuery, {"since": "2026-13-01"}, text=True)


def test_the_words_cover_what_msgspec_refuses() -> None:
    """Every refusal of msgspec matches one of our rules, so the fallback text is never used."""
    values: list[Any] = [None, True, 0, -1, 1.5, 10**40, "", "text", [], [None], {}, {"x": 1}]
    for known in msgspec.structs.fields(Body):
        for value in values:
            given = {"name": "x"} | {known.name: value}
            try:
                msgspec.convert(given, Body)
            except msgspec.ValidationError:
                with pytest.raises(InvalidRequest) as raised:
                    decode(Body, given)
                assert raised.value.param is not None, given
