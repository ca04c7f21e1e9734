"""The HTTP server in front of the gateway: uvicorn with limits that its fast parser does not have."""

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
from lmaas.gateway.patience import PatientProtocol, client_bounds
from lmaas.http import JsonResponse, new_request_id

MAX_HEADER_BYTES = 64 * 1024
#: A client that takes nothing for this long has gone: it holds a slot that others wait for.
CLIENT_STALL_S = 30.0


class HeadersTooLargeError(InvalidRequest):
    """More header bytes than anybody needs."""

    kind, status, code = "headers_too_large", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "headers_too_large"


class JoinedTransport:
    """Sends an answer's head together with the first bytes of its body, as ASGI means it: a system call less for each answer.

    `add_to_head` takes header lines as they are sent, each with its end: uvicorn looks at each name and value for longer than it takes to
    write them. They must be right: made of nothing that came from outside.
    """

    __slots__ = ("_cycle", "_head", "_more", "_transport")

    def __init__(self, transport: asyncio.Transport, cycle: RequestResponseCycle) -> None:
        self._transport, self._cycle = transport, cycle
        self._head: bytes | None = None
        self._more = b""

    def add_to_head(self, lines: bytes) -> None:
        """Have these header lines sent with the answer, which has not started."""
        self._more = lines

    def write(self, data: bytes) -> None:
        """Bytes of the answer. The first ones after it has started are its head."""
        if self._head is None and self._cycle.response_started:
            self._head = data[:-2] + self._more + b"\r\n" if self._more else data
            return
        if self._head:
            data, self._head = self._head + data, b""
        self._transport.write(data)

    def close(self) -> None:
        """The connection is not to be used again."""
        if self._head:
            self.write(b"")
        self._transport.close()

    def is_closing(self) -> bool:
        """Whether it is closed or about to be."""
        return self._transport.is_closing()


class BoundedProtocol(PatientProtocol):
    """Refuses headers of more than MAX_HEADER_BYTES, and requests that come before the last one is answered.

    The first would fill our memory before anybody has shown a key. The second (pipelining, which no client of today uses) makes
    uvicorn stop reading, and a client that goes away would not be noticed.

    The scope's `lmaas.watch` takes a callback for when the client goes away: a task for each request that waits for uvicorn's word,
    and a timeout around each write, would cost more than the rest of the exchange. Its `lmaas.head` takes more lines for the answer's head.
    """

    _header_bytes = 0
    _on_lost: Callable[[], None] | None = None
    _stall: asyncio.TimerHandle | None = None

    def on_message_begin(self) -> None:
        """A request begins."""
        self._reading_headers, self._header_bytes = True, 0
        super().on_message_begin()
        scope: Any = self.scope
        scope["lmaas.watch"] = self.watch

    def watch(self, on_lost: Callable[[], None]) -> None:
        """Have `on_lost` called when the connection is lost before the answer is complete, or at once if it is lost already."""
        if self.transport.is_closing():
            on_lost()
            return
        self._on_lost = on_lost
        # Uvicorn stops reading after a large body; who does not read does not notice the end.
        self.flow.resume_reading()

    def on_response_complete(self) -> None:
        """A request is answered: that its client goes away means nothing any more."""
        self._on_lost = None
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone, or we have cut it off."""
        super().connection_lost(exc)
        self._end_stall()
        on_lost, self._on_lost = self._on_lost, None
        if on_lost is not None:
            on_lost()

    def pause_writing(self) -> None:
        """The client takes less than we send."""
        super().pause_writing()
        self._watch_stall()

    def _watch_stall(self) -> None:
        self._stall = self.loop.call_later(CLIENT_STALL_S, self._stalled, self.transport.get_write_buffer_size())

    def _stalled(self, left_bytes: int) -> None:
        """A slow client is not one that takes nothing."""
        if self.transport.get_write_buffer_size() >= left_bytes:
            self.transport.abort()
        else:
            self._watch_stall()

    def resume_writing(self) -> None:
        """The client has caught up."""
        super().resume_writing()
        self._end_stall()

    def _end_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header, whole. What comes after the body (a trailer) is nobody's."""
        self._header_bytes += len(name) + len(value)
        if self._reading_headers:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """All headers are there."""
        self._reading_headers = False
        if self._busy or self._header_bytes > MAX_HEADER_BYTES:
            self._refuse_headers()
            return
        if self._refuses(self.url):
            return
        super().on_headers_complete()
        if self.cycle is not None and self.scope["method"] != "HEAD":  # there, no body would follow the head
            joined: Any = JoinedTransport(self.transport, self.cycle)
            self.cycle.transport = joined
            scope: Any = self.scope
            scope["lmaas.head"] = joined.add_to_head

    def on_url(self, url: bytes) -> None:
        """A part of the address."""
        self._header_bytes += len(url)
        super().on_url(url)

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._header_bytes = 0
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        if not self.transport.is_closing():
            super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        """Bytes from the client."""
        if self.transport.is_closing():
            return
        before = self._header_bytes
        super().data_received(data)
        if not self.transport.is_closing() and (self._reading_headers or self._header_bytes >= before > 0):
            # A header or a trailer that never ends is not told of by on_header.
            self._header_bytes = max(self._header_bytes, before + len(data))
            if self._header_bytes > MAX_HEADER_BYTES:
                self._refuse_headers()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP."""
        self._refuse(InvalidRequest(msg, code="invalid_http"))

    @property
    def _busy(self) -> bool:
        """Whether an answer is under way: nothing else may be written then."""
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse_headers(self) -> None:
        self._refuse(HeadersTooLargeError(f"The request's headers may have {MAX_HEADER_BYTES} bytes at most."))

    def _refuse(self, error: LmaasError) -> None:
        # While a body is awaited an answer is under way that has not begun: this is it, then.
        if self.cycle is None or self.cycle.response_complete or (self.cycle.more_body and not self.cycle.response_started):
            body = JsonResponse(error.body()).body
            headers = error.headers() | {"content-type": "application/json", "x-request-id": new_request_id()}
            head = f"HTTP/1.1 {int(error.status)} {HTTPStatus(error.status).phrase}\r\n"
            head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            self.transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + bytes(body))
        self.transport.close()


def server(app: ASGIApp, settings: Settings) -> uvicorn.Server:
    """An HTTP server for the application. On SIGTERM it takes nothing new and lets streams end for `drain_timeout_s`."""
    protocol: Any = functools.partial(BoundedProtocol, bounds=client_bounds(settings))
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
