"""Requests that offer an upgrade to another protocol are served over HTTP/1.1, with their body, and the connection can be used again."""

import asyncio
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from tests.support.conditions import until
from tests.unit.web.test_server import Connection
from tests.unit.web.test_slow_clients import answer, connected, serving

#: The headers that java.net.http.HttpClient sends by default.
JAVA = "Connection: Upgrade, HTTP2-Settings\r\nHost: x\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\nUpgrade: h2c\r\n"
BODY = b'{"model": "m", "messages": []}'


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Respond with the path and the body."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    text = scope["path"].encode() + b" " + body
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(text)).encode())]})
    await send({"type": "http.response.body", "body": text})


async def exchange(pieces: list[bytes], answers: int) -> list[bytes]:
    """Return the bodies of the responses to these bytes, each piece sent when the one before was read."""
    connection = Connection(echo)

    def bodies() -> list[bytes]:
        return [each.rpartition(b"\r\n\r\n")[2] for each in connection.written if each.startswith(b"HTTP/1.1 200 OK\r\n")]

    for piece in pieces:
        connection.send(piece)
        for _ in range(3):
            await asyncio.sleep(0)
    await until(lambda: len(bodies()) == answers, every_s=0, timeout_s=10)
    assert len(connection.written) == answers
    assert not connection.transport.close.called
    connection.protocol.connection_lost(None)
    return bodies()


def posted(headers: str, *, chunked: bool = False, path: str = "/first") -> bytes:
    if chunked:
        half = len(BODY) // 2
        body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (BODY[:half], BODY[half:], b""))
        return f"POST {path} HTTP/1.1\r\n{headers}transfer-encoding: chunked\r\n\r\n".encode() + body
    return f"POST {path} HTTP/1.1\r\n{headers}content-length: {len(BODY)}\r\n\r\n".encode() + BODY


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
async def test_a_request_in_two_pieces_split_anywhere_keeps_its_body(chunked: bool) -> None:
    request = posted(JAVA, chunked=chunked)
    for place in range(1, len(request)):
        assert await exchange([request[:place], request[place:]], 1) == [b"/first " + BODY], request[:place]


@pytest.mark.parametrize("size", [1, 7, 10**6])
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("token", ["h2c", "websocket", "TLS/1.0", "foo/1, h2c", ""])
async def test_every_token_is_ignored_whatever_the_segments(token: str, chunked: bool, size: int) -> None:
    request = posted(f"Host: x\r\nConnection: upgrade\r\nUpgrade: {token}\r\n", chunked=chunked)
    assert await exchange([request[i : i + size] for i in range(0, len(request), size)], 1) == [b"/first " + BODY]


@pytest.mark.parametrize("again", [JAVA, "Host: x\r\n"], ids=["asks again", "plain"])
async def test_the_connection_is_used_again(again: str) -> None:
    pieces = [posted(JAVA), posted(again, path="/second"), posted(JAVA, path="/third", chunked=True)]
    bodies = await exchange(pieces, 3)
    assert bodies == [b"/first " + BODY, b"/second " + BODY, b"/third " + BODY]


@pytest.mark.parametrize("method", ["GET", "DELETE", "POST", "OPTIONS"])
async def test_a_request_without_a_body(method: str) -> None:
    head = f"{method} /x HTTP/1.1\r\n{JAVA}\r\n".encode()
    assert await exchange([head, head], 2) == [b"/x ", b"/x "]


async def test_a_body_of_many_segments_over_a_socket() -> None:
    """The server pauses reading a large body now and then."""
    length = 3_000_000
    async with serving(count_bytes) as port, connected(port) as (reader, writer):
        for _ in range(2):
            writer.write(f"POST /x HTTP/1.1\r\n{JAVA}content-length: {length}\r\n\r\n".encode())
            for start in range(0, length, 10_000):
                writer.write(b"b" * min(10_000, length - start))
                await writer.drain()
            got = await answer(reader)
            assert (got.status, got.body) == (200, str(length).encode())


