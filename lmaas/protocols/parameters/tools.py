"""Tools and the choice among them, in the forms that clients use."""

import math
import re
from typing import Any

from lmaas.errors import InvalidRequest
from lmaas.inference.schemas import MAX_DEPTH, check_schema
from lmaas.protocols.parameters.checks import boolean, unsupported, without_nulls, wrong_type
from lmaas.protocols.parameters.enforceable import enforceable

MAX_TOOLS = 128
#: The values in a field that is forwarded whole, names of fields included: an empty list has two bytes, and takes many in memory.
MAX_VALUES = 100_000
#: A name stands inside the JSON that a model writes for a call, so it must need no escapes.
FUNCTION_NAME = re.compile(r'[^\x00-\x1f"\\]{1,256}')
_CHOICES = ("none", "auto", "required")
_CHOICE_RULE = "'none', 'auto', 'required', a function that is among the tools, or 'allowed_tools'"
#: Keys that may decide a schema's type when `type` is missing.
_TYPED_BY = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const", "if", "not")


def check_plain(name: str, value: Any) -> None:
    """Raise InvalidRequest for a value that is forwarded whole if it is nested too deeply or has too many parts, or holds a NUL or a number
    that JSON cannot write."""
    level, depth, count = [value], 0, 0
    while level:
        depth += 1
        count += len(level)
        if count > MAX_VALUES:
            raise InvalidRequest(
                f"'{name}' consists of more than {MAX_VALUES:,} values. Make it smaller.", code="invalid_schema", param=name
            )
        if depth > MAX_DEPTH + 8:
            raise InvalidRequest(f"'{name}' is nested too deeply.", code="invalid_schema", param=name)
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                if "\0" in item:
                    raise InvalidRequest(
                        f"'{name}' contains a string with the character NUL. Remove it.", code="invalid_schema", param=name
                    )
            elif isinstance(item, dict):
                below.extend(item)
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif isinstance(item, float) and not math.isfinite(item):
                raise InvalidRequest(f"'{name}' contains a number that is too large for a 64-bit float.", code="invalid_schema", param=name)
        level = below


def read_tools(name: str, value: Any) -> Any:
    """Return the tools for the engine. An empty list stays one; the request is then one without tools."""
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise wrong_type(name, f"a list of at most {MAX_TOOLS} tools")
    check_plain(name, value)
    tools = []
    for index, tool in enumerate(value):
        kind = tool.get("type") or "function" if isinstance(tool, dict) else None
        if isinstance(kind, str) and kind != "function":
            raise unsupported(f"{name}[{index}].type", f"tools of the type '{kind[:50]}' are not offered, only functions")
        tools.append({"type": "function", "function": _function(name, tool.get("function") if kind else None)})
    return tools


def read_functions(name: str, value: Any) -> Any:
    """Return the deprecated `functions` as tools."""
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise wrong_type(name, f"a list of at most {MAX_TOOLS} functions")
    check_plain(name, value)
    return [{"type": "function", "function": _function(name, function)} for function in value]


def _function(name: str, function: Any) -> dict[str, Any]:
    if not isinstance(function, dict):
        raise wrong_type(name, "a list of tools of the type 'function', each with a 'function' object")
    given = without_nulls(function)
    found: dict[str, Any] = {key: given[key] for key in ("name", "description", "parameters", "strict") if key in given}
    if not isinstance(found.get("name"), str) or not FUNCTION_NAME.fullmatch(found["name"]):
        raise wrong_type(name, "a list of functions whose names are strings of 1 to 256 characters without quotes and backslashes")
    if not isinstance(found.get("description", ""), str):
        raise wrong_type(name, "a list of functions whose descriptions are strings")
    if "strict" in found:
        boolean(name, found["strict"])
    if "parameters" in found:
        check_schema(name, found["parameters"])
    return found


def read_tool_choice(name: str, value: Any) -> Any:
    """Return the choice: a string, a function's name in OpenAI's form, or a `(mode, names)` pair for allowed tools."""
    if isinstance(value, dict):
        given = without_nulls(value)
        kind = given.get("type")
        if kind == "allowed_tools":
            return _allowed(name, given)
        function = given.get("function", given)
        if kind == "function" and isinstance(function, dict) and isinstance(function.get("name"), str):
            return {"type": "function", "function": {"name": function["name"]}}
        if kind == "custom":
            raise unsupported(f"{name}.type", "custom tools are not offered, only functions")
        # Some libraries wrap the plain words.
        value = kind if isinstance(kind, str) and kind in _CHOICES else None
        if value is None:
            raise wrong_type(name, _CHOICE_RULE)
    if not isinstance(value, str):
        raise wrong_type(name, _CHOICE_RULE)
    if value not in _CHOICES:
        raise InvalidRequest(f"'{name}' must be {_CHOICE_RULE}.", code="out_of_range", param=name)
    return value


