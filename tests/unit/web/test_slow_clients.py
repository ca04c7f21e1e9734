"""Clients that send slowly, or nothing, or are too many: raw sockets against the real server."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from lmaas.config import Settings
from lmaas.web.server import server
from lmaas.web.slow_clients import MIN_BODY_BYTES, SURPLUS, client_bounds
from tests.support.anthropic_stream import check_error
from tests.support.conditions import until
from tests.support.processes import free_port
from tests.unit.web.test_server import Application, Connection, head

FOREVER_S = 1000.0
SOON_S = 0.05


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Respond with the length of the body."""
    if scope["type"] == "lifespan":
        for word in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{word}.complete"})
        return
    length = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        length += len(message["body"])
        if not message["more_body"]:
            break
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"6")]})
    await send({"type": "http.response.body", "body": b"%06d" % length})


async def hasty(scope: Scope, receive: Receive, send: Send) -> None:
    """Respond to /early without reading the body, and to everything else as `echo` does."""
    if scope.get("path") != "/early":
        await echo(scope, receive, send)
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"early"})


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        code: str = json.loads(self.body)["error"]["code"]
        return code


async def answer(reader: asyncio.StreamReader) -> Answer:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
    return Answer(int(lines[0].split()[1]), headers, await reader.readexactly(int(headers["content-length"])))


@asynccontextmanager
async def serving(app: ASGIApp = echo, **changes: Any) -> AsyncIterator[int]:
    """Run a server, and provide its port."""
    settings = Settings(port=free_port(), **{"header_timeout_s": FOREVER_S, "body_timeout_s": FOREVER_S, **changes})
    running = server(app, settings)
    task = asyncio.create_task(running.serve())
    await until(lambda: running.started, every_s=0.01)
    yield settings.port
    running.should_exit = True
    await task


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()


@pytest.mark.parametrize("piece", [b"", b"x-more: 1\r\n", b"a"], ids=["no more", "more and more", "bit by bit"])
async def test_a_head_that_does_not_end_in_time(piece: bytes) -> None:
    async with serving(header_timeout_s=SOON_S) as port, connected(port) as (reader, writer):
        writer.write(b"POST /x HTTP/1.1\r\nhost: x\r\nx-a: ")
        got = asyncio.create_task(answer(reader))
        while not got.done():
            writer.write(piece)
            await asyncio.sleep(0.005)  # the slowness itself
        refused = await got
        assert (refused.status, refused.code, refused.headers["connection"]) == (408, "request_timeout", "close")
        assert refused.headers["x-request-id"].startswith("req_")
        with contextlib.suppress(ConnectionResetError):  # a piece came after the refusal
            assert await reader.read() == b""


@pytest.mark.parametrize("first", [b"", b"GET /x HTTP/1.1\r\nhost: x\r\n\r\n"], ids=["at first", "after an answer"])
async def test_who_sends_no_request_is_cut_off(first: bytes) -> None:
    async with serving(header_timeout_s=SOON_S) as port, connected(port) as (reader, writer):
        if first:
            writer.write(first)
            assert (await answer(reader)).status == 200
            writer.write(b"\r\n")  # ends the server's time limit for an idle connection, but begins no request
            assert (await answer(reader)).status == 408
        assert await reader.read() == b""


