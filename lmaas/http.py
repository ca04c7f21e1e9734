"""HTTP as both the gateway and the tenant and operator API speak it: request ids, limits, errors in OpenAI's shape."""

import json
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping
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


def parse_json(text: bytes, *, texts: Collection[str] = ()) -> dict[str, Any]:
    """Parse a JSON object strictly: no duplicate keys, no NaN, no depth that breaks a parser.

    Strings must be Unicode text without NUL, which databases and grammars cannot hold. The strings below the top-level fields named in
    `texts` are for a model: they may have NUL, and half a surrogate pair (a cut emoji) in them becomes U+FFFD. Raises InvalidRequest
    `invalid_json`, or `invalid_string` with the place of the string.
    """
    try:
        value = _STRICT.decode(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        reason = "a number has too many digits" if "integer string conversion" in reason else reason
        raise InvalidRequest(f"The request body is not valid JSON: {reason}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise InvalidRequest("The request body must be a JSON object.", code="invalid_json")
    if _ODD_ESCAPE.search(text):
        try:
            return {_checked(name, name): _mended(item) if name in texts else _checked(name, item) for name, item in value.items()}
        except RecursionError:
            raise InvalidRequest("The request body is not valid JSON: it is nested too deeply.", code="invalid_json") from None
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has the same key twice")
    return found


#: Made once, because making a decoder costs more than parsing a short body.
_STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse)


#: An escape that can be NUL or half a surrogate pair. A whole pair and an escaped backslash match as well, and are looked at closely.
_ODD_ESCAPE = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")
_HALF_PAIR = re.compile("[\ud800-\udfff]")


def _mended(value: Any) -> Any:
    """Return the value with U+FFFD for each half of a surrogate pair."""
    if isinstance(value, str):
        return _HALF_PAIR.sub("\ufffd", value)
    if isinstance(value, list):
        return [_mended(item) for item in value]
    if isinstance(value, dict):
        return {_mended(key): _mended(item) for key, item in value.items()}
    return value


def _checked(where: str, value: Any) -> Any:
    """Return the value. Raises InvalidRequest if it has a string that is no text, or that holds NUL."""
    if isinstance(value, str):
        half = _HALF_PAIR.search(value)
        if half or "\0" in value:
            shown = _HALF_PAIR.sub("\ufffd", where).replace("\0", "\ufffd")[:100]
            what = "half a surrogate pair, which is no character" if half else "the character NUL"
            raise InvalidRequest(f"'{shown}' has a string with {what}. Remove it.", code="invalid_string", param=shown)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _checked(f"{where}[{index}]", item)
    elif isinstance(value, dict):
        for key, item in value.items():
            _checked(f"{where}.{key}", key)
            _checked(f"{where}.{key}", item)
    return value
