"""The gateway's HTTP server: uvicorn with limits that its fast parser does not have."""

import asyncio
import functools
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from lmaas.config import Settings
from lmaas.errors import InvalidRequest, LmaasError
from lmaas.http import Ended, error_response, new_request_id
from lmaas.web.slow_clients import SlowClientProtocol, client_bounds

MAX_HEADER_BYTES = 64 * 1024
CHUNKED = b"transfer-encoding: chunked\r\n"
#: A client that reads nothing for this long is cut off, because its request holds a slot that others wait for.
CLIENT_STALL_S = 30.0


class HeadersTooLargeError(InvalidRequest):
    """The headers of a request exceed MAX_HEADER_BYTES."""

    kind, status, code = "headers_too_large", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "headers_too_large"


class JoinedTransport:
    """Sends the head of a response together with the first bytes of its body, which saves a system call for each response.

    `add_to_head` adds finished header lines, each with its CRLF. Uvicorn checks every name and value, which takes longer than writing
    them, so lines added here must not contain anything that came from outside.
    """

    __slots__ = ("_cycle", "_head", "_more", "_transport")

    def __init__(self, transport: asyncio.Transport, cycle: RequestResponseCycle) -> None:
        self._transport, self._cycle = transport, cycle
        self._head: bytes | None = None
        self._more = b""

    def add_to_head(self, lines: bytes) -> None:
        """Send these header lines too. The response must not have started."""
        self._more += lines

    def write(self, data: bytes) -> None:
        """Send bytes of the response. The first ones after it has started are its head."""
        if self._head is None and self._cycle.response_started:
            self._head = data[:-2] + self._more + b"\r\n" if self._more else data
            return
        if self._head:
            data, self._head = self._head + data, b""
        self._transport.write(data)

    def close(self) -> None:
        """Close the connection, after a head that has not been sent yet."""
        if self._head:
            self.write(b"")
        self._transport.close()

    def is_closing(self) -> bool:
        """True if the connection is closed or about to be."""
        return self._transport.is_closing()


class CloseDelimitedTransport(JoinedTransport):
    """Removes chunked encoding, which HTTP/1.0 does not have. The end of the connection ends the response.

    Uvicorn writes the header line last, and each chunk with one write.
    """

    __slots__ = ()

    def write(self, data: bytes) -> None:
        """Send bytes of the response without the framing of a chunk."""
        if self._cycle.chunked_encoding:
            data = _without_chunking(data) if self._head is not None else data.removesuffix(CHUNKED + b"\r\n") + b"\r\n"
        super().write(data)


def _without_chunking(chunk: bytes) -> bytes:
    size, _, rest = chunk.partition(b"\r\n")
    return rest[: int(size, 16)] if size else b""


