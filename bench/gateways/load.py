"""A load generator that costs little, in a separate process beside the proxies: `python -m bench.gateways.load`.

Reads orders from standard input, one JSON object per line: `url`, `headers`, `body`, `connections`, `seconds` and, unless it is chat, the
`protocol`. Each connection sends one request after the other until the time is over. Writes one line for each order:
`{"requests": n, "seconds": s}`, or `{"error": "..."}` if an answer was wrong, so that an error never counts as speed.
"""

import asyncio
import json
import sys
import time
from typing import Any
from urllib.parse import urlsplit

import uvloop

from bench.gateways.protocols import PROTOCOLS

#: The time after which an answer counts as missing.
STUCK_S = 60


def unchunked(body: bytes) -> bytes:
    """Return the content of HTTP's chunks. Raises ValueError for other bytes."""
    parts: list[bytes] = []
    at = 0
    while True:
        end = body.index(b"\r\n", at)
        size = int(body[at:end].partition(b";")[0], 16)
        if size == 0:
            return b"".join(parts)
        parts.append(body[end + 2 : end + 2 + size])
        at = end + 4 + size


def complaint(status: bytes, content: bytes, *, streamed: bool, protocol: str = "chat") -> str | None:
    """Return the fault of an answer, or None if it has all that the engine sends."""
    if status != b"200":
        return f"status {status.decode()}: {content[:300]!r}"
    return PROTOCOLS[protocol].fault(content, streamed)


class Client(asyncio.Protocol):
    """A keep-alive connection that sends one request after the other until `until`."""

    def __init__(self, request: bytes, until: float, *, streamed: bool, protocol: str) -> None:
        self._request, self._until, self._streamed, self._protocol = request, until, streamed, protocol
        self._got = bytearray()
        self._body = -1
        self._length: int | None = None
        self._transport: asyncio.Transport
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.requests = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request on the opened connection."""
        self._transport = transport  # type: ignore[assignment]
        self._send()

    def connection_lost(self, error: Exception | None) -> None:
        """Handle the closed connection, which is an error unless this client closed it."""
        if not self.done.done():
            self.done.set_exception(ConnectionError(f"the proxy closed a connection: {error}"))

    def _send(self) -> None:
        self._got.clear()
        self._body, self._length = -1, None
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Handle the bytes of an answer."""
        self._got += data
        if self._body < 0:
            end = self._got.find(b"\r\n\r\n")
            if end < 0:
                return
            self._body = end + 4
            head = bytes(self._got[:end]).lower()
            at = head.find(b"\r\ncontent-length:")
            self._length = int(head[at + 17 :].partition(b"\r\n")[0]) if at >= 0 else None
        if self._length is None:
            if self._got.endswith(b"0\r\n\r\n"):
                self._answered(unchunked(bytes(self._got[self._body :])))
        elif len(self._got) >= self._body + self._length:
            self._answered(bytes(self._got[self._body :]))

    def _answered(self, content: bytes) -> None:
        wrong = complaint(bytes(self._got[9:12]), content, streamed=self._streamed, protocol=self._protocol)
        if wrong is not None:
            self.done.set_exception(ValueError(wrong))
            self._transport.close()
            return
        self.requests += 1
        if time.perf_counter() < self._until:
            self._send()
        else:
            self.done.set_result(None)
            self._transport.close()


async def run(order: dict[str, Any]) -> dict[str, Any]:
    """Carry out one order. Raises ValueError or ConnectionError for a wrong answer, TimeoutError for a missing one."""
    url = urlsplit(order["url"])
    body = json.dumps(order["body"]).encode()
    headers = {"host": url.netloc, "content-type": "application/json", "content-length": str(len(body)), **order["headers"]}
    lines = [f"POST {url.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    request = "\r\n".join([*lines, "", ""]).encode() + body
    loop = asyncio.get_running_loop()
    started = time.perf_counter()
    until = started + order["seconds"]
    streamed, protocol = bool(order["body"].get("stream")), order.get("protocol", "chat")
    async with asyncio.timeout(order["seconds"] + STUCK_S):
        connections = [
            await loop.create_connection(lambda: Client(request, until, streamed=streamed, protocol=protocol), url.hostname, url.port)
            for _ in range(order["connections"])
        ]
        clients = [client for _, client in connections]
        try:
            await asyncio.gather(*(client.done for client in clients))
        finally:
            for transport, _ in connections:
                transport.close()
    return {"requests": sum(client.requests for client in clients), "seconds": time.perf_counter() - started}


async def serve() -> None:
    """Carry out orders until the input ends."""
    for line in iter(sys.stdin.readline, ""):
        try:
            result = await run(json.loads(line))
        except (ValueError, OSError, TimeoutError) as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    uvloop.run(serve())