def read_function_call(name: str, value: Any) -> Any:
    """Return the deprecated `function_call` as a tool choice."""
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        return {"type": "function", "function": {"name": value["name"]}}
    if value not in ("none", "auto"):
        raise wrong_type(name, "'none', 'auto' or an object with the name of a function")
    return value


def _allowed(name: str, given: dict[str, Any]) -> tuple[str, list[str]]:
    """Read the form of chat completions, `{"allowed_tools": {"mode", "tools"}}`, and that of responses, which has both fields itself."""
    inner = given.get("allowed_tools", given)
    mode, tools = (inner.get("mode", "auto"), inner.get("tools")) if isinstance(inner, dict) else (None, None)
    if mode not in ("auto", "required") or not isinstance(tools, list) or not tools:
        raise wrong_type(name, "with 'allowed_tools' an object with the mode 'auto' or 'required' and a list of tools")
    names = []
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        found = function.get("name") if isinstance(function, dict) else None
        if not isinstance(found, str):
            raise wrong_type(name, "with 'allowed_tools' a list of tools of the type 'function', each with its name")
        names.append(found)
    return mode, names


def settle_tools(given: dict[str, Any], *, legacy: bool) -> list[Any]:
    """Convert a request's tools and tool choice into the form that an engine takes, in place.

    With `legacy` they came as `functions` and `function_call`, which errors then name. Returns the tools as they came if some were made
    strict, otherwise an empty list.
    """
    tools, choice = given.pop("tools", None), given.pop("tool_choice", None)
    tools_name, choice_name = ("functions", "function_call") if legacy else ("tools", "tool_choice")
    if not tools:
        if choice not in (None, "none", "auto"):
            raise InvalidRequest(f"'{choice_name}' needs '{tools_name}', which the request does not have.", param=choice_name)
        return []
    names = [tool["function"]["name"] for tool in tools]
    wanted = choice[1] if isinstance(choice, tuple) else [choice["function"]["name"]] if isinstance(choice, dict) else []
    for name in wanted:
        if name not in names:
            raise InvalidRequest(
                f"'{choice_name}' names the function '{name[:100]}', which is not in '{tools_name}'.",
                code="out_of_range",
                param=choice_name,
            )
    if isinstance(choice, tuple):
        choice, tools = choice[0], [tool for tool in tools if tool["function"]["name"] in wanted]
    as_sent = tools
    if choice == "required":
        tools = [_constrained(tools_name, tool) for tool in tools]
    elif isinstance(choice, dict):
        tools = [_constrained(tools_name, tool) if tool["function"]["name"] in wanted else tool for tool in tools]
    given["tools"] = tools
    if choice is not None:
        given["tool_choice"] = choice
    lenient = any(not before["function"].get("strict") for before, after in zip(as_sent, tools, strict=True) if before is not after)
    return as_sent if lenient else []


def _constrained(name: str, tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool whose arguments the engine constrains to its schema.

    vLLM builds a grammar for every call that is required, but leaves the arguments free unless the tool is `strict`: a model may then
    write a string or a list for them. With `strict`, and a schema for objects, it cannot.
    """
    function = tool["function"]
    schema = _object_schema(name, function.get("parameters"))
    if not function.get("strict"):
        schema = enforceable(schema)
    return {"type": "function", "function": function | {"parameters": schema, "strict": True}}


def _object_schema(name: str, schema: dict[str, Any] | None) -> dict[str, Any]:
    if not schema:
        return {"type": "object", "properties": {}}
    kind = schema.get("type")
    if kind is None:
        return schema if any(key in schema for key in _TYPED_BY) else schema | {"type": "object"}
    if kind == "object":
        return schema
    if isinstance(kind, list) and "object" in kind:
        return schema | {"type": "object"}
    raise InvalidRequest(
        f"'{name}' contains a function whose parameters are not an object. Set the 'type' of their schema to 'object'.",
        code="invalid_schema",
        param=name,
    )
