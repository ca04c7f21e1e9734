"""The messages of a request, as clients send them and as an engine receives them.

Every message that the service returned is accepted back. Fields without a meaning here, such as `cache_control`, have no effect.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lmaas.errors import InvalidRequest
from lmaas.protocols.messages.blocks import joined, not_supported, read_blocks, string, system_text, text_of
from lmaas.protocols.parameters.checks import boolean, wrong_type
from lmaas.protocols.parameters.messages import arguments_text

MAX_MESSAGES = 10_000
_ROLES = ("user", "assistant", "system")
#: Put before the result of a tool that has failed, because a chat's messages have no field for that.
_FAILED = "Error: "


@dataclass(slots=True)
class Conversation:
    """A conversation that has been read."""

    #: For the engine.
    messages: list[dict[str, Any]] = field(default_factory=list)
    #: The system messages before the first other message.
    system: list[str] = field(default_factory=list)
    #: Later ones, which become part of the next user message.
    reminders: list[str] = field(default_factory=list)
    #: The last message is an assistant's, whose text the answer continues.
    prefilled: bool = False
    #: The names of tools that the conversation uses or refers to.
    tools: set[str] = field(default_factory=set)


def read_conversation(name: str, value: Any) -> Conversation:
    """Return the messages for the engine. Messages of the same role that follow each other are one."""
    if not isinstance(value, list):
        raise wrong_type(name, "a list of messages")
    if not value:
        raise InvalidRequest(f"'{name}' must have at least one message.", code="empty_prompt", param=name)
    if len(value) > MAX_MESSAGES:
        raise InvalidRequest(f"'{name}' has {len(value)} messages; at most {MAX_MESSAGES} are allowed.", code="out_of_range", param=name)
    found = Conversation()
    for number, message in enumerate(value):
        where = f"{name}.{number}"
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in _ROLES:
            raise wrong_type(where, f"an object whose role is one of: {', '.join(_ROLES)}")
        _READERS[role](found, f"{where}.content", read_blocks(f"{where}.content", message.get("content")))
    _remind(found)
    if not found.messages:
        raise InvalidRequest(f"'{name}' must have a message of the user.", code="empty_prompt", param=name)
    for message in found.messages:
        _join(message)
    last = found.messages[-1]
    if last["role"] == "assistant":
        if not (last["content"] or "").strip() or "tool_calls" in last:
            raise InvalidRequest(
                f"'{name}' ends with an assistant message that has no text to be continued. End it with a user message.",
                param=f"{name}.{len(value) - 1}",
            )
        found.prefilled = True
    return found


def _add(found: Conversation, role: str, texts: list[str]) -> dict[str, Any]:
    """Add texts to the last message if it has the role, otherwise add a message. `_join` makes one text of them."""
    last = found.messages[-1] if found.messages else None
    if last is None or last["role"] != role:
        last = {"role": role, "content": []}
        found.messages.append(last)
    last["content"] += texts
    return last


def _join(message: dict[str, Any]) -> None:
    """Give a message the content that an engine takes."""
    if message["role"] == "user":
        message["content"] = joined(message["content"])
    elif message["role"] == "assistant":
        message["content"] = "".join(message["content"]) or (None if "tool_calls" in message else "")
        if "reasoning" in message:
            message["reasoning"] = "".join(message["reasoning"])


def _read_user(found: Conversation, where: str, blocks: list[dict[str, Any]]) -> None:
    texts, results = [], 0
    for number, block in enumerate(blocks):
        place = f"{where}.{number}"
        if block["type"] == "tool_result":
            # Results stand directly after the calls, whatever their place among the blocks.
            found.messages.append(_result(found, place, block))
            results += 1
        else:
            texts.append(text_of(place, block))
    _remind(found)
    if any(texts) or not results:
        _add(found, "user", texts)


def _remind(found: Conversation) -> None:
    """Add the waiting system messages to the conversation. Not as such: many chat templates refuse them after the beginning."""
    for text in found.reminders:
        _add(found, "user", [f"<system-reminder>\n{text}\n</system-reminder>"])
    found.reminders.clear()


def _result(found: Conversation, where: str, block: dict[str, Any]) -> dict[str, Any]:
    """Return the message with a tool's result."""
    texts = []
    for number, part in enumerate(read_blocks(f"{where}.content", block.get("content"))):
        place = f"{where}.content.{number}"
        if part["type"] == "tool_reference":
            tool = string(place, part, "tool_name")
            found.tools.add(tool)
            texts.append(f"The tool '{tool}' is available.")
        else:
            texts.append(text_of(place, part))
    text = joined(texts)
    failed = block.get("is_error")
    if failed is not None and boolean(f"{where}.is_error", failed) and text[:5].lower() != "error":
        text = _FAILED + text
    return {"role": "tool", "tool_call_id": string(where, block, "tool_use_id"), "content": text}


def _read_assistant(found: Conversation, where: str, blocks: list[dict[str, Any]]) -> None:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for number, block in enumerate(blocks):
        place, kind = f"{where}.{number}", block["type"]
        if kind == "text":
            texts.append(string(place, block, "text"))
        elif kind == "thinking":
            thoughts.append(string(place, block, "thinking"))
        elif kind == "tool_use":
            calls.append(_call(found, place, block))
        elif kind != "redacted_thinking":  # its content is for its author only
            raise not_supported(place, block)
    _remind(found)
    message = _add(found, "assistant", texts)
    if any(thoughts):
        message.setdefault("reasoning", []).extend(thoughts)
    if calls:
        message.setdefault("tool_calls", []).extend(calls)


def _call(found: Conversation, where: str, block: dict[str, Any]) -> dict[str, Any]:
    arguments, tool = block.get("input"), string(where, block, "name")
    if not isinstance(arguments, dict | None):
        raise wrong_type(f"{where}.input", "an object")
    found.tools.add(tool)
    text = arguments_text(f"{where}.input", arguments)
    return {"id": string(where, block, "id"), "type": "function", "function": {"name": tool, "arguments": text}}


def _read_system(found: Conversation, where: str, blocks: list[dict[str, Any]]) -> None:
    text = system_text(where, blocks)
    if text:
        (found.reminders if found.messages else found.system).append(text)


_READERS: dict[str, Callable[[Conversation, str, list[dict[str, Any]]], None]] = {
    "user": _read_user,
    "assistant": _read_assistant,
    "system": _read_system,
}