class BoundedProtocol(SlowClientProtocol):
    """Refuses headers of more than MAX_HEADER_BYTES, and requests that arrive before the previous one is answered.

    Long headers would fill the memory before a key has been checked. Pipelining, which no current client uses, makes uvicorn stop
    reading, so that the end of the connection would go unnoticed.

    The scope has two entries for the application. `lmaas.watch` takes a callback for the end of the connection: a task for each request
    that waits for uvicorn's message, and a timeout around each write, would cost more than the rest of the exchange. `lmaas.head`
    (not for HEAD requests) takes more header lines for the response.
    """

    #: The target of the latest request.
    url = b""
    _header_bytes = 0
    _on_lost: Callable[[], None] | None = None
    _stall: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, refused: Ended | None = None, **more: Any) -> None:
        super().__init__(*args, **more)
        self._refused = refused

    def on_message_begin(self) -> None:
        """Handle the beginning of a request."""
        self._reading_headers, self._header_bytes = True, 0
        super().on_message_begin()
        scope: Any = self.scope
        scope["lmaas.watch"] = self.watch

    def watch(self, on_lost: Callable[[], None]) -> None:
        """Call `on_lost` when the connection ends before the response is complete, at once if it has ended already."""
        if self.transport.is_closing():
            on_lost()
            return
        self._on_lost = on_lost
        # Uvicorn stops reading after a large body. Without reading, the end of the connection goes unnoticed.
        self.flow.resume_reading()

    def on_response_complete(self) -> None:
        """Handle the end of a response. The end of the connection no longer matters."""
        self._on_lost = None
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Handle the end of the connection, whichever side closed it."""
        super().connection_lost(exc)
        self._end_stall()
        on_lost, self._on_lost = self._on_lost, None
        if on_lost is not None:
            on_lost()

    def pause_writing(self) -> None:
        """Handle a full write buffer: the client reads more slowly than the response is made."""
        super().pause_writing()
        self._watch_stall()

    def _watch_stall(self) -> None:
        self._stall = self.loop.call_later(CLIENT_STALL_S, self._stalled, self.transport.get_write_buffer_size())

    def _stalled(self, left_bytes: int) -> None:
        """Cut the client off if it has read nothing since the last check."""
        if self.transport.get_write_buffer_size() >= left_bytes:
            self.transport.abort()
        else:
            self._watch_stall()

    def resume_writing(self) -> None:
        """Handle a write buffer that has emptied."""
        super().resume_writing()
        self._end_stall()

    def _end_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def on_header(self, name: bytes, value: bytes) -> None:
        """Handle one header. A header after the body (a trailer) is ignored."""
        self._header_bytes += len(name) + len(value)
        if self._reading_headers:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Handle the end of the headers."""
        self._reading_headers = False
        if self._busy or self._header_bytes > MAX_HEADER_BYTES:
            self._refuse_headers()
            return
        if self._refuses(self.url):
            return
        super().on_headers_complete()
        if self.cycle is not None and self.scope["method"] != "HEAD":  # a response to HEAD has no body that its head could wait for
            joined: Any = JoinedTransport(self.transport, self.cycle)
            if self.scope["http_version"] == "1.0":
                joined = CloseDelimitedTransport(self.transport, self.cycle)
                self.cycle.waiting_for_100_continue = False  # HTTP/1.0 has no interim responses
            self.cycle.transport = joined
            scope: Any = self.scope
            scope["lmaas.head"] = joined.add_to_head

    def on_url(self, url: bytes) -> None:
        """Handle a part of the request target."""
        self._header_bytes += len(url)
        super().on_url(url)

    def on_body(self, body: bytes) -> None:
        """Handle a part of the body."""
        self._header_bytes = 0
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Handle the end of a request."""
        if not self.transport.is_closing():
            super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        """Handle bytes from the client."""
        if self.transport.is_closing():
            return
        before = self._header_bytes
        super().data_received(data)
        if not self.transport.is_closing() and (self._reading_headers or self._header_bytes >= before > 0):
            # The parser reports a header or a trailer only when it is complete.
            self._header_bytes = max(self._header_bytes, before + len(data))
            if self._header_bytes > MAX_HEADER_BYTES:
                self._refuse_headers()

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are not HTTP."""
        self._refuse(InvalidRequest(msg, code="invalid_http"))

    @property
    def _busy(self) -> bool:
        """True while a response is in progress. Nothing else may be written then."""
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse_headers(self) -> None:
        self._refuse(
            HeadersTooLargeError(f"The request's headers exceed {MAX_HEADER_BYTES} bytes, the maximum. Send fewer or shorter headers.")
        )

    def _refuse(self, error: LmaasError) -> None:
        # While a body is awaited, the response has not begun yet, so this can still be it.
        if self.cycle is None or self.cycle.response_complete or (self.cycle.more_body and not self.cycle.response_started):
            request_id = new_request_id()
            path, headers = self.url.partition(b"?")[0].decode("latin-1"), self.headers or []
            scope = {"method": None, "path": path, "headers": headers, "request_id": request_id}
            response = error_response(error, scope)
            lines = [b"%b: %b" % line for line in response.raw_headers]
            head = [f"HTTP/1.1 {response.status_code} {_phrase(response.status_code)}".encode(), *lines]
            head += [f"x-request-id: {request_id}".encode(), b"connection: close"]
            self.transport.write(b"\r\n".join(head) + b"\r\n\r\n" + bytes(response.body))
            if self._refused is not None:
                self._refused(scope, response.status_code, 0.0)
        self.transport.close()


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Overloaded"  # Anthropic's 529, the only status that HTTP does not know


def server(app: ASGIApp, settings: Settings, refused: Ended | None = None) -> uvicorn.Server:
    """Make an HTTP server for the application. On SIGTERM it accepts nothing new and gives streams `drain_timeout_s` to end.

    `refused` is called for each request that does not reach the application.
    """
    protocol: Any = functools.partial(BoundedProtocol, bounds=client_bounds(settings), refused=refused)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=protocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=round(settings.drain_timeout_s),
        timeout_keep_alive=75,
    )
    return uvicorn.Server(config)
