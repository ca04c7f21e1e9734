"""The items of an input or an output: read from clients, translated to the messages of the engine's chat endpoint, and named.

Every item that the service returned is accepted back, with whatever a client's library has added to it. Null means that a field was not
given. An item that only another service can have made, such as the call of a web search, is refused, because the conversation would be a
different one without it.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from lmaas.errors import InvalidRequest
from lmaas.protocols.parameters.checks import out_of_range, wrong_type
from lmaas.protocols.parameters.messages import arguments_text, check_parts, part_text
from lmaas.protocols.responses.state import Item
from lmaas.protocols.responses.tools import engine_name

MAX_ITEMS = 2048
#: The most bytes of a response's input that is stored, and those that its id adds to an item.
MAX_INPUT_BYTES = 8 * 1024 * 1024
ITEM_BYTES = 64
ROLES = ("user", "assistant", "system", "developer")
#: The first part of the ids of each kind of item.
PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}
_STATES = ("in_progress", "completed", "incomplete")
_MAX_ID = 256
#: The number of the first input item in the ids of a response's items. Those of the output begin at 0.
_FIRST_INPUT = 0x8000


def read_items(name: str, value: Any) -> list[Item]:
    """Return a client's input as items in their full form. They may be `item_reference`s.

    A string is a message of the user. Raises InvalidRequest with the place of the item that is wrong.
    """
    if isinstance(value, str):
        return [_message("user", [{"type": "input_text", "text": value}], None)]
    if not isinstance(value, list):
        raise wrong_type(name, "a string or a list of items")
    if len(value) > MAX_ITEMS:
        raise out_of_range(name, f"a list of at most {MAX_ITEMS} items")
    check_parts(name, value, ("content", "output", "summary"))
    return [_read_item(f"{name}[{index}]", item) for index, item in enumerate(value)]


def _read_item(where: str, item: Any) -> Item:
    if not isinstance(item, dict):
        raise wrong_type(where, "an object")
    kind = item.get("type")
    if kind is None:
        # Both types are optional.
        kind = "message" if item.get("role") is not None else "item_reference"
    read = _READERS.get(kind) if isinstance(kind, str) else None
    if read is None:
        raise InvalidRequest(
            f"'{where}' is of the type '{str(kind)[:50]}', which is not supported. Supported are {', '.join(_READERS)}.",
            code="unsupported_content",
            param=f"{where}.type",
        )
    found = read(where, item)
    item_id = item.get("id")
    if isinstance(item_id, str) and 0 < len(item_id) <= _MAX_ID:
        found["id"] = item_id
    return found


def _message(role: str, content: list[dict[str, Any]], status: Any) -> Item:
    return {"type": "message", "role": role, "status": _state(status), "content": content}


def _state(status: Any) -> str:
    return status if status in _STATES else "completed"


def _read_message(where: str, item: Item) -> Item:
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise wrong_type(f"{where}.role", f"one of: {', '.join(ROLES)}")
    found = _message(role, _parts(f"{where}.content", content, role), item.get("status"))
    if item.get("phase") in ("commentary", "final_answer"):
        found["phase"] = item["phase"]
    return found


def _parts(where: str, content: Any, role: str) -> list[dict[str, Any]]:
    """Return the parts of a message. A refusal stays one, everything else is text."""
    if isinstance(content, str):
        return [_text(role, content)]
    if content is None:
        return []
    if not isinstance(content, list):
        raise wrong_type(where, "a string or a list of text parts")
    found = []
    for part in content:
        if part is None:
            continue
        text = part if isinstance(part, str) else part_text(where, part)
        if text is None:
            continue
        is_refusal = role == "assistant" and isinstance(part, dict) and part.get("type") == "refusal"
        found.append({"type": "refusal", "refusal": text} if is_refusal else _text(role, text))
    return found


def _text(role: str, text: str) -> dict[str, Any]:
    if role == "assistant":
        return {"type": "output_text", "text": text, "annotations": []}
    return {"type": "input_text", "text": text}


def _string(where: str, item: Item, field: str) -> str:
    value = item.get(field)
    if not isinstance(value, str):
        raise wrong_type(f"{where}.{field}", "a string")
    return value


def _names(where: str, item: Item) -> Item:
    """Read the name of a call's tool, and its namespace if it is in one."""
    found = {"name": _string(where, item, "name")}
    return found if item.get("namespace") is None else found | {"namespace": _string(where, item, "namespace")}


def _read_function_call(where: str, item: Item) -> Item:
    arguments = item.get("arguments")
    if not isinstance(arguments, str):
        arguments = arguments_text(f"{where}.arguments", arguments)
    return {
        "type": "function_call",
        "call_id": _string(where, item, "call_id"),
        **_names(where, item),
        "arguments": arguments,
        "status": _state(item.get("status")),
    }


def _read_custom_call(where: str, item: Item) -> Item:
    return {
        "type": "custom_tool_call",
        "call_id": _string(where, item, "call_id"),
        **_names(where, item),
        "input": _string(where, item, "input"),
        "status": _state(item.get("status")),
    }


def _read_output(where: str, item: Item) -> Item:
    """Read what a tool returned: a string or a list of text parts."""
    output = item.get("output")
    if output is None:
        output = ""
    elif not isinstance(output, str):
        output = _parts(f"{where}.output", output, "user")
    return {
        "type": item["type"],
        "call_id": _string(where, item, "call_id"),
        "output": output,
        "status": _state(item.get("status")),
    }


