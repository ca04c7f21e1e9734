"""HTTP as both the gateway and the tenant and operator API speak it: request ids, limits, errors in OpenAI's shape."""

import json
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmaas.errors import InternalError, InvalidRequest, LmaasError, MethodNotAllowed, NotFound, TooLarge
from lmaas.types import Principal

log = logging.getLogger(__name__)

#: Who holds the key of a request: raises Unauthenticated, or Unavailable if nobody can say.
Authenticate = Callable[[str | None], Awaitable[Principal]]

_HOST = re.compile(rb"[A-Za-z0-9._-]*(?::[0-9]*)?|\[[0-9A-Fa-f:.]+\](?::[0-9]*)?")
NOT_FOUND = "There is nothing at this address. The paths are listed in /openapi.json."


def new_request_id() -> str:
    """Made here, for every answer."""
    return f"req_{secrets.token_hex(12)}"


class JsonResponse(Response):
    """Compact JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """`content` as UTF-8 JSON."""
        return json.dumps(content, ensure_ascii=False, separators=(",", ":"), default=str).encode()


def error_response(error: LmaasError) -> JsonResponse:
    """The one place where an error becomes a response."""
    return JsonResponse(error.body(), status_code=int(error.status), headers=error.headers())


class Frame:
    """Pure ASGI middleware around everything: gives each request its id, and each failure its answer.

    A POST to a path in `direct` goes straight to that endpoint: routing costs as much as reading the request.
    """

    def __init__(self, app: ASGIApp, direct: Mapping[str, ASGIApp] | None = None) -> None:
        self._app, self._direct = app, direct or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Made here: a client's own X-Request-Id is never trusted, since the ledger counts by this one.
        request_id = new_request_id()
        scope["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            _check_address(scope)
            app = self._direct.get(scope["path"], self._app) if scope["method"] == "POST" else self._app
            await app(scope, receive, send_with_id)
        except LmaasError as error:
            await error_response(error)(scope, receive, send_with_id)
        except ClientDisconnect:
            pass  # it left while it was sending; there is nobody to answer
        except Exception:
            # The answer has been sent (`on_error`); what happened is written down here, once.
            log.exception("unexpected error", extra={"request_id": request_id, "action": scope["path"]})
            if not started:
                await error_response(InternalError())(scope, receive, send_with_id)


def _check_address(scope: Scope) -> None:
    """Raises InvalidRequest for a Host header that is no host, NotFound for an address that nothing can have."""
    for name, value in scope["headers"]:
        if name == b"host" and _HOST.fullmatch(value) is None:
            raise InvalidRequest("The Host header is not a host name.", code="invalid_host")
    if "\0" in scope["path"] or b"%00" in scope["query_string"]:
        raise NotFound(NOT_FOUND)


async def on_http_exception(_: Request, error: Exception) -> Response:
    """Starlette's own errors (no such route, no such method, bad form), in OpenAI's shape."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    detail = error.detail if isinstance(error, HTTPException) else ""
    if status == 404:
        return error_response(NotFound(NOT_FOUND))
    if status == 405:
        return error_response(MethodNotAllowed("This method is not allowed here."))
    return error_response(InvalidRequest(detail) if status < 500 else InternalError())


async def on_error(_: Request, error: Exception) -> Response:
    """Expected errors as they are; anything else, which the frame logs, with a fixed text."""
    return error_response(error if isinstance(error, LmaasError) else InternalError())


def limited(receive: Receive, scope: Scope, limit_bytes: int) -> Receive:
    """`receive`, raising TooLarge once more than `limit_bytes` of body have come (or were announced)."""
    headers = dict(scope["headers"])
    if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"", b"identity"):
        # A few bytes could become gigabytes.
        raise TooLarge("Compressed request bodies are not accepted.")
    announced = headers.get(b"content-length", b"")
    if announced.isdigit() and int(announced) > limit_bytes:
        raise _too_large(limit_bytes)
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit_bytes:
            raise _too_large(limit_bytes)
        return message

    return counted


def _too_large(limit_bytes: int) -> TooLarge:
    return TooLarge(f"The request body may have {limit_bytes} bytes at most.")


def parse_json(text: bytes) -> dict[str, Any]:
    """A JSON object, strictly: no duplicate keys, no NaN, no depth that breaks a parser. Raises InvalidRequest `invalid_json`."""

    try:
        value = _STRICT.decode(text.decode("utf-8"))
        if b"\\u" in text:
            _refuse_odd_characters(value)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        reason = "a number has too many digits" if "integer string conversion" in reason else reason
        raise InvalidRequest(f"The request body is not valid JSON: {reason}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise InvalidRequest("The request body must be a JSON object.", code="invalid_json")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has the same key twice")
    return found


#: Made once: making a decoder costs more than reading a short body.
_STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse)


def _refuse_odd_characters(value: Any) -> None:
    """Half a surrogate pair (a cut emoji) and NUL are no text for engines and databases. Raises ValueError."""
    try:
        plain = json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("a string holds half a surrogate pair") from None
    # A backslash that is itself escaped is just a backslash.
    if b"\\u0000" in plain.replace(b"\\\\", b""):
        raise ValueError("a string holds the character NUL")
