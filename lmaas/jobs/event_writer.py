"""Group commit of the events of running responses: what the responses of one runner have written is logged at most once a second."""

import asyncio
import logging
from collections.abc import Mapping

from lmaas.errors import Unavailable
from lmaas.inference.sink import Receiver
from lmaas.store.background import Lease, Run, add_events
from lmaas.store.database import Database
from lmaas.store.event_logs import Piece

log = logging.getLogger(__name__)

#: The interval of the transactions.
LOG_EVERY_S = 1.0
#: The bytes of one response's events that are logged. A log that would have more is not continued.
MAX_LOG_BYTES = 16 * 1024 * 1024
#: The bytes of one response's events that wait for Postgres. With more, its engine waits too.
MAX_WAITING_BYTES = 1024 * 1024
_END = b"\n\n"


class EventSink(Receiver):
    """The sink of one run. Its events are numbered from the run's first on, and logged if the response was created with a stream.

    Only whole events are written to it, because `start` is never called.
    """

    #: The errors of a run are events of its answer.
    started = True

    def __init__(self, lease: Lease, run: Run) -> None:
        super().__init__()
        self.lease = lease
        self._is_logged = run.is_streamed
        #: True if an engine has begun to write, and true if that has been recorded.
        self._has_begun = self._is_recorded = False
        #: The piece that is being logged, which stays as it is until that has succeeded, and the events that follow it.
        self._piece: Piece | None = None
        self._waiting: list[bytes] = []
        self._waiting_bytes = self._logged_bytes = 0
        #: The number of the next event that is logged.
        self.next_event = run.next_event
        #: False once events were left out.
        self.is_whole = True
        self._room = asyncio.Event()
        self._room.set()

    def watch(self) -> None:
        """Do nothing: `leave` is noticed in any case."""

    def add_to_head(self, lines: bytes) -> None:
        """Do nothing: there is no head."""

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """Do nothing: there is no head."""

    async def write(self, chunk: bytes) -> None:
        """Take events. Waits while too many wait to be logged."""
        if chunk:
            self.add(chunk)
            await self._room.wait()

    async def finish(self, chunk: bytes = b"", *, complete: bool = True) -> None:
        """Take the last events."""
        self.served()
        if chunk:
            self.add(chunk)

    def leave(self) -> None:
        """End the run, whose answer is not needed any longer."""
        self._room.set()
        super().leave()

    def add(self, events: bytes) -> None:
        """Take events."""
        self._has_begun = True
        if not self._is_logged:
            return
        if self._logged_bytes + self._waiting_bytes + len(events) > MAX_LOG_BYTES:
            self._is_logged = self.is_whole = False
            self._waiting.clear()
            self._waiting_bytes = 0
            return
        self._waiting.append(events)
        self._waiting_bytes += len(events)
        if self._waiting_bytes > MAX_WAITING_BYTES and not self.gone.is_set():
            self._room.clear()

    def next_piece(self) -> Piece | None:
        """Return what is to be logged now, if there is something. The same is returned until `logged` is called."""
        if self._piece is None and (self._waiting or (self._has_begun and not self._is_recorded)):
            events = b"".join(self._waiting)
            first = self.next_event
            self.next_event += events.count(_END)
            self._piece = Piece(first, self.next_event - 1, events)
            self._logged_bytes += len(events)
            self._waiting.clear()
            self._waiting_bytes = 0
        return self._piece

    def logged(self) -> None:
        """Record that the piece is logged."""
        self._piece, self._is_recorded = None, True
        self._room.set()

    def rest(self) -> list[Piece]:
        """Return everything that may not be logged yet, in pieces with events."""
        pieces = []
        while (piece := self.next_piece()) is not None:
            if piece.events:
                pieces.append(piece)
            self.logged()
        return pieces


class EventWriter:
    """Logs what the runs of one runner write. `turn` is held by transactions that change a log, so that its events stay in order."""

    def __init__(self, db: Database, runner_id: str) -> None:
        self._db, self._runner_id = db, runner_id
        self._sinks: dict[EventSink, None] = {}
        self.turn = asyncio.Lock()

    def add(self, sink: EventSink) -> None:
        """Log what this sink takes, from now on."""
        self._sinks[sink] = None

    def remove(self, sink: EventSink) -> None:
        """Log nothing more of this sink."""
        self._sinks.pop(sink, None)

    async def run(self) -> None:
        """Log once a second, until cancelled."""
        while True:
            await asyncio.sleep(LOG_EVERY_S)
            try:
                await self.write()
            except Unavailable as error:
                log.warning("events cannot be logged now", extra={"action": "log", "detail": str(error)})

    async def write(self) -> None:
        """Log what waits. Raises Unavailable; then it waits on."""
        async with self.turn:
            pieces: dict[str, list[tuple[Lease, Piece]]] = {}
            sinks = [sink for sink in self._sinks if sink.next_piece() is not None]
            for sink in sinks:
                piece = sink.next_piece()
                if piece is not None:
                    pieces.setdefault(sink.lease.tenant_id, []).append((sink.lease, piece))
            if pieces:
                await add_events(self._db, self._runner_id, pieces)
                for sink in sinks:
                    sink.logged()
