"""The exception tree. Each class has its HTTP status, its OpenAI `type` and `code`, and whether a retry can succeed.

The bodies of error responses are in error_bodies.py.
"""

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import ClassVar


class LmaasError(Exception):
    """Base class of every expected error.

    `kind` is the label in metrics, `code` is for programs to test, `param` names the request field at fault, and `retry_after_s` becomes
    the header `Retry-After` (at most 120).
    """

    kind: ClassVar[str] = "internal"
    status: ClassVar[int] = HTTPStatus.INTERNAL_SERVER_ERROR
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.error_code = code or self.code
        self.param = param
        self.retry_after_s = min(retry_after_s, 120.0) if retry_after_s is not None else None

    def headers(self) -> dict[str, str]:
        """Return the response headers that state whether and when a client should retry."""
        headers = {"x-should-retry": "true" if self.retryable else "false"}
        if self.retryable and self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        return headers


class InternalError(LmaasError):
    """An unexpected error. The text is fixed; the details are in the log, with the request id."""

    def __init__(self) -> None:
        super().__init__("The server failed to process this request. Report the x-request-id of this response.")


class InvalidRequest(LmaasError):
    """The request is malformed, or needs something that the service does not offer."""

    kind, status, type, code = "invalid_request", HTTPStatus.BAD_REQUEST, "invalid_request_error", "invalid_request"


class UnsupportedMediaType(InvalidRequest):
    """The request body has an encoding that the service does not read."""

    kind, status, code = "unsupported_media_type", HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type"

    def headers(self) -> dict[str, str]:
        """Add the content encodings that the service reads (RFC 7694)."""
        return super().headers() | {"accept-encoding": "gzip, deflate, identity"}


class InvalidAdapter(InvalidRequest):
    """The uploaded adapter cannot be served. docs/reference/adapters.md lists the codes."""

    kind, code = "invalid_adapter", "invalid_adapter"


class Unauthenticated(LmaasError):
    """The request has no valid key. A missing, unknown or revoked key, and one of a deleted tenant, give the same error."""

    kind, status, type, code = "unauthenticated", HTTPStatus.UNAUTHORIZED, "invalid_request_error", "invalid_api_key"

    def __init__(self, message: str = "Incorrect API key provided. Send a valid key as 'Authorization: Bearer <key>'.") -> None:
        super().__init__(message)

    def headers(self) -> dict[str, str]:
        """Add the challenge that HTTP requires."""
        return super().headers() | {"www-authenticate": "Bearer"}


class Forbidden(LmaasError):
    """The key is valid, but its role does not allow this."""

    kind, status, type, code = "forbidden", HTTPStatus.FORBIDDEN, "invalid_request_error", "insufficient_permissions"


class NotFound(LmaasError):
    """The object does not exist, or it belongs to another tenant. Both must look the same."""

    kind, status, type, code = "not_found", HTTPStatus.NOT_FOUND, "invalid_request_error", "not_found"


class ModelNotFound(NotFound):
    """The tenant has no model of this name."""

    kind, code = "model_not_found", "model_not_found"

    def __init__(self, name: str) -> None:
        shown = name if len(name) <= 100 else name[:100] + "..."
        super().__init__(f"The model '{shown}' does not exist or you do not have access to it.", param="model")


class MethodNotAllowed(LmaasError):
    """The path does not support the request's method."""

    kind, status, type, code = "method_not_allowed", HTTPStatus.METHOD_NOT_ALLOWED, "invalid_request_error", "method_not_allowed"

    def __init__(self, allowed: str) -> None:
        """`allowed` are the path's methods, separated by commas."""
        super().__init__(f"This path does not support this method. It supports {allowed}.")
        self._allowed = allowed

    def headers(self) -> dict[str, str]:
        """Add the methods that the path supports."""
        return super().headers() | {"allow": self._allowed}


class Conflict(LmaasError):
    """The change conflicts with the current state."""

    kind, status, type, code = "conflict", HTTPStatus.CONFLICT, "invalid_request_error", "conflict"


class InProgress(LmaasError):
    """A request with the same idempotency key is still running."""

    kind, status, type, code, retryable = "in_progress", HTTPStatus.CONFLICT, "invalid_request_error", "idempotency_in_progress", True


class TooLarge(LmaasError):
    """The request has more bytes, or would create more objects, than allowed."""

    kind, status, type, code = "too_large", HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "invalid_request_error", "request_too_large"


class OverLimit(LmaasError):
    """The tenant or its key has reached a limit. `extra_headers` report the rest of each limit."""

    kind, status, type, code, retryable = "over_limit", HTTPStatus.TOO_MANY_REQUESTS, "rate_limit_error", "rate_limit_exceeded", True

    def __init__(
        self, message: str, *, code: str | None = None, retry_after_s: float | None = None, extra_headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message, code=code, retry_after_s=retry_after_s)
        self._extra_headers = dict(extra_headers or {})

    def headers(self) -> dict[str, str]:
        """Add the headers about limits."""
        return super().headers() | self._extra_headers


class OverQuota(OverLimit):
    """The tenant has used up a quota, or this request alone exceeds a limit. A retry cannot succeed soon."""

    kind, type, code, retryable = "over_quota", "insufficient_quota", "insufficient_quota", False


class Unavailable(LmaasError):
    """No capacity became available in time, or a part of the service cannot be reached."""

    kind, status, type, code, retryable = "unavailable", HTTPStatus.SERVICE_UNAVAILABLE, "server_error", "no_capacity", True


class SettingUp(Unavailable):
    """The service works, but `lmaas up` has not finished its setup. Only `/readyz` reports this; requests are served."""

    code = "setup_incomplete"

    def __init__(self) -> None:
        super().__init__("Setup has not finished: the manifests are not applied yet, or the credentials are not written.", retry_after_s=1)


class EngineFailed(LmaasError):
    """The engine died or sent a response that could not be read, and a retry was not possible or failed too."""

    kind, status, type, code, retryable = "engine_failed", HTTPStatus.BAD_GATEWAY, "server_error", "engine_failed", True


class RequestFailed(LmaasError):
    """The engine cannot process this one request. It continues to serve others."""

    kind, status, type, code = "request_failed", HTTPStatus.INTERNAL_SERVER_ERROR, "server_error", "request_failed"

    def __init__(self) -> None:
        super().__init__(
            "The engine failed on the content of this request, so it was not retried. Report the x-request-id of this response."
        )


class Quarantined(EngineFailed):
    """Two engines died while they processed this request, so it is not sent to a third one."""

    kind, retryable = "quarantined", False


class AdapterUnavailable(LmaasError):
    """The adapter could not be loaded. Only requests for this adapter fail."""

    kind, status, type, code, retryable = "adapter_unavailable", HTTPStatus.SERVICE_UNAVAILABLE, "server_error", "adapter_load_failed", True


class SettingsError(LmaasError):
    """A setting or an option is missing or wrong. Usually the process does not start.

    The message is for the person who runs the service. A client of a running service gets the text of InternalError instead, and the log
    has the message.
    """

    kind, code = "settings", "invalid_settings"


class ApiError(Exception):
    """A service that was called as a client refused the request.

    The message is the service's own; `status` is its HTTP status, `param` the field that is wrong.
    """

    def __init__(self, status: int, message: str, code: str, request_id: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.request_id, self.param = status, message, code, request_id, param
