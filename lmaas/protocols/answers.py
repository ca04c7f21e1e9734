"""Rewrites responses into forms that few clients use. These are parsed; all others are changed as bytes, in sse.py."""

import json
from typing import Any

from lmaas.protocols import sse
from lmaas.protocols.parameters.request import TextRequest

_DATA = b"data: "


def in_clients_form(answer: bytes, request: TextRequest) -> bytes:
    """Return a plain response in the form that the request names."""
    return _encoded(_changed(json.loads(answer), request))


def events_in_clients_form(events: bytes, request: TextRequest) -> bytes:
    """Return whole events of a stream in the form that the request names."""
    out = []
    for event in events.split(b"\n\n"):
        is_answer = event.startswith(_DATA) and event != sse.DONE
        out.append(_DATA + _encoded(_changed(json.loads(event.removeprefix(_DATA)), request)) if is_answer else event)
    return b"\n\n".join(out)


def _encoded(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _changed(answer: dict[str, Any], request: TextRequest) -> dict[str, Any]:
    if request.only_echo:
        _hide_generated(answer)
    if request.legacy_functions:
        for choice in answer.get("choices", ()):
            _to_function_call(choice)
    return answer


def _hide_generated(answer: dict[str, Any]) -> None:
    """Take the one token that vLLM generates for `max_tokens: 0` out of the usage: in OpenAI's form nothing was completed."""
    usage = answer.get("usage")
    if usage:
        usage["completion_tokens"] = 0
        usage["total_tokens"] = usage["prompt_tokens"]
    for choice in answer.get("choices", ()):
        if choice.get("token_ids"):
            choice["token_ids"] = []
        if choice.get("finish_reason"):
            choice["finish_reason"], choice["stop_reason"] = "length", None


def _to_function_call(choice: dict[str, Any]) -> None:
    """Replace tool calls by the deprecated `function_call`, of which a message has at most one."""
    part = choice.get("message") or choice.get("delta") or {}
    calls = part.pop("tool_calls", None)
    if calls and calls[0].get("index", 0) == 0:
        function = calls[0].get("function") or {}
        part["function_call"] = {name: function[name] for name in ("name", "arguments") if function.get(name) is not None}
    if choice.get("finish_reason") == "tool_calls":
        choice["finish_reason"] = "function_call"
