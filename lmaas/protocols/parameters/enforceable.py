"""The part of a tool's schema that the engine's grammar library can enforce."""

import re
from typing import Any

#: Parts of a regular expression that xgrammar refuses: Unicode classes, word boundaries, references to groups, and groups of rarer kinds.
_REFUSED_PATTERN = re.compile(r"(?<!\\)(?:\\\\)*(?:\\[pPbBk1-9]|\(\?(?![:=!]|P?<[A-Za-z_]|[a-z]+\)))")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
#: Keywords whose values are data, not schemas.
_DATA = ("const", "enum", "default", "example", "examples")


def enforceable(schema: Any) -> Any:
    """Return the schema without keywords on whose account the grammar library would refuse it as a whole.

    It is meant for tools that are not `strict`: a client expects their schema to be followed as far as possible, and not an error.
    """
    if isinstance(schema, list):
        return [enforceable(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kind = schema.get("type")
    whole = kind == "integer" or (isinstance(kind, list) and "integer" in kind)
    return {
        key: value if key in _DATA else enforceable(value)
        for key, value in schema.items()
        if not (key == "pattern" and isinstance(value, str) and _REFUSED_PATTERN.search(value))
        and not (key in _BOUNDS and whole and _is_refused_bound(value))
    }


def _is_refused_bound(value: Any) -> bool:
    return isinstance(value, int | float) and (value != int(value) or not -(2**63) <= value < 2**63)
