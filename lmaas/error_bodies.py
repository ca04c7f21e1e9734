"""The bodies and headers of error responses, by the protocol of the client."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from lmaas.errors import InternalError, LmaasError, SettingsError

#: Anthropic's status for each of ours that it does not use: an engine that failed, and a service without capacity.
_ANTHROPIC_STATUSES = {502: 500, 503: 529}
#: Anthropic's error types by its status. Others are `invalid_request_error` below 500, and `api_error` from 500 on.
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
#: The counts in the message of a prompt that is too long.
_CONTEXT = re.compile(r"maximum context length is (\d+) tokens\..*?((?:at least )?\d+)(?: input)? tokens", re.DOTALL)


def _shown(error: LmaasError) -> LmaasError:
    """Return the error whose text a client may see. An error of the settings may name logins, addresses and folders."""
    return InternalError() if isinstance(error, SettingsError) else error


def openai_body(error: LmaasError) -> dict[str, Any]:
    """Return OpenAI's error object: `{"error": {"message", "type", "param", "code"}}`."""
    shown = _shown(error)
    return {"error": {"message": shown.message, "type": shown.type, "param": shown.param, "code": shown.error_code}}


def anthropic_status(error: LmaasError) -> int:
    """Return the HTTP status of an error for Anthropic's clients."""
    status = int(_shown(error).status)
    return _ANTHROPIC_STATUSES.get(status, status)


def anthropic_type(error: LmaasError) -> str:
    """Return Anthropic's type of an error."""
    status = anthropic_status(error)
    return _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")


def anthropic_message(error: LmaasError) -> str:
    """Return the message of an error in Anthropic's form, which begins with the field that is wrong: `messages.0.content: …`.

    A prompt that is too long has Anthropic's words, by which Claude Code recognises that it must shorten the conversation.
    """
    if error.error_code == "context_length_exceeded":
        found = _CONTEXT.search(error.message)
        counts = f": {found[2]} tokens > {found[1]} maximum" if found else ""
        return f"prompt is too long{counts}. {error.message}"
    if error.param is None:
        return error.message
    named = f"'{error.param}' "
    return f"{error.param}: {error.message.removeprefix(named)}"


def anthropic_body(error: LmaasError, request_id: str) -> dict[str, Any]:
    """Return Anthropic's error object: `{"type": "error", "error": {"type", "message", "details"}, "request_id"}`.

    `code` and `param`, which Anthropic's errors lack, are added to the inner object: its clients ignore fields that they do not know.
    """
    shown = _shown(error)
    inner = {
        "type": anthropic_type(error),
        "message": anthropic_message(shown),
        "code": shown.error_code,
        "param": shown.param,
        "details": {"error_code": shown.error_code},
    }
    return {"type": "error", "error": inner, "request_id": request_id}


def anthropic_limit_headers(headers: Mapping[str, str], now_s: float) -> dict[str, str]:
    """Return Anthropic's `anthropic-ratelimit-*` headers for OpenAI's. `now_s` is in seconds since 1970."""
    found = {}
    for name in ("requests", "tokens"):
        if f"x-ratelimit-limit-{name}" in headers:
            reset_s = float(headers[f"x-ratelimit-reset-{name}"].removesuffix("s"))
            found[f"anthropic-ratelimit-{name}-limit"] = headers[f"x-ratelimit-limit-{name}"]
            found[f"anthropic-ratelimit-{name}-remaining"] = headers[f"x-ratelimit-remaining-{name}"]
            found[f"anthropic-ratelimit-{name}-reset"] = datetime.fromtimestamp(now_s + reset_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return found
