"""One HTTP exchange with a client: its body, its answer, and whether the client is still there."""

import asyncio
from collections.abc import Callable

from starlette.types import Message, Receive, Scope, Send

from lmaas.http import limited

#: Nginx and its like must not collect a stream before they pass it on.
STREAM_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}


class Call:
    """A client's request and the answer to it. Writing to a client that has gone is no error: it is dropped."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self.request_id: str = scope["request_id"]
        self.started = False
        self.gone = asyncio.Event()
        self._on_gone: list[Callable[[], None]] = []

    @property
    def authorization(self) -> str | None:
        """The `Authorization` header."""
        for name, value in self._scope["headers"]:
            if name == b"authorization":
                text: str = value.decode("latin-1")
                return text
        return None

    @property
    def idempotency_keys(self) -> list[str]:
        """Every `Idempotency-Key` header: nearly always none."""
        return [value.decode("latin-1") for name, value in self._scope["headers"] if name == b"idempotency-key"]

    def send_through(self, wrap: Callable[[Send], Send]) -> None:
        """Have the answer pass what `wrap` makes of the way to the client."""
        self._send = wrap(self._send)

    async def body(self, limit_bytes: int) -> bytes:
        """The whole request body. Raises TooLarge."""
        receive = limited(self._receive, self._scope, limit_bytes)
        parts = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.gone.set()
                break
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                break
        return b"".join(parts)

    def add_to_head(self, lines: bytes) -> None:
        """Send these header lines too, whatever the answer will be: each whole, and made of nothing that came from outside."""
        self._scope["lmaas.head"](lines)

    def watch(self) -> None:
        """Notice from now on when the client goes away. The body must have been read."""
        self._scope["lmaas.watch"](self._leave)

    def on_gone(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have `callback` called once, when the client goes away before its answer is finished; answers how to undo that."""
        if self.gone.is_set():
            callback()
        else:
            self._on_gone.append(callback)

        def undo() -> None:
            if callback in self._on_gone:
                self._on_gone.remove(callback)

        return undo

    async def start(self, status: int, headers: dict[str, str]) -> None:
        """Send status and headers, once."""
        if not self.started:
            self.started = True
            raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
            await self._put({"type": "http.response.start", "status": status, "headers": raw})

    async def write(self, chunk: bytes) -> None:
        """Send a part of the body; waits while the client cannot take more (the server cuts off one that takes nothing)."""
        await self._put({"type": "http.response.body", "body": chunk, "more_body": True})

    async def finish(self, chunk: bytes = b"") -> None:
        """Send the rest of the body. That the client goes away after that means nothing any more."""
        self._on_gone.clear()
        await self._put({"type": "http.response.body", "body": chunk, "more_body": False})

    async def _put(self, message: Message) -> None:
        if not self.gone.is_set():
            await self._send(message)

    def _leave(self) -> None:
        self.gone.set()
        callbacks, self._on_gone = self._on_gone, []
        for callback in callbacks:
            callback()
