"""Requests of any shape: they are read, or refused with the field that is wrong."""

import functools
import json
import re
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import given
from hypothesis import strategies as st

from lmaas.errors import InvalidRequest
from lmaas.protocols.responses.items import PREFIXES, messages_of, named, read_items
from lmaas.protocols.responses.parameters import TABLE
from lmaas.protocols.responses.request import read_response
from tests.unit.protocols.responses.build import BODY, CUSTOM, FUNCTION, HEX, TOOLS

Read = TypeVar("Read")
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
PLAIN = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | TEXT
JSON = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8)
KINDS = st.sampled_from(
    [*PREFIXES, "item_reference", "web_search_call", "function", "custom", "namespace", "allowed_tools", "text", "input_text"]
)
FIELDS = ("type", "role", "content", "id", "call_id", "name", "arguments", "input", "output", "summary", "status", "phase", "namespace")
ROLES = st.sampled_from(["user", "assistant", "system", "tool"])


def nearly(*fields: str) -> st.SearchStrategy[Any]:
    """Return a strategy for objects with some of these fields, whose values are valid or of any type."""
    parts = st.lists(st.fixed_dictionaries({"type": KINDS | JSON}, optional={"text": JSON, "refusal": JSON, "image_url": JSON}), max_size=2)
    return st.fixed_dictionaries({}, optional=dict.fromkeys(fields, KINDS | ROLES | parts | JSON | TEXT))


TOOL = nearly("type", "name", "description", "parameters", "strict", "format", "function", "tools") | st.sampled_from([FUNCTION, CUSTOM])
CHOICE = nearly("type", "name", "mode", "tools", "allowed_tools", "function")
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "input": st.lists(nearly(*FIELDS), max_size=4),
    "tools": st.lists(TOOL, max_size=3),
    "tool_choice": CHOICE | st.sampled_from(["auto", "required", "none"]),
    "text": nearly("format", "verbosity") | st.fixed_dictionaries({"format": nearly("type", "name", "schema", "strict", "json_schema")}),
    "reasoning": nearly("effort", "summary"),
}


def outcome(read: Callable[[Any], Read], value: Any) -> tuple[Read | None, str]:
    """Return what was read, or the field that the error names."""
    try:
        return read(value), ""
    except InvalidRequest as refused:
        return None, refused.param or ""


@given(st.fixed_dictionaries({}, optional={name: LIKELY.get(name, st.nothing()) | JSON for name in TABLE.by_name}))
def test_any_body(changes: dict[str, Any]) -> None:
    body = BODY | {"tools": TOOLS} | changes
    request, blamed = outcome(read_response, body)
    if request is None:
        assert re.split(r"[.\[]", blamed)[0] in body
        return
    json.loads(request.body("engine", "salt"))
    assert request.estimate(2048)[0] > 0


@given(st.lists(nearly(*FIELDS), max_size=5))
def test_any_items(value: list[Any]) -> None:
    items, blamed = outcome(functools.partial(read_items, "input"), value)
    if items is None:
        assert blamed.startswith("input")
        return
    own = [item for item in items if item["type"] != "item_reference"]
    messages = messages_of(None, own)
    assert all(isinstance(message["content"], str | list | None) for message in messages)
    stored = json.loads(json.dumps(named(own, f"resp_{HEX}")))
    # Stored items give the same messages when they are read again.
    assert messages_of(None, stored) == messages == messages_of(None, read_items("input", stored))
