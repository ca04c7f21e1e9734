"""Parameters for the form of the answer: OpenAI's `response_format`, vLLM's `structured_outputs` and the older `guided_*`.

Only their form is checked here. Whether an engine can compile them is checked before a request is forwarded: grammars.py.
"""

import json
from typing import Any

from lmaas.errors import InvalidRequest
from lmaas.http import parse_json
from lmaas.inference.schemas import check_schema
from lmaas.protocols.parameters.checks import Reader, boolean, unsupported, without_nulls, wrong_type
from lmaas.protocols.parameters.tools import check_plain

MAX_CHOICES = 1000
#: The constraints of `structured_outputs`, of which a request has one.
CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_FLAGS = ("disable_any_whitespace", "disable_additional_properties")
_KINDS = ("text", "json_object", "json_schema", "structural_tag")


def _invalid(name: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"'{name}' {what}.", code="invalid_schema", param=name)


def read_response_format(name: str, value: Any) -> Any:
    """Return the format for the engine."""
    check_plain(name, value)
    given = without_nulls(value) if isinstance(value, dict) else {}
    kind = given.get("type")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise wrong_type(name, "an object whose type is 'text', 'json_object', 'json_schema' or 'structural_tag'")
    if kind == "structural_tag":
        return given
    if kind == "json_object" and "schema" in given:
        # A form of other servers; without its schema the answer would be any object.
        kind, given = "json_schema", {"json_schema": {"schema": given["schema"]}}
    if kind != "json_schema":
        return {"type": kind}
    wrapped = given.get("json_schema")
    inner = without_nulls(wrapped) if isinstance(wrapped, dict) else {}
    if not isinstance(inner.get("name", ""), str) or not isinstance(inner.get("description", ""), str) or "schema" not in inner:
        raise _invalid(name, "must have a 'json_schema' object with a name and a schema")
    if "strict" in inner:
        boolean(f"{name}.json_schema.strict", inner["strict"])
    check_schema(name, inner["schema"])
    found = {key: inner[key] for key in ("name", "description", "schema", "strict") if key in inner}
    return {"type": kind, "json_schema": {"name": "answer"} | found}


def read_structured_outputs(name: str, value: Any) -> Any:
    """Return vLLM's constraints: exactly one of CONSTRAINTS, and flags for whitespace and additional properties."""
    if not isinstance(value, dict):
        raise wrong_type(name, "an object")
    check_plain(name, value)
    given = without_nulls(value)
    if "whitespace_pattern" in given:
        raise unsupported(f"{name}.whitespace_pattern", "the grammar library of this service does not know it")
    if given.get("json_object") is False:
        del given["json_object"]
    given = {key: item for key, item in given.items() if key in CONSTRAINTS or key in _FLAGS}
    for key in _FLAGS:
        if key in given:
            boolean(f"{name}.{key}", given[key])
    found = [key for key in CONSTRAINTS if key in given]
    if len(found) > 1:
        raise InvalidRequest(f"'{name}' contains {' and '.join(found)}, which cannot be used together. Send one of them.", param=name)
    if not found:
        return None
    return given | {found[0]: _READERS[found[0]](name, given[found[0]])}


def guided(constraint: str) -> Reader:
    """Return a reader for a constraint by its older name, such as `guided_json`: it is forwarded in `structured_outputs`."""

    def read(name: str, value: Any) -> Any:
        check_plain(name, value)
        return {constraint: _READERS[constraint](name, value)}

    return read


def _json(name: str, value: Any) -> Any:
    if isinstance(value, str):
        value = _parsed(name, value)
    check_schema(name, value)
    return value


def _regex(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        raise wrong_type(name, "an object whose 'regex' is a string")
    return value


def _choice(name: str, value: Any) -> Any:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_CHOICES or not all(isinstance(item, str) for item in value):
        raise wrong_type(name, f"an object whose 'choice' is a list of 1 to {MAX_CHOICES} strings")
    return value


def _grammar(name: str, value: Any) -> Any:
    if not isinstance(value, str) or not value.strip():
        raise wrong_type(name, "an object whose 'grammar' is a grammar in EBNF, as a string")
    return value


def _json_object(name: str, value: Any) -> Any:
    return boolean(f"{name}.json_object", value)


def _structural_tag(name: str, value: Any) -> Any:
    """Read a structural tag, which vLLM takes as a string of JSON."""
    if isinstance(value, dict):
        value = json.dumps(value, ensure_ascii=False)
    tag = _parsed(name, value) if isinstance(value, str) else None
    if not isinstance(tag, dict):
        raise _invalid(name, "must have a 'structural_tag' that is a JSON object, written as a string")
    return value


def _parsed(name: str, text: str) -> Any:
    """Parse JSON that came as a string, as strictly as a request's body."""
    try:
        value = parse_json(text.encode())
    except InvalidRequest as error:
        reason = error.message.removeprefix("The request body is not valid JSON: ").rstrip(".")
        raise _invalid(name, f"holds JSON as a string that cannot be used: {reason}") from None
    check_plain(name, value)
    return value


_READERS: dict[str, Reader] = {
    "json": _json,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "json_object": _json_object,
    "structural_tag": _structural_tag,
}
