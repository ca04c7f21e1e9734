"""The server's own part of an exchange, on a connection that the test controls."""

import asyncio
from typing import Any
from unittest.mock import Mock

import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from lmaas.web import server
from lmaas.web.server import BoundedProtocol
from tests.support.conditions import until

LARGE = 200_000  # uvicorn stops reading at 64 KiB


class Connection:
    """A connection to `app` that records writes, and whether the server reads."""

    def __init__(self, app: ASGIApp) -> None:
        config = uvicorn.Config(app, log_config=None)
        config.load()
        self.protocol = BoundedProtocol(config, ServerState(), {})
        self.transport = Mock(spec=asyncio.Transport, is_closing=Mock(return_value=False), get_extra_info=Mock(return_value=None))
        #: The bytes that the client has not read yet.
        self.buffered = 1000
        self.transport.get_write_buffer_size.side_effect = lambda: self.buffered
        self.transport.pause_reading.side_effect = lambda: setattr(self, "reading", False)
        self.transport.resume_reading.side_effect = lambda: setattr(self, "reading", True)
        self.reading = True
        self.protocol.connection_made(self.transport)

    def send(self, data: bytes) -> None:
        """Receive bytes from the client."""
        self.protocol.data_received(data)

    @property
    def written(self) -> list[bytes]:
        """Return each write to the client."""
        return [call.args[0] for call in self.transport.write.call_args_list]


class Application:
    """Takes one request, watches its client, and responds when the test allows it."""

    def __init__(self) -> None:
        self.body = b""
        self.lost: list[str] = []
        self.watching = False
        self.answer = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            self.body += message.get("body", b"")
            if not message.get("more_body"):
                break
        scope["lmaas.watch"](lambda: self.lost.append("lost"))
        self.watching = True
        await self.answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        await send({"type": "http.response.body", "body": b"two"})


def head(length: int, more: str = "") -> bytes:
    return f"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n{more}\r\n".encode()


async def watching(app: Application, body: bytes = b"") -> Connection:
    """Return a connection whose request the application has taken."""
    connection = Connection(app)
    connection.send(head(len(body), "expect: 100-continue\r\n"))
    await until(lambda: connection.written, every_s=0)  # it waits for the body
    connection.send(body)
    await until(lambda: app.watching, every_s=0)
    return connection


async def test_a_client_that_goes_is_noticed_also_after_a_large_body() -> None:
    app = Application()
    connection = await watching(app, b"x" * LARGE)
    assert connection.transport.pause_reading.called
    assert connection.reading, "a client that does not read does not receive the end"
    assert (len(app.body), app.lost) == (LARGE, [])
    connection.protocol.connection_lost(None)
    assert app.lost == ["lost"]
    app.answer.set()


async def test_a_client_that_has_gone_already_is_noticed_at_once() -> None:
    app = Application()
    connection = Connection(app)
    connection.send(head(0))
    connection.transport.is_closing.return_value = True
    await until(lambda: app.watching, every_s=0)
    assert app.lost == ["lost"]
    app.answer.set()


async def test_after_the_answer_a_client_may_go() -> None:
    app = Application()
    connection = await watching(app)
    app.answer.set()
    await until(lambda: connection.written[-1:] == [b"3\r\ntwo\r\n0\r\n\r\n"], every_s=0)
    connection.protocol.connection_lost(None)
    assert app.lost == []


async def test_an_answers_head_goes_with_its_first_bytes() -> None:
    app = Application()
    connection = await watching(app)
    app.answer.set()
    await until(lambda: len(connection.written) == 3, every_s=0)
    interim, first, last = connection.written
    assert interim == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert first.startswith(b"HTTP/1.1 200 OK\r\n")
    assert first.endswith(b"content-type: text/plain\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n")
    assert last == b"3\r\ntwo\r\n0\r\n\r\n"


@pytest.mark.parametrize("then", ["stays", "catches up", "goes"])
async def test_a_client_that_takes_nothing_for_long_is_cut_off(monkeypatch: pytest.MonkeyPatch, then: str) -> None:
    monkeypatch.setattr(server, "CLIENT_STALL_S", 0.02)
    app = Application()
    connection = await watching(app)
    connection.protocol.pause_writing()
    if then == "catches up":
        connection.protocol.resume_writing()
    if then == "goes":
        connection.protocol.connection_lost(None)
    stalled: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(0.04, stalled.set_result, None)
    await stalled
    assert connection.transport.abort.called is (then == "stays")
    connection.protocol.resume_writing()
    app.answer.set()
    await until(lambda: not connection.protocol.tasks, every_s=0)


async def test_a_slow_client_is_not_cut_off_while_it_takes_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CLIENT_STALL_S", 0.02)
    app = Application()
    connection = await watching(app)
    connection.protocol.pause_writing()
    for left in (900, 800, 700):
        connection.buffered = left
        looked = connection.transport.get_write_buffer_size.call_count
        await until(lambda looked=looked: connection.transport.get_write_buffer_size.call_count > looked + 1, every_s=0)
        assert not connection.transport.abort.called
    await until(lambda: connection.transport.abort.called, every_s=0)
    connection.protocol.connection_lost(None)
    app.answer.set()
    await until(lambda: not connection.protocol.tasks, every_s=0)


async def test_head_is_answered_although_it_has_no_body() -> None:
    app = Application()
    app.answer.set()
    connection = Connection(app)
    connection.send(b"HEAD /x HTTP/1.1\r\nhost: x\r\n\r\n")
    await until(lambda: not connection.protocol.tasks, every_s=0)
    assert b"".join(connection.written).startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"one" not in b"".join(connection.written)


@pytest.mark.parametrize("piece", [b"x-n: " + b"a" * 1000 + b"\r\n", b"a" * 1000], ids=["many", "one that never ends"])
async def test_trailers_are_bounded_and_are_no_headers(piece: bytes) -> None:
    app = Application()
    connection = Connection(app)
    connection.transport.close.side_effect = lambda: connection.transport.is_closing.configure_mock(return_value=True)
    connection.send(b"POST /x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nx-first: 1\r\nx-second: ")
    sent = 0
    while not connection.transport.close.called:
        connection.send(piece)
        sent += len(piece)
        assert sent < 2 * server.MAX_HEADER_BYTES
    assert b"x-first" not in dict(connection.protocol.scope["headers"])
    connection.protocol.connection_lost(None)
    app.answer.set()
    await until(lambda: not connection.protocol.tasks, every_s=0)


async def test_a_body_in_many_small_chunks_is_not_taken_for_trailers() -> None:
    app = Application()
    connection = Connection(app)
    connection.send(b"POST /x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
    for _ in range(40_000):
        connection.send(b"1\r\na\r\n")
    connection.send(b"0\r\n\r\n")
    await until(lambda: app.watching, every_s=0)
    assert len(app.body) == 40_000
    app.answer.set()
    await until(lambda: not connection.protocol.tasks, every_s=0)


async def test_what_is_no_http_does_not_break_into_an_answer() -> None:
    app = Application()
    connection = await watching(app)
    before = len(connection.written)
    connection.send(b"garbage\r\n\r\n")
    assert len(connection.written) == before
    assert connection.transport.close.called
    other = Connection(app)
    other.send(b"garbage\r\n\r\n")
    assert b'"code":"invalid_http"' in b"".join(other.written)
    connection.protocol.connection_lost(None)
    app.answer.set()
    await until(lambda: not connection.protocol.tasks, every_s=0)
