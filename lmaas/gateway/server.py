"""The HTTP server in front of the gateway: uvicorn with limits that its fast parser does not have."""

from http import HTTPStatus
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lmaas.config import Settings
from lmaas.errors import InvalidRequest, LmaasError
from lmaas.http import JsonResponse

MAX_HEADER_BYTES = 64 * 1024


class HeadersTooLargeError(InvalidRequest):
    """More header bytes than anybody needs."""

    kind, status, code = "headers_too_large", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "headers_too_large"


class BoundedProtocol(HttpToolsProtocol):
    """Refuses headers of more than MAX_HEADER_BYTES, and requests that come before the last one is answered.

    The first would fill our memory before anybody has shown a key. The second (pipelining, which no client of today uses) makes
    uvicorn stop reading, and a client that goes away would not be noticed.
    """

    _reading_headers = True
    _header_bytes = 0

    def on_message_begin(self) -> None:
        """A request begins."""
        self._reading_headers, self._header_bytes = True, 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header, whole."""
        self._header_bytes += len(name) + len(value)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """All headers are there."""
        self._reading_headers = False
        busy = self.cycle is not None and not self.cycle.response_complete
        if busy or self._header_bytes > MAX_HEADER_BYTES:
            self._refuse(answer=not busy)
            return
        super().on_headers_complete()

    def on_url(self, url: bytes) -> None:
        """A part of the address."""
        self._header_bytes += len(url)
        super().on_url(url)

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
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
        if self._reading_headers and not self.transport.is_closing():
            # A header that never ends is not told of by on_header.
            self._header_bytes = max(self._header_bytes, before + len(data))
            if self._header_bytes > MAX_HEADER_BYTES:
                self._refuse(answer=True)

    def _refuse(self, *, answer: bool) -> None:
        if answer:
            error: LmaasError = HeadersTooLargeError(f"The request's headers may have {MAX_HEADER_BYTES} bytes at most.")
            body = JsonResponse(error.body()).body
            head = f"HTTP/1.1 {int(error.status)} Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
            self.transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + bytes(body))
        self.transport.close()


def server(app: ASGIApp, settings: Settings) -> uvicorn.Server:
    """An HTTP server for the application. On SIGTERM it takes nothing new and lets streams end for `drain_timeout_s`."""
    protocol: Any = BoundedProtocol
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=protocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=round(settings.drain_timeout_s),
        timeout_keep_alive=75,
    )
    return uvicorn.Server(config)
