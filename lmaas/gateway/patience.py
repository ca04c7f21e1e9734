"""How long the server waits for clients that send slowly or not at all, and how many it takes."""

import asyncio
import resource
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from lmaas.config import Settings
from lmaas.errors import InvalidRequest, LmaasError, Unavailable

#: A client that sends a body sends this much in each of its time spans: a slow line is not a client that holds a connection.
MIN_BODY_BYTES = 4096
#: So many connections more are taken, for those who ask how we are: they must hear it when we are full, too.
SURPLUS = 64
#: And no key is needed for these, nor an engine.
ASKED_WHEN_FULL = (b"/healthz", b"/readyz", b"/metrics")
#: Open files that are not clients' connections or those to engines for them.
OTHER_FILES = 256 + SURPLUS


class RequestTimeout(InvalidRequest):
    """The request did not come in time."""

    kind, status, code, retryable = "request_timeout", HTTPStatus.REQUEST_TIMEOUT, "request_timeout", True


@dataclass(frozen=True, slots=True)
class ClientBounds:
    """In seconds: for a whole head, from its first byte or the connection's beginning; and for each MIN_BODY_BYTES of a body."""

    header_s: float = 10.0
    body_s: float = 30.0
    max_connections: int = 16_384


def client_bounds(settings: Settings) -> ClientBounds:
    """By setting; but no more connections than this process may have files for, one to the client and one to an engine each."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(1, (files - OTHER_FILES) // 2) if files != resource.RLIM_INFINITY else settings.max_connections
    return ClientBounds(settings.header_timeout_s, settings.body_timeout_s, min(settings.max_connections, most))


class PatientProtocol(HttpToolsProtocol):
    """Ends connections whose client is late with a request, and takes no more of them than there may be.

    A timer runs only while a request has come in part: one that comes whole, as nearly all do, costs nothing.
    """

    _reading_headers = True
    _late: asyncio.TimerHandle | None = None
    _awaits_body = False
    #: The exchange during which the timer was started.
    _late_cycle: RequestResponseCycle | None = None
    #: Whether there were too many connections already when it was made.
    _surplus = False
    #: Bytes that have come since the timer was started, and whether we did not read all the while.
    _came = 0
    _paused = False

    def __init__(self, *args: Any, bounds: ClientBounds | None = None, **more: Any) -> None:
        super().__init__(*args, **more)
        self._bounds = bounds or ClientBounds()

    def _refuse(self, error: LmaasError) -> None:
        """Answer, if nothing else is under way, and close."""
        raise NotImplementedError

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self._surplus = len(self.connections) > self._bounds.max_connections
        if len(self.connections) > self._bounds.max_connections + SURPLUS:
            self._refuse_surplus()
        else:
            self._wait(0)

    def _refuses(self, url: bytes) -> bool:
        """Whether this request is on a connection too many, and has been refused."""
        if not self._surplus or len(self.connections) <= self._bounds.max_connections or url.partition(b"?")[0] in ASKED_WHEN_FULL:
            return False
        self._refuse_surplus()
        return True

    def _refuse_surplus(self) -> None:
        self._refuse(Unavailable("Too many connections are open. Please try again.", code="too_many_connections", retry_after_s=5))

    def on_message_complete(self) -> None:
        """The request is whole. Uvicorn takes no notice if it has been answered already."""
        super().on_message_complete()
        self.cycle.more_body = False

    def data_received(self, data: bytes) -> None:
        """Bytes from the client."""
        awaited_body = self.cycle is not None and self.cycle.more_body
        super().data_received(data)
        cycle = self.cycle
        if cycle is not None and not cycle.more_body and not cycle.response_complete:
            self._end_wait()  # the request is whole, and being answered
        elif self.transport.is_closing():
            pass
        elif cycle is not None and awaited_body and not cycle.more_body and not self._reading_headers:
            # The rest of a request that was answered before it was whole: now the connection is idle.
            self._end_wait()
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        else:
            self._wait(len(data))

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone, or we have cut it off."""
        self._end_wait()
        super().connection_lost(exc)

    def _wait(self, came: int) -> None:
        body = self.cycle is not None and self.cycle.more_body and not self._reading_headers
        if self._late is None or body is not self._awaits_body or self._late_cycle is not self.cycle:
            self._end_wait()
            self._late_cycle = self.cycle
            self._awaits_body, self._came, self._paused = body, 0, False
            self._late = self.loop.call_later(self._bounds.body_s if body else self._bounds.header_s, self._is_late)
        self._came += came
        self._paused = self._paused or self.flow.read_paused

    def _end_wait(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = self._late_cycle = None

    def _is_late(self) -> None:
        self._late = None
        cycle, bounds = self.cycle, self._bounds
        if self.transport.is_closing() or (cycle is not None and not cycle.more_body and not cycle.response_complete):
            return
        if not self._awaits_body:
            if self._came:
                self._refuse(RequestTimeout(f"The request's headers did not come within {bounds.header_s:g} s.", retry_after_s=1))
            else:
                self.transport.close()
            return
        if self._came >= MIN_BODY_BYTES or self._paused or self.flow.read_paused or cycle.waiting_for_100_continue:
            self._wait(0)
            return
        if cycle.response_complete:
            # It has had its answer: another one would be taken for the next request's.
            self.transport.close()
            return
        self._refuse(RequestTimeout(f"The request's body did not go on within {bounds.body_s:g} s.", retry_after_s=1))
