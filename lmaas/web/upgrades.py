"""A base protocol that ignores requests to switch to another protocol (`Upgrade: h2c`, `websocket`, …).

RFC 9110 (7.8) lets a server ignore `Upgrade` and answer in the protocol of the request. Java's default HTTP client sends
`Upgrade: h2c` with every request over a plain connection, and so does `curl --http2`.
"""

from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

#: The headers that determine the end of a request's body. A parser that resumes in the middle of a request needs nothing else.
FRAMING = frozenset({b"content-length", b"transfer-encoding"})


class UpgradeIgnoringProtocol(HttpToolsProtocol):
    """Reads the body of a request that offers an upgrade, and the requests that follow on the same connection.

    llhttp stops at the end of the head of such a request: it takes the rest for another protocol. A second parser then continues from
    there. It first gets a head with only the framing headers, which it does not report.
    """

    def _should_upgrade(self) -> bool:
        return False

    def on_message_complete(self) -> None:
        """Handle the end of a request. The parser also reports it at the end of a head that offers an upgrade, where it is ignored."""
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        # Uvicorn does not record the end of a request that has been answered already.
        self.cycle.more_body = False

    def data_received(self, data: bytes) -> None:
        """Parse bytes from the client."""
        self._unset_keepalive_if_required()
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
                if self.transport.is_closing():
                    return  # the request was refused by its head
                refusal = self._go_on_after_upgrade()
                if refusal:
                    self.send_400_response(refusal)
                    return
            except httptools.HttpParserError:
                self.send_400_response("Invalid HTTP request received.")
                return
            else:
                return

    def _go_on_after_upgrade(self) -> str:
        """Replace the parser by one that reads the rest of the request. Returns why that is not possible; empty if it is."""
        if self.parser.get_method() == b"CONNECT":
            return "A CONNECT request is not supported."  # it has no path and no body
        resumed = _Resumed(self)
        parser = httptools.HttpRequestParser(resumed)
        parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self.parser = parser
        framing = b"".join(b"%b: %b\r\n" % header for header in self.headers if header[0] in FRAMING)
        if not self.cycle.keep_alive:
            framing += b"connection: close\r\n"
        try:
            parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % framing)
        except httptools.HttpParserError:
            return "Invalid HTTP request received."  # such as a transfer encoding that does not end in chunks
        return ""


class _Resumed:
    """Passes on what a resumed parser reports, except for the head that it was given first."""

    def __init__(self, protocol: HttpToolsProtocol) -> None:
        self._protocol: Any = protocol
        self._in_repeated_head = True
        self.on_body = protocol.on_body
        self.on_message_complete = protocol.on_message_complete

    def on_message_begin(self) -> None:
        if not self._in_repeated_head:
            self._protocol.on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self._in_repeated_head:
            self._protocol.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_repeated_head:
            self._protocol.on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._in_repeated_head:
            self._in_repeated_head = False
        else:
            self._protocol.on_headers_complete()
