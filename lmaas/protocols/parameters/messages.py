"""The messages of a chat, as clients send them and as an engine receives them.

Every message that the service returned is accepted back, with whatever a client's library has added to it. Fields without a meaning here
are left out, and null means that a field was not given. Only what would give a different answer than the client expects is refused, such
as images for a model that reads text.
"""

import json
from collections.abc import Iterable
from typing import Any

from lmaas.errors import InvalidRequest
from lmaas.inference.schemas import MAX_DEPTH, depth
from lmaas.protocols.parameters.checks import wrong_type

MAX_MESSAGES = 2048
MAX_TOOL_CALLS = 128
#: The parts of all messages of a request together: a part may have a few bytes, and takes hundreds of them in memory while it waits.
MAX_PARTS = 10_000
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
#: The key under which an engine receives arguments of an earlier tool call that are not a JSON object.
INVALID_ARGUMENTS = "invalid_arguments"
#: Kinds of parts that are text, and the field that holds it.
TEXT_FIELDS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal", "thinking": "thinking"}
#: Fields that bring an image, a sound, a film or a file.
_MEDIA = frozenset(
    {"image_url", "image", "image_pil", "image_embeds", "input_image", "input_audio", "audio", "audio_url", "audio_embeds", "video"}
    | {"video_url", "video_embeds", "file", "file_id", "file_data", "file_url", "input_file", "prompt_embeds"}
)


def read_messages(name: str, value: Any) -> Any:
    """Return the messages for the engine."""
    if not isinstance(value, list):
        raise wrong_type(name, "a list of messages")
    if not value:
        raise InvalidRequest(f"'{name}' must have at least one message.", code="empty_prompt", param=name)
    if len(value) > MAX_MESSAGES:
        raise InvalidRequest(f"'{name}' has {len(value)} messages; at most {MAX_MESSAGES} are allowed.", code="out_of_range", param=name)
    check_parts(name, value, ("content", "tool_calls"))
    read: list[dict[str, Any]] = []
    call_id = "call_0"
    for index, message in enumerate(value):
        found = _message(f"{name}[{index}]", message, index)
        if message["role"] == "function":
            # The deprecated form of a tool's answer: it belongs to the call before it.
            found["tool_call_id"] = call_id
        elif found.get("tool_calls"):
            call_id = found["tool_calls"][0]["id"]
        read.append(found)
    return read


def check_parts(name: str, messages: Iterable[Any], fields: tuple[str, ...]) -> None:
    """Raise InvalidRequest if the lists in these fields of all messages have too many parts together."""
    count = 0
    for message in messages:
        if isinstance(message, dict):
            for field in fields:
                parts = message.get(field)
                if isinstance(parts, list):
                    count += len(parts)
    if count > MAX_PARTS:
        raise InvalidRequest(
            f"'{name}' has {count:,} parts and tool calls; at most {MAX_PARTS:,} are allowed in a request. Join texts to fewer parts.",
            code="out_of_range",
            param=name,
        )


def _message(where: str, message: Any, index: int) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str) or role not in ROLES:
        raise wrong_type(where, f"an object whose role is one of: {', '.join(ROLES)}")
    found: dict[str, Any] = {"role": "tool" if role == "function" else role, "content": None}
    for field in ("name", "tool_call_id", "reasoning", "reasoning_content"):
        text = message.get(field)
        if text is not None:
            if not isinstance(text, str):
                raise wrong_type(f"{where}.{field}", "a string")
            found[field] = text
    content = _content(f"{where}.content", message.get("content"))
    if role == "assistant":
        calls = _tool_calls(where, message, index)
        if calls:
            found["tool_calls"] = calls
        content = _assistant_content(where, message, content, has_calls=bool(calls))
    found["content"] = "" if content is None and "tool_calls" not in found else content
    return found


def _assistant_content(where: str, message: dict[str, Any], content: Any, *, has_calls: bool) -> Any:
    """Return the text of an earlier answer, which may be a refusal or stand in the transcript of a sound."""
    if content:
        return content
    refusal = message.get("refusal")
    if not isinstance(refusal, str | None):
        raise wrong_type(f"{where}.refusal", "a string")
    audio = message.get("audio")
    if refusal or audio is None or has_calls:
        return refusal or content
    transcript = audio.get("transcript") if isinstance(audio, dict) else None
    if not isinstance(transcript, str):
        # Without the words of this message, the conversation would be a different one.
        raise InvalidRequest(
            f"'{where}.audio' is not supported, because the models read text only. Send its transcript as the content.",
            code="unsupported_content",
            param=f"{where}.audio",
        )
    return transcript


