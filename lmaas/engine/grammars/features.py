"""Names the part of a JSON schema that the engine's grammar library (xgrammar) cannot enforce.

vLLM refuses such schemas as a whole (`has_xgrammar_unsupported_json_features`, vLLM 0.32), but a client needs to know what to change.
"""

from collections.abc import Iterator
from typing import Any

#: The string formats that the library enforces (vLLM's STRING_SUPPORTED_FORMATS).
FORMATS = frozenset({
    "email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid", "uri", "uri-reference", "uri-template",
    "json-pointer", "relative-json-pointer",
})  # fmt: skip
_OF_ARRAYS = ("uniqueItems", "contains", "minContains", "maxContains")


def unsupported_feature(schema: Any) -> str:
    """Describe the first feature that cannot be enforced, with its place as a JSON pointer. Empty if there is none."""
    for place, part in _parts(schema):
        feature = _feature(part)
        if feature:
            return f"{feature} (at '{place or '/'}')"
    return ""


def _parts(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    waiting = [("", schema)]
    while waiting:
        place, part = waiting.pop()
        if isinstance(part, dict):
            yield place, part
            waiting += [(f"{place}/{key}", value) for key, value in part.items()]
        elif isinstance(part, list):
            waiting += [(f"{place}/{index}", value) for index, value in enumerate(part)]


def _feature(part: dict[str, Any]) -> str:
    given = part.get("type")
    types = {name for name in (given if isinstance(given, list) else [given]) if isinstance(name, str)}
    if types & {"integer", "number"} and "multipleOf" in part:
        return "'multipleOf'"
    if "array" in types:
        for key in _OF_ARRAYS:
            if key in part:
                return f"'{key}'"
    if "string" in types:
        if "format" in part and part["format"] not in FORMATS:
            return f"the format {str(part['format'])[:40]!r}"
        if _pattern_and_length(part):
            return "a pattern or a format together with 'minLength' or 'maxLength'"
    if "object" in types and (feature := _of_objects(part)):
        return feature
    all_of = part.get("allOf")
    return "'allOf' with more than one schema" if isinstance(all_of, list) and len(all_of) > 1 else ""


def _of_objects(part: dict[str, Any]) -> str:
    if "propertyNames" in part:
        if isinstance(part["propertyNames"], dict) and _pattern_and_length(part["propertyNames"]):
            return "'propertyNames' with a pattern and a length"
        for key in ("patternProperties", "properties"):
            if key in part:
                return f"'propertyNames' together with '{key}'"
        if part.get("unevaluatedProperties", True) is not True:
            return "'propertyNames' together with 'unevaluatedProperties'"
    patterns = part.get("patternProperties")
    if isinstance(patterns, dict):
        if "properties" in part:
            return "'patternProperties' together with 'properties'"
        if len(patterns) > 1:
            return "'patternProperties' with more than one pattern"
    return ""


def _pattern_and_length(part: dict[str, Any]) -> bool:
    return ("pattern" in part or "format" in part) and ("minLength" in part or "maxLength" in part)
