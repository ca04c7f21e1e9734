"""Forwards `/console` to the console's process, so that its pages have the origin of the API."""

from collections.abc import AsyncIterator

import aiohttp
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from yarl import URL

from lmaas.errors import NotFound, Unavailable

PATH = "/console"
METHODS = ("GET", "HEAD", "POST")
MAX_CONNECTIONS = 100
CONNECT_S = 3.0
#: Time for which the console may be silent. Its live parts send something more often.
SILENT_S = 300.0
CHUNK_BYTES = 64 * 1024
#: Headers about one connection, and not about the request or the response (RFC 9110). This server has handled `expect`.
_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding", "upgrade", "expect"}
)
#: Headers that this server adds itself.
_OWN = frozenset({"date", "server", "x-request-id", "openai-processing-ms"})


class ConsoleForwarding:
    """Forwards requests and their answers as streams. Use as a context manager."""

    def __init__(self, url: str | None) -> None:
        self._url = None if url is None else url.removesuffix("/")
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "ConsoleForwarding":
        if self._url is not None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENT_S)
            connector = aiohttp.TCPConnector(limit=MAX_CONNECTIONS)
            self._session = aiohttp.ClientSession(
                timeout=timeout, connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
            )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        return [Route(path, self._forward, methods=METHODS) for path in (PATH, PATH + "/{path:path}")]

    async def _forward(self, request: Request) -> Response:
        """Raises NotFound if there is no console, and Unavailable if it does not respond."""
        if self._session is None:
            raise NotFound("This service has no console. Set LMAAS_CONSOLE_URL to the address of one, which `lmaas console` runs.")
        query = request.scope["query_string"].decode("latin-1")
        # Encoded by the client, except for slashes at its end, which the gateway ignores everywhere.
        path = request.scope.get("raw_path", request.url.path.encode()).decode("latin-1").partition("?")[0].rstrip("/")
        has_body = "content-length" in request.headers or "transfer-encoding" in request.headers
        try:
            response = await self._session.request(
                request.method,
                URL(f"{self._url}{path}" + (f"?{query}" if query else ""), encoded=True),
                headers=[*_passed(request), ("x-forwarded-proto", _scheme(request))],
                data=_body(request) if has_body else None,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, TimeoutError) as error:
            if isinstance(error.__cause__, ClientDisconnect) or isinstance(error.__context__, ClientDisconnect):
                raise ClientDisconnect from error
            raise Unavailable("The console does not respond. Retry after 2 s.", code="console_unavailable", retry_after_s=2) from error
        forwarded = StreamingResponse(_content(response), response.status)
        forwarded.raw_headers = [
            (name.lower(), value) for name, value in response.raw_headers if name.decode("latin-1").lower() not in _HOP_BY_HOP | _OWN
        ]
        return forwarded


def _scheme(request: Request) -> str:
    return request.headers.get("x-forwarded-proto", request.url.scheme)


def _passed(request: Request) -> list[tuple[str, str]]:
    named = request.headers.get("connection", "")
    dropped = _HOP_BY_HOP | {name.strip().lower() for name in named.split(",")} | {"content-length", "x-forwarded-proto"}
    kept = [(name, value) for name, value in request.headers.items() if name not in dropped]
    length = request.headers.get("content-length")
    return kept if length is None else [*kept, ("content-length", length)]


async def _body(request: Request) -> AsyncIterator[bytes]:
    async for chunk in request.stream():
        if chunk:
            yield chunk


async def _content(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    try:
        async for chunk in response.content.iter_any():
            yield chunk
    finally:
        response.close()