def _content(where: str, content: Any) -> Any:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong_type(where, "a string or a list of text parts")
    parts = []
    for part in content:
        if part is None:
            continue
        text = part if isinstance(part, str) else part_text(where, part)
        if text is not None:
            parts.append({"type": "text", "text": text})
    return parts or ""


def part_text(where: str, part: Any) -> str | None:
    """Return the text of a part, None if it has none. What a client's library keeps beside it, such as `cache_control`, has no effect."""
    if not isinstance(part, dict):
        raise wrong_type(where, "a string or a list of text parts")
    kind = part.get("type") or ("text" if "text" in part else None)
    media = next((field for field in part if field in _MEDIA and part[field] is not None), None)
    if not isinstance(kind, str) or kind not in TEXT_FIELDS or media is not None:
        # Nothing is ever fetched for a tenant.
        shown = str(media or kind)[:50]
        raise InvalidRequest(
            f"'{where}' has a part of the kind '{shown}'. Only text is supported.", code="unsupported_content", param=where
        )
    text = part.get(TEXT_FIELDS[kind])
    if not isinstance(text, str | None):
        raise wrong_type(where, f"a list of parts whose '{TEXT_FIELDS[kind]}' is a string")
    return text


def _tool_calls(where: str, message: dict[str, Any], index: int) -> list[dict[str, Any]]:
    calls, legacy = message.get("tool_calls"), message.get("function_call")
    field = f"{where}.tool_calls"
    if not calls and legacy is not None:
        field = f"{where}.function_call"
        calls = [{"id": f"call_{index}", "type": "function", "function": legacy}]
    if calls is None:
        return []
    if not isinstance(calls, list) or len(calls) > MAX_TOOL_CALLS:
        raise wrong_type(field, f"a list of at most {MAX_TOOL_CALLS} tool calls")
    return [_tool_call(field, call, f"call_{index}_{number}") for number, call in enumerate(calls) if call is not None]


def _tool_call(where: str, call: Any, spare_id: str) -> dict[str, Any]:
    kind = (call.get("type") or "function") if isinstance(call, dict) else None
    function = call.get("function") if kind == "function" else None
    if kind == "custom" and isinstance(call.get("custom"), dict):
        # A call of a tool that takes any text, made by another service: to an engine, a function with one argument.
        function = {"name": call["custom"].get("name"), "arguments": {"input": call["custom"].get("input")}}
    call_id = call.get("id") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not isinstance(call_id, str | None):
        raise wrong_type(where, "a list of calls of functions, each with a name and arguments")
    arguments = arguments_text(where, function.get("arguments"))
    return {"id": call_id or spare_id, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def arguments_text(where: str, arguments: Any) -> str:
    """Return the arguments of an earlier tool call as the text of a JSON object.

    A model may have written arguments that are cut off or not JSON, and they stay in the conversation. An engine would show the model an
    empty object instead. To keep the meaning of the conversation, such text is wrapped: the model receives its own text as the only string
    of an object.
    """
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return "{}"
    if isinstance(arguments, dict | list):
        text = json.dumps(arguments, ensure_ascii=False) if depth(arguments) <= MAX_DEPTH else None
        if text is None:
            raise InvalidRequest(
                f"The arguments in '{where}' are nested more than {MAX_DEPTH} levels deep.", code="invalid_json", param=where
            )
        return text if isinstance(arguments, dict) else _wrapped(text)
    if not isinstance(arguments, str):
        raise wrong_type(where, "a list of calls of functions, each with its arguments as a JSON string")
    return arguments if _is_plain_object(arguments) else _wrapped(arguments)


def _wrapped(text: str) -> str:
    return json.dumps({INVALID_ARGUMENTS: text}, ensure_ascii=False)


def _is_plain_object(text: str) -> bool:
    """Return whether an engine can parse the text as an object, and a chat template can show it."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    if not isinstance(value, dict) or depth(value) > MAX_DEPTH:
        return False
    if "\\u" not in text:
        return True
    try:
        # A tokenizer cannot encode half a surrogate pair.
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
