"""The bodies of error responses, by the protocol of the client."""

from typing import Any

from lmaas.errors import InternalError, LmaasError, SettingsError

#: Anthropic's error types by HTTP status. Others are `invalid_request_error` below 500, and `api_error` from 500 on.
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def _shown(error: LmaasError) -> LmaasError:
    """Return the error whose text a client may see. An error of the settings may name logins, addresses and folders."""
    return InternalError() if isinstance(error, SettingsError) else error


def openai_body(error: LmaasError) -> dict[str, Any]:
    """Return OpenAI's error object: `{"error": {"message", "type", "param", "code"}}`."""
    shown = _shown(error)
    return {"error": {"message": shown.message, "type": shown.type, "param": shown.param, "code": shown.error_code}}


def anthropic_type(error: LmaasError) -> str:
    """Return Anthropic's type of an error."""
    status = int(error.status)
    return _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")


def anthropic_status(error: LmaasError) -> int:
    """Return the HTTP status that Anthropic's clients expect for an error: 529 for a service without capacity, 500 for a failed engine."""
    return {503: 529, 502: 500}.get(int(error.status), int(error.status))


def anthropic_body(error: LmaasError, request_id: str) -> dict[str, Any]:
    """Return Anthropic's error object: `{"type": "error", "error": {"type", "message"}, "request_id"}`.

    `code` and `param`, which Anthropic's errors lack, are added to the inner object: its clients ignore fields that they do not know.
    """
    shown = _shown(error)
    inner = {"type": anthropic_type(error), "message": shown.message, "code": shown.error_code, "param": shown.param}
    return {"type": "error", "error": inner, "request_id": request_id}
