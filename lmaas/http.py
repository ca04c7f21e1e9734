"""The parts of HTTP that the gateway and the tenant and operator APIs share: request ids, keys, limits, and error responses."""

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmaas.compression import Unpacker
from lmaas.error_bodies import anthropic_body, anthropic_limit_headers, anthropic_status, openai_body
from lmaas.errors import InternalError, InvalidRequest, LmaasError, MethodNotAllowed, NotFound, SettingsError, TooLarge, Unauthenticated
from lmaas.observability import exposition
from lmaas.types import Principal

log = logging.getLogger(__name__)

#: Returns the principal of an API key. Raises Unauthenticated, or Unavailable while the key cannot be looked up.
Authenticate = Callable[[str | None], Awaitable[Principal]]

_HOST = re.compile(rb"[A-Za-z0-9._-]*(?::[0-9]*)?|\[[0-9A-Fa-f:.]+\](?::[0-9]*)?")
#: The slashes at the joint of a base URL that ends with one and a path that begins with one.
_JOINT = re.compile(r"/+((?:admin/)?v1/)?/*")
_KEY_HEADERS = frozenset({b"authorization", b"api-key", b"x-api-key"})
_MESSAGES = "/v1/messages"
#: The keys in the scope of a request for its principal, once that is known, and for the code of an error response.
PRINCIPAL, CODE = "lmaas.principal", "lmaas.code"
#: The key for the pattern of its path, if traces are on or the management API serves it.
ROUTE = "lmaas.route"
#: The longest part of a path that logs and traces show.
MAX_SHOWN_PATH = 200
#: Requests of load balancers and of Prometheus, which are logged and traced only if they fail.
QUIET = frozenset({"/health", "/healthz", "/readyz", "/metrics"})
#: Is called when a request has ended, with its scope, the status of its response (0 without one), and the seconds that it took.
Ended = Callable[[Scope, int, float], None]
NOT_FOUND = "Not found. The paths of this service are listed at /docs and in /openapi.json."


def new_request_id() -> str:
    """Return a new request id."""
    return f"req_{secrets.token_hex(12)}"


class JsonResponse(Response):
    """Compact JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Write `content` as UTF-8 JSON. Half a surrogate pair, which is not text, becomes a question mark."""
        return json.dumps(content, ensure_ascii=False, separators=(",", ":"), default=str).encode(errors="replace")


def metrics_response(registry: CollectorRegistry, request: Request) -> Response:
    """Return the metrics in the format that the client prefers."""
    text, content_type = exposition(registry, request.headers.get("accept", ""))
    return Response(text, media_type=content_type)


def error_response(error: LmaasError, scope: Scope) -> JsonResponse:
    """Return the response for an error of a request, in the shape of the client's protocol. The scope gets the error's code."""
    scope[CODE] = error.error_code
    if speaks_anthropic(scope):
        headers = error.headers()
        headers |= anthropic_limit_headers(headers, time.time())
        return JsonResponse(anthropic_body(error, scope["request_id"]), status_code=anthropic_status(error), headers=headers)
    return JsonResponse(openai_body(error), status_code=int(error.status), headers=error.headers())


def speaks_anthropic(scope: Scope) -> bool:
    """Return whether the client of this request speaks Anthropic's protocol: by the path, or the header that its clients send."""
    path: str = scope["path"]
    return path == _MESSAGES or path.startswith(_MESSAGES + "/") or any(name == b"anthropic-version" for name, _ in scope["headers"])


def log_settings_error(error: LmaasError, request_id: str, action: str) -> None:
    """Log an error of the service's settings with its message, which the client does not get. Other errors are the client's to read."""
    if isinstance(error, SettingsError):
        log.error("the settings do not work", extra={"request_id": request_id, "action": action, "detail": error.message})


