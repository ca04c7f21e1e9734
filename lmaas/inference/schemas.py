"""Bounds on JSON from clients that is forwarded unchanged, and the form of schemas. Their meaning is checked in grammars.py."""

from typing import Any

from lmaas.errors import InvalidRequest

#: Levels of a schema, and of a tool call's arguments.
MAX_DEPTH = 64
#: The keywords whose values are schemas: objects of schemas, lists of them, and one. `items` may be one or a list.
_OBJECTS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_ONE = ("additionalProperties", "contains", "not", "if", "then", "else", "propertyNames", "unevaluatedItems", "unevaluatedProperties")
#: The Python types of the keywords' values.
_FORMS: dict[str, type[Any]] = {
    **dict.fromkeys(_OBJECTS, dict),
    **dict.fromkeys(_LISTS, list),
    **dict.fromkeys((*_ONE, "items"), object),
    "type": str,
}


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
    """Raise InvalidRequest `invalid_schema`, with `name` as the parameter to blame, unless `schema` is an object with the form of a schema.

    Only the types of the keywords that hold schemas, and of `type`, are checked: what is wrong there breaks the chat templates of models,
    and the engine checks no schema of a tool that the model is free to call.
    """
    if not isinstance(schema, dict):
        raise InvalidRequest(f"'{name}' must be a JSON schema, which is an object.", code="invalid_schema", param=name)
    found: list[tuple[str, Any]] = [("", schema)]
    while found:
        place, each = found.pop()
        if each is True or each is False:
            continue
        if not isinstance(each, dict):
            raise _malformed(name, place, "must hold schemas, which are objects, true or false")
        for keyword, value in each.items():
            form = _FORMS.get(keyword)
            if form is None or value is None:
                continue
            if form is str:
                if not isinstance(value, str) and not (isinstance(value, list) and value and all(isinstance(kind, str) for kind in value)):
                    raise _malformed(name, keyword, "must be the name of a type or a list of such names")
            elif not isinstance(value, form):
                raise _malformed(name, keyword, f"must be {'an object' if form is dict else 'a list'} of schemas")
            elif form is not object or (keyword == "items" and isinstance(value, list)):
                found += [(keyword, inner) for inner in _children(value)]
            else:
                found.append((keyword, value))


def _malformed(name: str, keyword: str, rule: str) -> InvalidRequest:
    return InvalidRequest(f"'{name}' has a JSON schema in which '{keyword}' {rule}.", code="invalid_schema", param=name)
