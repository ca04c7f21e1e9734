"""Bounds on JSON from clients that is forwarded unchanged. The meaning of a schema is checked in grammars.py."""

from typing import Any

from lmaas.errors import InvalidRequest

#: Levels of a schema, and of a tool call's arguments.
MAX_DEPTH = 64


def depth(value: Any) -> int:
    """Return how deep lists and objects are nested, without recursion."""
    deepest, level = 0, [value]
    while level:
        deepest += 1
        level = [item for parent in level for item in _children(parent)]
    return deepest


def _children(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def check_schema(name: str, schema: Any) -> None:
    """Raise InvalidRequest `invalid_schema`, with `name` as the parameter to blame, unless `schema` is an object."""
    if not isinstance(schema, dict):
        raise InvalidRequest(f"'{name}' must be a JSON schema, which is an object.", code="invalid_schema", param=name)