@pytest.mark.parametrize("piece", [b"", b"b"], ids=["no more", "bit by bit"])
async def test_a_body_that_does_not_go_on(piece: bytes) -> None:
    async with serving(body_timeout_s=SOON_S) as port, connected(port) as (reader, writer):
        writer.write(b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n")
        got = asyncio.create_task(answer(reader))
        while not got.done():
            writer.write(piece)
            await asyncio.sleep(0.005)  # the slowness itself
        refused = await got
        assert (refused.status, refused.code) == (408, "request_timeout")
        with contextlib.suppress(ConnectionResetError):  # a piece came after the refusal
            assert await reader.read() == b""


async def test_a_connection_too_many() -> None:
    async with serving(max_connections=2) as port, connected(port) as (reader, writer), connected(port) as (_, other):
        writer.write(b"GET /x HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await answer(reader)).status == 200
        async with connected(port) as (late, asks):
            for path in ("/health", "/healthz", "/readyz", "/metrics?x"):  # health checks and metrics are served
                asks.write(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
                assert (await answer(late)).status == 200
            asks.write(b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nabc")
            refused = await answer(late)
            assert (refused.status, refused.code, refused.headers["retry-after"]) == (503, "too_many_connections", "5")
            assert await late.read() == b""
        writer.write(b"GET /x HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await answer(reader)).status == 200, "earlier connections are not refused"
        other.close()
        await other.wait_closed()

        async def there_is_room() -> bool:
            async with connected(port) as (again, asks):
                asks.write(b"GET /x HTTP/1.1\r\nhost: x\r\n\r\n")
                return (await answer(again)).status == 200

        await until(there_is_room)


async def test_far_too_many_connections() -> None:
    """Connections for health checks have a limit as well."""
    async with serving(max_connections=1) as port, AsyncExitStack() as stack:
        for _ in range(1 + SURPLUS):
            await stack.enter_async_context(connected(port))
        late, _ = await stack.enter_async_context(connected(port))
        assert (await answer(late)).code == "too_many_connections"
        assert await late.read() == b""


@pytest.mark.parametrize("rest", [b"bc", b"b"], ids=["whole later", "never whole"])
async def test_who_was_answered_before_his_request_was_whole_gets_no_second_answer(rest: bytes) -> None:
    async with serving(hasty, header_timeout_s=SOON_S, body_timeout_s=SOON_S) as port, connected(port) as (reader, writer):
        writer.write(b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\na")
        assert (await answer(reader)).body == b"early"
        writer.write(rest)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(4 * SOON_S):
                assert await reader.read(1) == b"", "at most the connection ends"
        if rest == b"bc":
            writer.write(b"GET /x HTTP/1.1\r\nhost: x\r\n\r\n")
            again = await answer(reader)
            assert (again.status, again.body) == (200, b"000000")
        else:
            assert reader.at_eof()


async def test_an_early_answers_timer_is_not_the_next_requests() -> None:
    app = Application()
    connection = Connection(app)
    connection.send(head(3))
    connection.send(b"a")
    first = connection.protocol.deadline_timer
    assert first is not None
    connection.protocol.cycle.response_complete = True  # answered early
    connection.send(b"bc" + head(3))
    assert connection.protocol.cycle.more_body
    assert first.cancelled()
    assert connection.protocol.deadline_timer is not None
    await ended(connection, app)


def test_no_more_connections_than_files() -> None:
    assert client_bounds(Settings(max_connections=10**9)).max_connections < 10**9
    assert client_bounds(Settings(max_connections=7)).max_connections == 7


async def ended(connection: Connection, app: Application) -> None:
    connection.protocol.connection_lost(None)
    app.answer.set()
    await until(lambda: not connection.protocol.tasks, every_s=0)


async def test_a_slow_body_is_not_late_while_it_goes_on() -> None:
    app = Application()
    connection = Connection(app)
    connection.send(head(10 * MIN_BODY_BYTES))
    for _ in range(9):
        connection.send(b"b" * MIN_BODY_BYTES)
        connection.protocol.on_deadline()
        assert not connection.transport.close.called
    connection.send(b"b" * (MIN_BODY_BYTES - 1))
    connection.protocol.on_deadline()
    connection.protocol.on_deadline()
    assert connection.transport.close.called
    await ended(connection, app)


async def test_a_body_is_not_late_while_we_do_not_read() -> None:
    app = Application()
    connection = Connection(app)
    connection.send(head(1_000_000, "expect: 100-continue\r\n"))
    connection.protocol.on_deadline()  # the server has not sent `100 Continue` yet
    assert not connection.transport.close.called
    await until(lambda: connection.written, every_s=0)
    connection.protocol.flow.pause_reading()
    connection.protocol.on_deadline()
    assert not connection.transport.close.called
    connection.protocol.flow.resume_reading()
    connection.protocol.on_deadline()
    assert not connection.transport.close.called, "the server has only begun to read again"
    connection.protocol.on_deadline()
    assert connection.transport.close.called
    await ended(connection, app)


async def test_nobody_is_late_while_he_is_answered_or_idle() -> None:
    app = Application()
    connection = Connection(app)
    connection.send(head(3))
    connection.send(b"abc")
    assert connection.protocol.deadline_timer is None
    connection.send(b"GET /y HT")  # begins another request, which is served when it is complete
    assert connection.protocol.deadline_timer is None
    app.answer.set()
    await until(lambda: not connection.protocol.tasks, every_s=0)
    assert not connection.transport.close.called
    assert connection.protocol.deadline_timer is None
    connection.protocol.connection_lost(None)


@pytest.mark.parametrize(
    ("request_bytes", "changes", "status", "kind"),
    [
        (
            b"POST /v1/messages?beta=true HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n",
            {"body_timeout_s": SOON_S},
            408,
            "invalid_request_error",
        ),
        (b"POST /x HTTP/1.1\r\nhost: x\r\nanthropic-version: 1\r\nx-a: ", {"header_timeout_s": SOON_S}, 408, "invalid_request_error"),
        (b"POST /v1/messages HTTP/1.1\r\nx-a: " + b"a" * 70_000 + b"\r\n\r\n", {}, 431, "invalid_request_error"),
        (b"POST /v1/messages HTTP/1.1\r\nx a: b\r\n\r\n", {}, 400, "invalid_request_error"),
    ],
    ids=["slow body", "slow head", "long head", "no HTTP"],
)
async def test_anthropics_clients_are_refused_in_their_own_shape(
    request_bytes: bytes, changes: dict[str, Any], status: int, kind: str
) -> None:
    async with serving(**changes) as port, connected(port) as (reader, writer):
        writer.write(request_bytes)
        refused = await answer(reader)
        body = json.loads(refused.body)
        check_error(body)
        assert (refused.status, body["error"]["type"]) == (status, kind)
        assert body["request_id"] == refused.headers["x-request-id"]
        assert refused.headers["connection"] == "close"


async def test_anthropics_status_of_a_full_gateway() -> None:
    async with serving(max_connections=1) as port, connected(port), connected(port) as (reader, writer):
        writer.write(b"POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
        refused = await answer(reader)
        assert (refused.status, json.loads(refused.body)["error"]["type"]) == (529, "overloaded_error")
