"""The parts of a message that streams and answers in one piece have in common: ids, the stop reason, the usage."""

from typing import Any

import msgspec

from lmaas.protocols.chunks import Usage
from lmaas.protocols.parameters.messages import INVALID_ARGUMENTS

_PREFIX = "req_"
#: Anthropic's name of the tier that serves every message.
SERVICE_TIER = "standard"


def message_id(request_id: str) -> str:
    """Return the id of the message for a request."""
    return "msg_" + request_id.removeprefix(_PREFIX)


def tool_id(request_id: str, number: int) -> str:
    """Return the id of a message's tool call. A second attempt at the request gives the same ids."""
    return f"toolu_{request_id.removeprefix(_PREFIX)}{number:02d}"


def signature(request_id: str) -> str:
    """Return the signature of a block of thinking. Clients return it with the block, and it is not checked."""
    return "sig_" + request_id.removeprefix(_PREFIX)


def arguments_of(text: str) -> msgspec.Raw | dict[str, str]:
    """Return a tool call's arguments as the JSON of an object. Other text becomes the only string of one, as it is read back from an
    earlier call."""
    if not text.strip():
        return {}
    return msgspec.Raw(text.encode()) if is_object(text) else {INVALID_ARGUMENTS: text}


def is_object(text: str) -> bool:
    """Return whether the text is a JSON object."""
    try:
        msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


def stop_of(
    finish_reason: str | None, stop_reason: int | str | None, *, tokens: int, max_tokens: int, called: bool, cut: bool
) -> tuple[str, str | None]:
    """Return Anthropic's `stop_reason` and `stop_sequence` for the engine's reasons.

    `tokens` is the length of the answer, `called` is whether it has a tool call, `cut` is whether the last call's arguments are incomplete.
    """
    if finish_reason == "length":
        return ("max_tokens" if tokens >= max_tokens else "model_context_window_exceeded"), None
    if finish_reason == "content_filter":
        return "refusal", None
    # A stop string may have cut a call, which then must not run.
    if isinstance(stop_reason, str) and (cut or not called):
        return "stop_sequence", stop_reason
    return ("tool_use" if called else "end_turn"), None


def usage_of(usage: Usage) -> dict[str, Any]:
    """Return Anthropic's usage. The prompt is the sum of the tokens that were read from the cache and those that were not."""
    cached = min(usage.cached_tokens, usage.prompt_tokens)
    found: dict[str, Any] = {
        "input_tokens": usage.prompt_tokens - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.completion_tokens or 0,
    }
    if usage.reasoning_tokens is not None:
        found["output_tokens_details"] = {"thinking_tokens": usage.reasoning_tokens}
    return found
