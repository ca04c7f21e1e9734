"""The fields of a schema as rows of a table: type, rules, default and description in words."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

Schema = Mapping[str, Any]

_PREFIX = "#/components/schemas/"
#: The words for JSON's types.
_TYPES = {"array": "list"}


class Treatment(StrEnum):
    """The treatment of a field by the service. The descriptions of parameters begin with the words of the last two."""

    USED = "Used"
    WITHOUT_EFFECT = "No effect"
    REFUSED = "Refused"


@dataclass(frozen=True, slots=True)
class Field:
    """A row. `kind` is the type in words, `objects` are the names of the schemas that it mentions, `rules` are limits and the default."""

    name: str
    kind: str
    objects: tuple[str, ...]
    rules: str
    text: str
    required: bool
    treatment: Treatment = Treatment.USED


def name_of(schema: Schema) -> str | None:
    """Return the name of the schema that `schema` refers to; None if it is no reference."""
    target = schema.get("$ref")
    return target.removeprefix(_PREFIX) if isinstance(target, str) and target.startswith(_PREFIX) else None


def references(schema: Any) -> Iterator[str]:
    """Yield the names of the schemas that a schema refers to directly."""
    if isinstance(schema, Mapping):
        name = name_of(schema)
        if name is not None:
            yield name
        for value in schema.values():
            yield from references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from references(value)


def fields_of(schema: Schema, schemas: Mapping[str, Schema]) -> list[Field]:
    """Return a row for each property of an object, required ones first."""
    required = frozenset(schema.get("required", ()))
    rows = [field_of(name, value, schemas, required=name in required) for name, value in schema.get("properties", {}).items()]
    return sorted(rows, key=lambda row: not row.required)


def field_of(name: str, schema: Schema, schemas: Mapping[str, Schema], *, required: bool, text: str = "") -> Field:
    """Return the row of one field. `text` is a description from outside of the schema."""
    text = text or _description(schema)
    treatment = next((each for each in (Treatment.WITHOUT_EFFECT, Treatment.REFUSED) if text.startswith(each)), Treatment.USED)
    kinds, objects, rules = _words(schema, schemas)
    if "default" in schema and schema["default"] is not None:
        rules.append(f"default: {_shown(schema['default'])}")
    kind = " or ".join(dict.fromkeys(kinds)) or "any value"
    return Field(name, kind, tuple(dict.fromkeys(objects)), "; ".join(dict.fromkeys(rules)), text, required, treatment)


def _description(schema: Schema) -> str:
    """Return the first description in the schema or in its alternatives."""
    if isinstance(schema.get("description"), str):
        return " ".join(schema["description"].split())
    return next((found for option in schema.get("anyOf", ()) if (found := _description(option))), "")


def _words(schema: Schema, schemas: Mapping[str, Schema]) -> tuple[list[str], list[str], list[str]]:
    """Return the types of a schema in words, the names of the objects among them, and its rules."""
    name = name_of(schema)
    if name is not None:
        # A named list of values is shown where it is used.
        return _words(schemas[name], schemas) if "enum" in schemas[name] else (["object"], [name], [])
    if "anyOf" in schema:
        found = [_words(option, schemas) for option in schema["anyOf"]]
        kinds, objects, rules = ([item for part in parts for item in part] for parts in zip(*found, strict=True))
        return kinds, objects, rules
    if "const" in schema:
        return [_shown(schema["const"])], [], []
    if "enum" in schema:
        return [_shown(value) for value in schema["enum"]], [], []
    types = schema.get("type", [])
    kinds = [_TYPES.get(each, each) for each in ([types] if isinstance(types, str) else types)]
    objects = []
    if "contentMediaType" in schema:
        kinds = ["file"]
    elif "list" in kinds and schema.get("items"):
        inner, objects, _ = _words(schema["items"], schemas)
        kinds = [f"list of: {', '.join(dict.fromkeys(inner))}" if kind == "list" else kind for kind in kinds]
    return kinds, objects, list(_rules(schema))


def _rules(schema: Schema) -> Iterator[str]:
    yield from _range(schema, "minimum", "maximum", "")
    yield from _range(schema, "minLength", "maxLength", " characters")
    yield from _range(schema, "minItems", "maxItems", " items")
    if "format" in schema:
        yield f"format: {schema['format']}"
    if "pattern" in schema and "description" not in schema:
        yield f"pattern: {schema['pattern']}"


def _range(schema: Schema, low: str, high: str, unit: str) -> Iterator[str]:
    least, most = schema.get(low), schema.get(high)
    if least is not None and most is not None:
        yield f"{least:,} to {most:,}{unit}"
    elif least is not None:
        yield f"at least {least:,}{unit}"
    elif most is not None:
        yield f"at most {most:,}{unit}"


def _shown(value: Any) -> str:
    return "null" if value is None else json.dumps(value, ensure_ascii=False)
