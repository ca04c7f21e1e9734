"""The destination of the answer to an inference. A socket of a client is one kind of sink; memory is another."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Protocol

#: The last one keeps nginx and other proxies from buffering a stream.
STREAM_HEADERS: Mapping[str, str] = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


class ReceiverGone(Exception):
    """The receiver of an answer has gone, so there is nothing left to do for it."""


class Sink(Protocol):
    """Takes one answer: its head, its pieces, its end. Writing to a receiver that has gone has no effect and raises no error."""

    @property
    def gone(self) -> asyncio.Event:
        """Set once the receiver has gone."""

    @property
    def started(self) -> bool:
        """True if the head has been sent."""

    def watch(self) -> None:
        """Begin to notice that the receiver goes."""

    def on_gone(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` once, when the receiver goes before the answer is finished. Returns a function that undoes this."""

    def add_to_head(self, lines: bytes) -> None:
        """Send these header lines with the head: each ends with CRLF and contains nothing from outside."""

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """Send an HTTP status and headers, once."""

    async def write(self, chunk: bytes) -> None:
        """Send a part of the body."""

    async def finish(self, chunk: bytes = b"", *, complete: bool = True) -> None:
        """Send the rest of the body. `complete` is false for a stream that ends with an error."""


class Receiver:
    """The receiver of an answer, which may go before the answer is finished. The kinds of sinks share this."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self._on_gone: list[Callable[[], None]] = []

    def on_gone(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` once, when the receiver goes before the answer is finished. Returns a function that undoes this."""
        if self.gone.is_set():
            callback()
        else:
            self._on_gone.append(callback)

        def undo() -> None:
            if callback in self._on_gone:
                self._on_gone.remove(callback)

        return undo

    def leave(self) -> None:
        """Record that the receiver has gone, and call the callbacks."""
        self.gone.set()
        callbacks, self._on_gone = self._on_gone, []
        for callback in callbacks:
            callback()

    def served(self) -> None:
        """Forget the callbacks: from now on it no longer matters when the receiver goes."""
        self._on_gone.clear()


class Collected(Receiver):
    """A sink in memory. `leave` ends the inference, whose answer is not needed any longer."""

    def __init__(self) -> None:
        super().__init__()
        self.started = False
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        #: True if the answer has ended, and true if it ended without an error.
        self.finished = self.complete = False

    def watch(self) -> None:
        """Do nothing: `leave` is noticed in any case."""

    def add_to_head(self, lines: bytes) -> None:
        """Keep these lines as headers."""
        for line in lines.decode("latin-1").split("\r\n"):
            name, colon, value = line.partition(": ")
            if colon:
                self.headers[name] = value

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """Keep the status and the headers."""
        if not self.started:
            self.started, self.status = True, status
            self.headers |= headers

    async def write(self, chunk: bytes) -> None:
        """Keep a part of the body."""
        self.body += chunk

    async def finish(self, chunk: bytes = b"", *, complete: bool = True) -> None:
        """Keep the rest of the body."""
        self.served()
        self.body += chunk
        self.finished, self.complete = True, complete