def _read_reasoning(where: str, item: Item) -> Item:
    found: Item = {"type": "reasoning"}
    for field, kind in (("summary", "summary_text"), ("content", "reasoning_text")):
        parts = item.get(field)
        if not isinstance(parts, list | None):
            raise wrong_type(f"{where}.{field}", "a list of texts")
        texts = [part.get("text") if isinstance(part, dict) else part for part in parts or () if part is not None]
        if not all(isinstance(text, str) for text in texts):
            raise wrong_type(f"{where}.{field}", "a list of objects whose 'text' is a string")
        found[field] = [{"type": kind, "text": text} for text in texts]
    return found | {"encrypted_content": None, "status": _state(item.get("status"))}


def _read_reference(where: str, item: Item) -> Item:
    item_id = _string(where, item, "id")
    if not 0 < len(item_id) <= _MAX_ID:
        raise out_of_range(f"{where}.id", f"the id of an item, of at most {_MAX_ID} characters")
    return {"type": "item_reference", "id": item_id}


_READERS: dict[str, Callable[[str, Item], Item]] = {
    "message": _read_message,
    "function_call": _read_function_call,
    "function_call_output": _read_output,
    "custom_tool_call": _read_custom_call,
    "custom_tool_call_output": _read_output,
    "reasoning": _read_reasoning,
    "item_reference": _read_reference,
}


def messages_of(instructions: str | None, items: Iterable[Item]) -> list[dict[str, Any]]:
    """Return the messages that the engine receives for items, without references.

    What the model produced in one turn becomes one message: its reasoning, its text and its calls.
    """
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    #: The message of the assistant that the next item may belong to.
    turn: dict[str, Any] | None = None
    for item in items:
        kind = item["type"]
        if kind == "message" and item["role"] != "assistant":
            turn = None
            messages.append({"role": item["role"], "content": _content(item["content"])})
        elif kind in ("function_call_output", "custom_tool_call_output"):
            turn = None
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": _content(item["output"])})
        else:
            turn = _extended(messages, turn, item)
    for message in messages:
        if message["content"] is None and "tool_calls" not in message:
            message["content"] = ""
    return messages


def _extended(messages: list[dict[str, Any]], turn: dict[str, Any] | None, item: Item) -> dict[str, Any] | None:
    """Add what the model produced to its turn, or begin a new one. Returns the turn."""
    kind = item["type"]
    if kind == "reasoning":
        text = "".join(part["text"] for part in item["content"])
        if not text:
            return turn
        if turn is None or turn["content"] is not None or "tool_calls" in turn:
            turn = _begun(messages)
        turn["reasoning"] = turn.get("reasoning", "") + text
        return turn
    if kind == "message":
        if turn is None or turn["content"] is not None:
            turn = _begun(messages)
        turn["content"] = _content(item["content"])
        return turn
    if turn is None:
        turn = _begun(messages)
    arguments = json.dumps({"input": item["input"]}, ensure_ascii=False) if kind == "custom_tool_call" else item["arguments"]
    name = engine_name(item["name"], item.get("namespace"))
    function = {"name": name, "arguments": arguments_text("arguments", arguments)}
    turn.setdefault("tool_calls", []).append({"id": item["call_id"], "type": "function", "function": function})
    return turn


def _begun(messages: list[dict[str, Any]]) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": "assistant", "content": None}
    messages.append(turn)
    return turn


def _content(parts: str | list[dict[str, Any]]) -> Any:
    """Return the content of a message: a string where there is one part, as chat templates like it best."""
    if isinstance(parts, str):
        return parts
    texts = [part["refusal"] if part["type"] == "refusal" else part["text"] for part in parts]
    if len(texts) == 1:
        return texts[0]
    return [{"type": "text", "text": text} for text in texts] or ""


def parts_of(items: Iterable[Item]) -> int:
    """Return the number of items and of their parts, which is what translating them costs."""
    return sum(1 + sum(len(value) for value in item.values() if isinstance(value, list)) for item in items)


def check_storable(items: Sequence[Item]) -> None:
    """Raise InvalidRequest if these are too many bytes to be stored as the input of a response. Stored items have more than was sent."""
    size = len(msgspec.json.encode(items)) + ITEM_BYTES * len(items)
    if size > MAX_INPUT_BYTES:
        raise InvalidRequest(
            f"The input has {size:,} bytes in the form in which it is stored, with each text as an object, and at most {MAX_INPUT_BYTES:,} "
            "can be stored. Send 'store: false', or less.",
            code="input_too_large",
            param="input",
        )


def item_id(kind: str, response_id: str, number: int) -> str:
    """Return the id of an item of a response, from which `response_of` finds the response."""
    return f"{PREFIXES[kind]}_{response_id.removeprefix('resp_')}{number:04x}"


def response_of(item: str) -> str:
    """Return the id of the response to which an item belongs, if it belongs to one."""
    return f"resp_{item.partition('_')[2][:-4]}"


def named(items: Iterable[Item], response_id: str) -> list[Item]:
    """Return the items of a response's input with ids of their own, which no other item of the tenant has."""
    return [{"id": item_id(item["type"], response_id, _FIRST_INPUT + number)} | _without_id(item) for number, item in enumerate(items)]


def _without_id(item: Item) -> Item:
    return {name: value for name, value in item.items() if name != "id"}