def api_key(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """Return the API key of a request, from `Authorization: Bearer`, `api-key` (Azure) or `x-api-key` (Anthropic).

    An empty value and an `Authorization` of another scheme count as absent. Raises Unauthenticated if two headers have different keys.
    """
    found = b""
    for name, value in headers:
        if name in _KEY_HEADERS:
            key = value
            if name == b"authorization":
                scheme, _, key = value.partition(b" ")
                if scheme.lower() != b"bearer":
                    continue
            key = key.strip()
            if found and key and key != found:
                raise Unauthenticated("The request has two different API keys. Send one, as 'Authorization: Bearer <key>'.")
            found = key or found
    return found.decode("latin-1") or None


class Frame:
    """Pure ASGI middleware around everything: gives each request its id, and turns each failure into a response.

    A POST to a path in `direct` goes straight to that endpoint, because routing costs as much as reading the request. `ended` is called at
    the end of each request.
    """

    def __init__(self, app: ASGIApp, direct: Mapping[str, ASGIApp] | None = None, ended: Ended | None = None) -> None:
        self._app, self._direct, self._ended = app, direct or {}, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        # A client's own X-Request-Id is never used, because the ledger counts by this one.
        request_id = new_request_id()
        scope["request_id"] = request_id
        add_to_head = scope.get("lmaas.head")
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                took_ms = (time.perf_counter() - began) * 1000
                more = f"x-request-id: {request_id}\r\nopenai-processing-ms: {took_ms:.0f}\r\n"
                if scope["path"].startswith(_MESSAGES):
                    more += f"request-id: {request_id}\r\n"  # where Anthropic's SDKs look for it
                if add_to_head is not None:
                    add_to_head(more.encode())
                else:
                    lines = (line.split(": ", 1) for line in more.splitlines())
                    message["headers"] = [*message.get("headers", ()), *((name.encode(), value.encode()) for name, value in lines)]
            await send(message)

        try:
            _check_address(scope)
            await self._endpoint(scope)(scope, receive, send_with_id)
        except LmaasError as error:
            log_settings_error(error, request_id, scope["path"])
            await error_response(error, scope)(scope, receive, send_with_id)
        except ClientDisconnect:
            pass  # the client disconnected while it was sending its request
        except Exception:
            # The response has been sent (`on_error`). Unexpected errors are logged only here.
            log.exception("unexpected error", extra={"request_id": request_id, "action": scope["path"]})
            if not status:
                await error_response(InternalError(), scope)(scope, receive, send_with_id)
        finally:
            if self._ended is not None:
                self._ended(scope, status, time.perf_counter() - began)

    def _endpoint(self, scope: Scope) -> ASGIApp:
        """Return the endpoint for the request. Slashes at the path's end, and doubled ones after the base URL, are ignored."""
        is_post = scope["method"] == "POST"
        app = self._direct.get(scope["path"]) if is_post else None
        if app is None:
            path = scope["path"] = _JOINT.sub(lambda joint: "/" + (joint[1] or ""), scope["path"], count=1).rstrip("/") or "/"
            app = self._direct.get(path, self._app) if is_post else self._app
        return app


def _check_address(scope: Scope) -> None:
    """Raise InvalidRequest for a Host header that is not a host, NotFound for an address with a NUL."""
    for name, value in scope["headers"]:
        if name == b"host" and _HOST.fullmatch(value) is None:
            raise InvalidRequest("The Host header is not a valid host name.", code="invalid_host")
    if "\0" in scope["path"] or b"%00" in scope["query_string"]:
        raise NotFound(NOT_FOUND)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Return the response for one of Starlette's own errors (no such route, no such method)."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    detail = error.detail if isinstance(error, HTTPException) else ""
    if status == 404:
        return error_response(NotFound(NOT_FOUND), request.scope)
    if status == 405:
        allowed = (error.headers or {}).get("Allow", "") if isinstance(error, HTTPException) else ""
        return error_response(MethodNotAllowed(", ".join(sorted(filter(None, allowed.split(", "))))), request.scope)
    return error_response(InvalidRequest(detail) if status < 500 else InternalError(), request.scope)


async def on_error(request: Request, error: Exception) -> Response:
    """Return the response for an expected error, or a fixed text for any other, which the frame logs."""
    if not isinstance(error, LmaasError):
        return error_response(InternalError(), request.scope)
    log_settings_error(error, request.scope["request_id"], request.scope["path"])
    return error_response(error, request.scope)


def limited(receive: Receive, scope: Scope, limit_bytes: int) -> Receive:
    """Return a `receive` that unpacks a gzip or deflate body and raises TooLarge once the body exceeds `limit_bytes`, packed or unpacked.

    Raises TooLarge at once if the announced length exceeds the limit, and UnsupportedMediaType for another content encoding.
    """
    headers = dict(scope["headers"])
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

    if b"content-encoding" in headers:
        lines = b",".join(value for name, value in scope["headers"] if name == b"content-encoding")
        codings = [coding for each in lines.split(b",") if (coding := each.strip().lower()) not in (b"", b"identity")]
        if codings:
            return _unpacked(counted, Unpacker(b", ".join(codings)), limit_bytes)
    return counted


def _unpacked(receive: Receive, unpacker: Unpacker, limit_bytes: int) -> Receive:
    pieces: Iterator[bytes] = iter(())
    seen, ended = 0, False

    async def unpacked() -> Message:
        nonlocal pieces, seen, ended
        while (piece := next(pieces, None)) is None and not ended:
            message = await receive()
            if message["type"] == "http.disconnect":
                return message
            ended = not message.get("more_body", False)
            pieces = unpacker.feed(message.get("body", b""), last=ended)
        if piece is None:
            return {"type": "http.request", "body": b"", "more_body": False}
        seen += len(piece)
        if seen > limit_bytes:
            raise _too_large(limit_bytes)
        # Unpacking itself never yields to the event loop, so other requests run here.
        await asyncio.sleep(0)
        return {"type": "http.request", "body": piece, "more_body": True}

    return unpacked


def _too_large(limit_bytes: int) -> TooLarge:
    return TooLarge(f"The request body exceeds {limit_bytes} bytes, the maximum. Send a smaller one.")


def parse_json(text: bytes, *, texts: Collection[str] = ()) -> dict[str, Any]:
    """Parse a JSON object strictly: no duplicate keys, no NaN, no depth that breaks a parser.

    Strings must be Unicode text without NUL, which databases and grammars cannot hold. The strings below the top-level fields named in
    `texts` are for a model: they may have NUL, and half a surrogate pair (a cut emoji) in them becomes U+FFFD. Raises InvalidRequest
    `invalid_json`, or `invalid_string` with the place of the string.
    """
    return checked_strings(parse_object(text), text, texts)


def parse_object(text: bytes, what: str = "request body") -> dict[str, Any]:
    """Parse a JSON object as `parse_json` does, without a look at its strings. `what` it is begins an error's message."""
    try:
        value = _STRICT.decode(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        reason = "a number has too many digits" if "integer string conversion" in reason else reason
        raise InvalidRequest(f"The {what} is not valid JSON: {reason}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"The {what} must be a JSON object.", code="invalid_json")
    return value


def checked_strings(value: dict[str, Any], text: bytes, texts: Collection[str], what: str = "request body") -> dict[str, Any]:
    """Return an object with its strings as `parse_json` allows them. `text` is the JSON that has the object."""
    if not _ODD_ESCAPE.search(text):
        return value
    try:
        return {_checked(name, name): _mended(item) if name in texts else _checked(name, item) for name, item in value.items()}
    except RecursionError:
        raise InvalidRequest(f"The {what} is not valid JSON: it is nested too deeply.", code="invalid_json") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has the same key twice")
    return found


#: Created once, because creating a decoder costs more than parsing a short body.
_STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse)


#: An escape that may be NUL or half a surrogate pair. A whole pair and an escaped backslash match as well, and are checked afterwards.
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
    """Return the value. Raises InvalidRequest if it has a string that is not valid Unicode text, or that contains NUL."""
    if isinstance(value, str):
        half = _HALF_PAIR.search(value)
        if half or "\0" in value:
            shown = _HALF_PAIR.sub("\ufffd", where).replace("\0", "\ufffd")[:100]
            what = "half a surrogate pair, which is not a character" if half else "the character NUL"
            raise InvalidRequest(f"'{shown}' contains {what}. Remove it.", code="invalid_string", param=shown)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _checked(f"{where}[{index}]", item)
    elif isinstance(value, dict):
        for key, item in value.items():
            _checked(f"{where}.{key}", key)
            _checked(f"{where}.{key}", item)
    return value
