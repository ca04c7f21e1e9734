"""A target of webhooks: an HTTP server that records requests and responds as the test wants."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass(frozen=True)
class Received:
    """A request."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def event_id(self) -> str:
        """The id of the event."""
        return self.headers["webhook-id"]


@dataclass
class Target:
    """The server. `answers` has the responses to the next requests; after those, it sends `answer`."""

    port: int = 0
    received: list[Received] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    answer: Answer = field(default_factory=lambda: status(200))
    #: The open connections, and the most that were open at once.
    open: int = 0
    most_open: int = 0

    @property
    def url(self) -> str:
        """The address of the target."""
        return f"http://127.0.0.1:{self.port}/events"

    def ids(self) -> list[str]:
        """Return the ids of the events in the order of their arrival."""
        return [each.event_id for each in self.received]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            if (begin := await reader.readexactly(1)) != b"P":
                writer.write(b"HTTP/1.1 400 Words\r\n\r\n")  # to a TLS handshake
                return
            head = (begin + await reader.readuntil(b"\r\n\r\n")).decode()
            first, *lines = head.strip().split("\r\n")
            fields = [line.split(": ", 1) for line in lines]
            headers = {name.lower(): value for name, value in fields}
            body = await reader.readexactly(int(headers["content-length"]))
            self.received.append(Received(first.split(" ")[1], headers, body))
            answer = self.answers.pop(0) if self.answers else self.answer
            await answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the service may close the connection at any time
        finally:
            self.open -= 1
            writer.close()


def status(code: int, **headers: str) -> Answer:
    """Respond with a status."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        writer.write(f"HTTP/1.1 {code} Words\r\n{lines}content-length: 0\r\n\r\n".encode())
        await writer.drain()

    return answer


def raw(text: bytes) -> Answer:
    """Respond with these bytes."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(text)
        await writer.drain()

    return answer


async def never(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    """Do not respond until the service closes the connection."""
    await reader.read()


@asynccontextmanager
async def target() -> AsyncIterator[Target]:
    """Run a target until the end of the block."""
    found = Target()
    server = await asyncio.start_server(found.serve, "127.0.0.1", 0)
    found.port = server.sockets[0].getsockname()[1]
    try:
        yield found
    finally:
        server.close()
