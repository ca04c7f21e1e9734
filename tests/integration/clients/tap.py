"""A TCP proxy between a client and the gateway, which records their traffic. A client cannot distinguish it from the gateway."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import h11

#: The largest piece that the proxy passes on at once.
PIECE = 65536


@dataclass
class Exchange:
    """A request with its response, as bytes on the wire."""

    method: str
    path: str
    request_headers: dict[str, str]
    sent: bytes = b""
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    received: bytes = b""
    #: True if the response has ended as HTTP demands.
    ended: bool = False

    @property
    def body(self) -> Any:
        """The JSON of the request."""
        return json.loads(self.sent)

    @property
    def streamed(self) -> bool:
        """True if the response is a stream of events."""
        return self.headers.get("content-type", "").startswith("text/event-stream")


@dataclass
class Tap:
    """A running proxy. `exchanges` are in the order of the requests, `broken` are the violations of HTTP."""

    url: str = ""
    exchanges: list[Exchange] = field(default_factory=list)
    broken: list[h11.ProtocolError] = field(default_factory=list)

    def to(self, path: str) -> list[Exchange]:
        """Return the exchanges of one path."""
        return [exchange for exchange in self.exchanges if exchange.path == path]


class _Reader:
    """Reads the exchanges of one connection from the bytes of both sides."""

    def __init__(self, exchanges: list[Exchange]) -> None:
        self._exchanges, self._exchange = exchanges, Exchange("", "", {})
        self._requests, self._responses = h11.Connection(h11.SERVER), h11.Connection(h11.CLIENT)

    def from_client(self, data: bytes) -> None:
        self._requests.receive_data(data)
        while isinstance(event := self._requests.next_event(), h11.Event):
            if isinstance(event, h11.Request):
                self._exchange = Exchange(event.method.decode(), event.target.decode(), _headers(event))
                self._exchanges.append(self._exchange)
            elif isinstance(event, h11.Data):
                self._exchange.sent += event.data
            self._responses.send(event)

    def from_gateway(self, data: bytes) -> None:
        self._responses.receive_data(data)
        while isinstance(event := self._responses.next_event(), h11.Event):
            if isinstance(event, h11.Response):
                self._exchange.status, self._exchange.headers = event.status_code, _headers(event)
            elif isinstance(event, h11.Data):
                self._exchange.received += event.data
            self._requests.send(event)
            if isinstance(event, h11.EndOfMessage):
                self._exchange.ended = True
                if self._responses.our_state is self._responses.their_state is h11.DONE:
                    self._responses.start_next_cycle()
                    self._requests.start_next_cycle()


def _headers(event: h11.Request | h11.Response) -> dict[str, str]:
    return {name.decode(): value.decode("latin-1") for name, value in event.headers}


@asynccontextmanager
async def tapped(host: str, port: int) -> AsyncIterator[Tap]:
    """Run a proxy to a gateway."""
    tap = Tap()

    async def pump(source: asyncio.StreamReader, read: Callable[[bytes], None], target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(PIECE):
                read(data)
                target.write(data)
                await target.drain()
        except h11.ProtocolError as error:
            tap.broken.append(error)
        except ConnectionError:
            pass  # One side has closed its connection, which closes the other one.
        finally:
            target.close()

    async def serve(from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        reader = _Reader(tap.exchanges)
        from_gateway, to_gateway = await asyncio.open_connection(host, port)
        await asyncio.gather(pump(from_client, reader.from_client, to_gateway), pump(from_gateway, reader.from_gateway, to_client))

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    tap.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        yield tap
    finally:
        listening.close()