async def count_bytes(scope: Scope, receive: Receive, send: Send) -> None:
    """Respond with the length of the body."""
    if scope["type"] == "lifespan":
        for word in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{word}.complete"})
        return
    length = 0
    while True:
        message = await receive()
        length += len(message["body"])
        if not message["more_body"]:
            break
    text = str(length).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(text))]})
    await send({"type": "http.response.body", "body": text})


async def test_an_expectation_is_met_before_the_body_comes() -> None:
    connection = Connection(echo)
    connection.send(f"POST /x HTTP/1.1\r\n{JAVA}expect: 100-continue\r\ncontent-length: {len(BODY)}\r\n\r\n".encode())
    await until(lambda: connection.written == [b"HTTP/1.1 100 Continue\r\n\r\n"], every_s=0)
    connection.send(BODY)
    await until(lambda: len(connection.written) == 2, every_s=0)
    assert connection.written[1].endswith(b"\r\n\r\n/x " + BODY)
    connection.protocol.connection_lost(None)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"CONNECT example.com:443 HTTP/1.1\r\nhost: example.com:443\r\n\r\n", id="CONNECT"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="HTTP/2 without an upgrade"),
        pytest.param(posted(JAVA + "transfer-encoding: chunked\r\n"), id="two framings"),
        pytest.param(posted(JAVA + "content-length: 3\r\n"), id="two lengths"),
        pytest.param(f"POST /x HTTP/1.1\r\n{JAVA}transfer-encoding: gzip\r\n\r\n".encode(), id="not chunked in the end"),
        pytest.param(f"POST /x HTTP/1.1\r\n{JAVA}transfer-encoding: chunked\r\n\r\nno size\r\n".encode(), id="bad chunk"),
    ],
)
async def test_what_is_not_http_1_is_refused(data: bytes) -> None:
    connection = Connection(echo)
    connection.send(data)
    await until(lambda: connection.written, every_s=0)
    assert b" 400 " in connection.written[0].partition(b"\r\n")[0]
    assert b'"code":"invalid_http"' in connection.written[0]
    assert connection.transport.close.called
    connection.protocol.connection_lost(None)
    await until(lambda: not connection.protocol.tasks, every_s=0)


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("headers", ["host: x\r\n", "host: x\r\nconnection: keep-alive\r\n", "", "host: x\r\nexpect: 100-continue\r\n"])
async def test_an_http_1_0_client_gets_no_chunks(headers: str, chunked: bool) -> None:
    """The end of the connection ends the response, also one whose length is known."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        assert message["body"] == BODY
        scope["lmaas.head"](b"x-more: 1\r\n")
        start: dict[str, Any] = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}
        if not chunked:
            start["headers"].append((b"content-length", b"11"))
        await send(start)
        for part in (b"one", b"", b"0\r\n\r\n"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"two"})

    connection = Connection(app)
    connection.send(f"POST /x HTTP/1.0\r\n{headers}content-length: {len(BODY)}\r\n\r\n".encode() + BODY)
    await until(lambda: connection.transport.close.called, every_s=0)
    head, _, body = b"".join(connection.written).partition(b"\r\n\r\n")
    assert body == b"one0\r\n\r\ntwo"
    lines = head.lower().split(b"\r\n")
    assert lines[0] == b"http/1.1 200 ok"
    assert sorted(lines[1:]) == sorted(
        [b"content-type: text/plain", b"x-more: 1", b"connection: close", *([] if chunked else [b"content-length: 11"])]
    )
    connection.protocol.connection_lost(None)


async def test_an_http_1_0_client_that_asks_for_an_upgrade() -> None:
    connection = Connection(echo)
    connection.send(posted(JAVA).replace(b"HTTP/1.1", b"HTTP/1.0"))
    await until(lambda: connection.transport.close.called, every_s=0)
    assert b"".join(connection.written).endswith(b"\r\n\r\n/first " + BODY)
    connection.protocol.connection_lost(None)
