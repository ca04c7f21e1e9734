"""One HTTP exchange with a client: its body, its response, and whether the client is still connected."""

from collections.abc import Mapping

from starlette.types import Message, Receive, Scope, Send

from lmaas.http import api_key, limited
from lmaas.inference.sink import Receiver


class Call(Receiver):
    """A client's request, and the sink of its answer. Writing to a client that has disconnected has no effect and raises no error."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        super().__init__()
        self._scope, self._receive, self._send = scope, receive, send
        self.request_id: str = scope["request_id"]
        self.started = False

    @property
    def api_key(self) -> str | None:
        """The API key in the request's headers. Raises Unauthenticated if it has two different ones."""
        return api_key(self._scope["headers"])

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """The request's headers, with lower-case names."""
        headers: list[tuple[bytes, bytes]] = self._scope["headers"]
        return headers

    def note(self, name: str, value: object) -> None:
        """Leave something in the request's scope for its line in the log and its trace."""
        self._scope[name] = value

    @property
    def idempotency_keys(self) -> list[str]:
        """The values of all `Idempotency-Key` headers."""
        return [value.decode("latin-1") for name, value in self._scope["headers"] if name == b"idempotency-key"]

    async def body(self, limit_bytes: int) -> bytes:
        """Read the whole request body, unpacked. Raises TooLarge, or InvalidRequest for an encoding that cannot be read."""
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
        """Send these header lines with the response: each ends with CRLF and contains nothing from outside."""
        self._scope["lmaas.head"](lines)

    def watch(self) -> None:
        """Begin to notice that the client disconnects. The body must have been read."""
        self._scope["lmaas.watch"](self.leave)

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """Send status and headers, once."""
        if not self.started:
            self.started = True
            raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
            await self._put({"type": "http.response.start", "status": status, "headers": raw})

    async def write(self, chunk: bytes) -> None:
        """Send a part of the body. Waits while the client reads too slowly; the server cuts off a client that reads nothing."""
        await self._put({"type": "http.response.body", "body": chunk, "more_body": True})

    async def finish(self, chunk: bytes = b"", *, complete: bool = True) -> None:
        """Send the rest of the body. After that it no longer matters when the client disconnects. `complete` is for other sinks."""
        self.served()
        await self._put({"type": "http.response.body", "body": chunk, "more_body": False})

    async def _put(self, message: Message) -> None:
        if not self.gone.is_set():
            await self._send(message)
