"""Tools and the choice among them, as clients of the Messages protocol send them."""

from dataclasses import dataclass
from typing import Any

from lmaas.inference.schemas import check_schema
from lmaas.protocols.parameters.checks import boolean, unsupported, without_nulls, wrong_type
from lmaas.protocols.parameters.tools import FUNCTION_NAME, check_plain

#: More than OpenAI's limit: an agent with several MCP servers has hundreds of tools. Their schemas are bounded together, in grammars.py.
MAX_TOOLS = 1024
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_CHOICE_RULE = "an object whose type is 'auto', 'any', 'none', or 'tool' with the name of a tool"


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool as an engine receives it. One that is deferred is shown to the model once the conversation refers to it."""

    name: str
    form: dict[str, Any]
    deferred: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """The choice among the tools, in the form of chats."""

    form: Any
    #: The name of the tool that must be called.
    tool: str | None
    parallel: bool


def read_tools(name: str, value: Any) -> list[Tool]:
    """Return the tools. Fields that only help to use a tool, such as `cache_control` and `input_examples`, have no effect."""
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise wrong_type(name, f"a list of at most {MAX_TOOLS} tools")
    check_plain(name, value)
    return [_tool(f"{name}.{number}", tool) for number, tool in enumerate(value)]


def _tool(where: str, tool: Any) -> Tool:
    if not isinstance(tool, dict):
        raise wrong_type(where, "an object with a name and an 'input_schema'")
    given = without_nulls(tool)
    kind = given.get("type", "custom")
    if kind != "custom":
        shown = kind[:50] if isinstance(kind, str) else "unknown"
        raise unsupported(f"{where}.type", f"tools of the type '{shown}' are not offered, only those with an 'input_schema' of their own")
    tool_name = given.get("name")
    if not isinstance(tool_name, str) or not FUNCTION_NAME.fullmatch(tool_name):
        raise wrong_type(f"{where}.name", "a string of 1 to 256 characters without quotes and backslashes")
    function: dict[str, Any] = {"name": tool_name}
    if "description" in given:
        if not isinstance(given["description"], str):
            raise wrong_type(f"{where}.description", "a string")
        function["description"] = given["description"]
    check_schema(f"{where}.input_schema", given.get("input_schema"))
    function["parameters"] = given["input_schema"]
    if "strict" in given:
        function["strict"] = boolean(f"{where}.strict", given["strict"])
    deferred = "defer_loading" in given and boolean(f"{where}.defer_loading", given["defer_loading"])
    return Tool(tool_name, {"type": "function", "function": function}, deferred)


def read_tool_choice(name: str, value: Any) -> Choice:
    """Return the choice."""
    given = without_nulls(value) if isinstance(value, dict) else {}
    kind = given.get("type")
    parallel = not (
        "disable_parallel_tool_use" in given and boolean(f"{name}.disable_parallel_tool_use", given["disable_parallel_tool_use"])
    )
    if kind == "tool":
        tool = given.get("name")
        if not isinstance(tool, str):
            raise wrong_type(f"{name}.name", "the name of a tool")
        return Choice({"type": "function", "function": {"name": tool}}, tool, parallel)
    if not isinstance(kind, str) or kind not in _CHOICES:
        raise wrong_type(name, _CHOICE_RULE)
    return Choice(_CHOICES[kind], None, parallel)


def offered(tools: list[Tool], used: set[str], choice: Choice | None) -> list[dict[str, Any]]:
    """Return the tools that the model is shown: without those that are deferred and that nothing refers to."""
    wanted = choice.tool if choice is not None else None
    return [tool.form for tool in tools if not tool.deferred or tool.name in used or tool.name == wanted]
