"""Tools and the choice among them, as the Responses API writes them: functions without a wrapper, and custom tools.

A custom tool takes any text. The engine gets it as a function with one string, and the answer is translated back.
"""

from dataclasses import dataclass
from typing import Any

from lmaas.errors import InvalidRequest
from lmaas.protocols.parameters import tools as chat
from lmaas.protocols.parameters.checks import one_of, unsupported, without_nulls, wrong_type

#: The only argument of the function that stands for a custom tool.
INPUT = "input"
_CUSTOM_PARAMETERS = {
    "type": "object",
    "properties": {INPUT: {"type": "string"}},
    "required": [INPUT],
    "additionalProperties": False,
}
_OURS = ("function", "custom")
_OFFERED = "only tools of the types 'function' and 'custom' are offered"


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools of a request: as the engine receives them, as the response repeats them, and the names of those that are custom."""

    for_engine: list[dict[str, Any]]
    repeated: list[dict[str, Any]]
    custom: frozenset[str]


def read_tools(name: str, value: Any) -> Tools:
    """Read a list of functions and custom tools. Raises InvalidRequest with the type of a tool that is not offered."""
    if not isinstance(value, list) or len(value) > chat.MAX_TOOLS:
        raise wrong_type(name, f"a list of at most {chat.MAX_TOOLS} tools")
    functions, customs = [], []
    for index, tool in enumerate(value):
        given = without_nulls(tool) if isinstance(tool, dict) else {}
        kind = given.get("type")
        if kind not in _OURS:
            if isinstance(kind, str):
                raise unsupported(f"{name}[{index}].type", f"there is no tool of the type '{kind[:50]}', {_OFFERED}")
            raise wrong_type(f"{name}[{index}]", "an object whose type is 'function' or 'custom'")
        if kind == "custom":
            customs.append(_custom(f"{name}[{index}]", given))
        # The form of chat completions has the function in a field of its own.
        functions.append(_as_function(customs[-1]) if kind == "custom" else given.get("function", given))
    for_engine = chat.read_tools(name, [{"type": "function", "function": function} for function in functions])
    names = [tool["function"]["name"] for tool in for_engine]
    custom = frozenset(tool["name"] for tool in customs)
    for each in custom:
        if names.count(each) > 1:
            raise InvalidRequest(f"'{name}' has several tools with the name '{each[:100]}'. Give each its own.", param=name)
    rest = iter(customs)
    repeated = [next(rest) if tool["function"]["name"] in custom else _repeated(tool["function"]) for tool in for_engine]
    return Tools(for_engine, repeated, custom)


def _repeated(function: dict[str, Any]) -> dict[str, Any]:
    """Return a function as responses show it, with every field."""
    return {
        "type": "function",
        "name": function["name"],
        "description": function.get("description"),
        "parameters": function.get("parameters"),
        "strict": function.get("strict", False),
    }


def _custom(where: str, given: dict[str, Any]) -> dict[str, Any]:
    for field in ("name", "description"):
        if not isinstance(given.get(field, ""), str):
            raise wrong_type(f"{where}.{field}", "a string")
    form = without_nulls(form) if isinstance(form := given.get("format", {"type": "text"}), dict) else {}
    one_of("text", "grammar")(f"{where}.format.type", form.get("type"))
    found = {"type": "text"}
    if form["type"] == "grammar":
        one_of("lark", "regex")(f"{where}.format.syntax", form.get("syntax"))
        if not isinstance(form.get("definition"), str):
            raise wrong_type(f"{where}.format.definition", "a string")
        found = {"type": "grammar", "syntax": form["syntax"], "definition": form["definition"]}
    return {"type": "custom", "name": given.get("name"), "description": given.get("description"), "format": found}


def _as_function(custom: dict[str, Any]) -> dict[str, Any]:
    """Return the function that stands for a custom tool. The model reads the grammar, but the engine does not enforce it."""
    form, description = custom["format"], custom["description"] or ""
    if form["type"] == "grammar":
        rule = f"The input must match this grammar ({form['syntax']}):\n{form['definition']}"
        description = f"{description}\n\n{rule}" if description else rule
    return {"name": custom["name"], "description": description, "parameters": _CUSTOM_PARAMETERS}


def read_tool_choice(name: str, value: Any) -> Any:
    """Return the choice as chat completions read it, where a custom tool is a function."""
    if not isinstance(value, dict):
        return chat.read_tool_choice(name, value)
    given = without_nulls(value)
    kind = given.get("type")
    if kind == "custom":
        given = {"type": "function", "name": given.get("name")}
    elif kind == "allowed_tools":
        inner = given.get("allowed_tools", given)
        tools = inner.get("tools") if isinstance(inner, dict) else None
        for tool in tools if isinstance(tools, list) else ():
            if isinstance(tool, dict) and isinstance(tool.get("type"), str) and tool["type"] not in _OURS:
                raise unsupported(f"{name}.tools", f"there is no tool of the type '{tool['type'][:50]}', {_OFFERED}")
    elif isinstance(kind, str) and kind not in ("function", "none", "auto", "required"):
        raise unsupported(f"{name}.type", f"there is no tool of the type '{kind[:50]}', {_OFFERED}")
    return chat.read_tool_choice(name, given)


def repeated_choice(choice: Any, custom: frozenset[str]) -> Any:
    """Return a choice as responses show it."""

    def tool(name: str) -> dict[str, Any]:
        return {"type": "custom" if name in custom else "function", "name": name}

    if isinstance(choice, tuple):
        mode, names = choice
        return {"type": "allowed_tools", "mode": mode, "tools": [tool(name) for name in names]}
    return tool(choice["function"]["name"]) if isinstance(choice, dict) else choice
