"""Limits on clients that send slowly or not at all, and on the number of connections."""

import asyncio
import resource
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from lmaas.config import Settings
from lmaas.errors import InvalidRequest, LmaasError, Unavailable
from lmaas.web.upgrades import UpgradeIgnoringProtocol

#: A client must send at least this much of a body in each `body_s`, so that a slow line is not mistaken for an abandoned connection.
MIN_BODY_BYTES = 4096
#: Connections above the limit that are accepted for health checks and metrics, which must work when the gateway is full.
SURPLUS = 64
#: The paths that are served on those connections. They need no key and no engine.
SERVED_WHEN_FULL = (b"/health", b"/healthz", b"/readyz", b"/metrics")
#: Open files that are neither client connections nor the engine connections that serve them.
OTHER_FILES = 256 + SURPLUS


class RequestTimeout(InvalidRequest):
    """The request did not arrive in time."""

    kind, status, code, retryable = "request_timeout", HTTPStatus.REQUEST_TIMEOUT, "request_timeout", True


@dataclass(frozen=True, slots=True)
class ClientBounds:
    """Limits of one server. `header_s` is for a whole head, from its first byte or the start of the connection, `body_s` for each
    MIN_BODY_BYTES of a body."""

    header_s: float = 10.0
    body_s: float = 30.0
    max_connections: int = 16_384


def client_bounds(settings: Settings) -> ClientBounds:
    """Return the limits of the settings. The number of connections is also limited by the files that this process may open: each request
    needs one connection to its client and one to an engine."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(1, (files - OTHER_FILES) // 2) if files != resource.RLIM_INFINITY else settings.max_connections
    return ClientBounds(settings.header_timeout_s, settings.body_timeout_s, min(settings.max_connections, most))


class SlowClientProtocol(UpgradeIgnoringProtocol):
    """Closes connections whose client is late with a request, and limits the number of connections.

    A timer runs only while a request is incomplete, so a request that arrives whole, as nearly all do, costs nothing.
    """

    _reading_headers = True
    deadline_timer: asyncio.TimerHandle | None = None
    _awaits_body = False
    #: The exchange during which the timer was started.
    _deadline_cycle: RequestResponseCycle | None = None
    #: True if the number of connections was above the limit when this one was accepted.
    _surplus = False
    #: The bytes received since the timer was started, and whether reading was paused in that time.
    _came = 0
    _paused = False

    def __init__(self, *args: Any, bounds: ClientBounds | None = None, **more: Any) -> None:
        super().__init__(*args, **more)
        self._bounds = bounds or ClientBounds()

    def _refuse(self, error: LmaasError) -> None:
        """Send the error unless another response is under way, and close the connection."""
        raise NotImplementedError

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Handle a new connection."""
        super().connection_made(transport)
        self._surplus = len(self.connections) > self._bounds.max_connections
        if len(self.connections) > self._bounds.max_connections + SURPLUS:
            self._refuse_surplus()
        else:
            self._wait(0)

    def _refuses(self, url: bytes) -> bool:
        """Refuse a request on a surplus connection, unless there is room by now or its path is always served. Return whether it did."""
        if not self._surplus or len(self.connections) <= self._bounds.max_connections or url.partition(b"?")[0] in SERVED_WHEN_FULL:
            return False
        self._refuse_surplus()
        return True

    def _refuse_surplus(self) -> None:
        self._refuse(
            Unavailable("The gateway has too many open connections. Retry after 5 s.", code="too_many_connections", retry_after_s=5)
        )

    def data_received(self, data: bytes) -> None:
        """Handle bytes from the client."""
        awaited_body = self.cycle is not None and self.cycle.more_body
        super().data_received(data)
        cycle = self.cycle
        if cycle is not None and not cycle.more_body and not cycle.response_complete:
            self._end_wait()  # the request is complete and is being answered
        elif self.transport.is_closing():
            pass
        elif cycle is not None and awaited_body and not cycle.more_body and not self._reading_headers:
            # This was the rest of a request that was answered before it was complete. The connection is idle now.
            self._end_wait()
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        else:
            self._wait(len(data))

    def connection_lost(self, exc: Exception | None) -> None:
        """Handle the end of the connection, whichever side closed it."""
        self._end_wait()
        super().connection_lost(exc)

    def _wait(self, came: int) -> None:
        body = self.cycle is not None and self.cycle.more_body and not self._reading_headers
        if self.deadline_timer is None or body is not self._awaits_body or self._deadline_cycle is not self.cycle:
            self._end_wait()
            self._deadline_cycle = self.cycle
            self._awaits_body, self._came, self._paused = body, 0, False
            self.deadline_timer = self.loop.call_later(self._bounds.body_s if body else self._bounds.header_s, self.on_deadline)
        self._came += came
        self._paused = self._paused or self.flow.read_paused

    def _end_wait(self) -> None:
        if self.deadline_timer is not None:
            self.deadline_timer.cancel()
            self.deadline_timer = self._deadline_cycle = None

    def on_deadline(self) -> None:
        """Close the connection if its client is late, else wait once more."""
        self.deadline_timer = None
        cycle, bounds = self.cycle, self._bounds
        if self.transport.is_closing() or (cycle is not None and not cycle.more_body and not cycle.response_complete):
            return
        if not self._awaits_body:
            if self._came:
                self._refuse(RequestTimeout(f"The request's headers did not arrive within {bounds.header_s:g} s.", retry_after_s=1))
            else:
                self.transport.close()
            return
        if self._came >= MIN_BODY_BYTES or self._paused or self.flow.read_paused or cycle.waiting_for_100_continue:
            self._wait(0)
            return
        if cycle.response_complete:
            # The request was answered already. The client would take a second response for that of its next request.
            self.transport.close()
            return
        message = f"Less than {MIN_BODY_BYTES} bytes of the request's body arrived within {bounds.body_s:g} s."
        self._refuse(RequestTimeout(message, retry_after_s=1))
