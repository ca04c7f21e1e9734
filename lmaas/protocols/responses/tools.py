"""Tools and the choice among them, as the Responses API writes them: functions without a wrapper, custom tools, and namespaces.

A custom tool takes any text. The engine gets it as a function with one string, and the answer is translated back.
"""

import itertools
from collections.abc import Iterator, Mapping
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
_OFFERED = "only functions and custom tools are offered, and namespaces of them"


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools of a request: as the engine receives them, as the response repeats them, and what calls of them are translated to.

    `custom` has the engine's names of those that are custom, `namespaces` the namespace and the name of those that are in one.
    """

    for_engine: list[dict[str, Any]]
    repeated: list[dict[str, Any]]
    custom: frozenset[str]
    namespaces: Mapping[str, tuple[str, str]]


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tool with its place in the request."""

    where: str
    given: dict[str, Any]
    namespace: str | None = None

    @property
    def is_custom(self) -> bool:
        return bool(self.given["type"] == "custom")


def engine_name(name: str, namespace: str | None) -> str:
    """Return the engine's name of a tool. That of a tool in a namespace has both names."""
    return name if namespace is None else f"{namespace}.{name}"


def read_tools(name: str, value: Any) -> Tools:
    """Read a list of functions, custom tools and namespaces. Raises InvalidRequest with the type of a tool that is not offered."""
    if not isinstance(value, list) or len(value) > chat.MAX_TOOLS:
        raise wrong_type(name, f"a list of at most {chat.MAX_TOOLS} tools")
    entries: list[_Entry] = []
    idle: list[dict[str, Any]] = []
    # Each is one tool, or a namespace with the number of its tools.
    shown: list[tuple[dict[str, Any], int] | None] = []
    for index, tool in enumerate(value):
        where, given = f"{name}[{index}]", without_nulls(tool) if isinstance(tool, dict) else {}
        if given.get("type") == "namespace":
            head, inner = _namespace(where, given)
            shown.append((head, len(inner)))
            entries += inner
        elif _is_idle(given):
            idle.append(given)
            shown.append((given, 0))
        else:
            shown.append(None)
            entries.append(_entry(where, given))
    # The response repeats them.
    chat.check_plain(name, idle)
    customs = {place: _custom(entry.where, entry.given) for place, entry in enumerate(entries) if entry.is_custom}
    # The form of chat completions has the function in a field of its own.
    functions = [
        _as_function(customs[place]) if entry.is_custom else entry.given.get("function", entry.given) for place, entry in enumerate(entries)
    ]
    for_engine = chat.read_tools(name, [{"type": "function", "function": function} for function in functions])
    each = iter([customs.get(place) or _repeated(tool["function"]) for place, tool in enumerate(for_engine)])
    repeated = [next(each) if found is None else _filled(*found, each) for found in shown]
    namespaces: dict[str, tuple[str, str]] = {}
    for tool, entry in zip(for_engine, entries, strict=True):
        if entry.namespace is not None:
            own = tool["function"]["name"]
            tool["function"]["name"] = engine_name(own, entry.namespace)
            namespaces[tool["function"]["name"]] = (entry.namespace, own)
    names = [tool["function"]["name"] for tool in for_engine]
    custom = frozenset(names[place] for place in customs)
    for found in (*custom, *namespaces):
        if names.count(found) > 1:
            raise InvalidRequest(f"'{name}' has several tools with the name '{found[:100]}'. Give each its own.", param=name)
    return Tools(for_engine, repeated, custom, namespaces)


def _entry(where: str, given: dict[str, Any], namespace: str | None = None) -> _Entry:
    """Return a function or a custom tool. Raises InvalidRequest for every other type."""
    kind = given.get("type")
    if kind not in _OURS:
        if isinstance(kind, str):
            raise unsupported(f"{where}.type", f"there is no tool of the type '{kind[:50]}', {_OFFERED}")
        raise wrong_type(where, "an object whose type is 'function' or 'custom'")
    return _Entry(where, given, namespace)


def _is_idle(given: dict[str, Any]) -> bool:
    """Return whether a tool has no effect: a search of the web that may not reach it, which the Codex CLI offers by default."""
    return given.get("type") == "web_search" and given.get("external_web_access") is False


def _namespace(where: str, given: dict[str, Any]) -> tuple[dict[str, Any], list[_Entry]]:
    """Return a namespace without its tools as the response repeats it, and its tools."""
    name, tools = given.get("name"), given.get("tools")
    if not isinstance(name, str) or not chat.FUNCTION_NAME.fullmatch(name):
        raise wrong_type(f"{where}.name", "a string of 1 to 256 characters without quotes and backslashes")
    if not isinstance(given.get("description", ""), str):
        raise wrong_type(f"{where}.description", "a string")
    if not isinstance(tools, list) or len(tools) > chat.MAX_TOOLS:
        raise wrong_type(f"{where}.tools", f"a list of at most {chat.MAX_TOOLS} functions and custom tools")
    entries = [
        _entry(f"{where}.tools[{index}]", without_nulls(tool) if isinstance(tool, dict) else {}, name) for index, tool in enumerate(tools)
    ]
    return {"type": "namespace", "name": name, "description": given.get("description")}, entries


def _filled(head: dict[str, Any], count: int, tools: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Return a namespace with its tools, or a tool without effect as it is."""
    return head | {"tools": list(itertools.islice(tools, count))} if head["type"] == "namespace" else head


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
