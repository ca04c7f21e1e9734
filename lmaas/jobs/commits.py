"""Group commit: lines that end at about the same time are stored in one transaction."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from lmaas.errors import Unavailable
from lmaas.jobs.runner import until_set
from lmaas.states import LineState
from lmaas.store.batch_lines import EndedLine, end_lines
from lmaas.store.database import Database
from lmaas.store.line_leases import LeasedLine, give_back_lines

log = logging.getLogger(__name__)

#: The time for which the first line waits for others that end: a transaction costs as much as three lines. A slot does not wait for that.
GATHER_S = 0.2
#: The limits of one transaction.
LINES_AT_ONCE = 512
BYTES_AT_ONCE = 8 * 1024 * 1024
#: The pause before a transaction is tried again.
AGAIN_S = 0.5
#: While the answers that wait have more bytes than this, because Postgres is slow or away, no more lines are begun.
MAX_WAITING_BYTES = 64 * 1024 * 1024
#: The interval at which a line that waits for this checks whether it is to be given back.
LOOK_S = 0.5

#: The error of a line whose answer cannot be stored.
UNSTORABLE = b'{"code":"internal_error","message":"The service failed to store the answer of this line. It is not charged."}'

Item = TypeVar("Item")


class Commits:
    """Stores the ends of one runner's lines, and gives back those that are to be run again.

    While Postgres is away, they wait, and no more lines are begun once their answers have too many bytes. `stored` is called with the lines
    whose end was stored or given up.
    """

    def __init__(self, db: Database, runner_id: str, stored: Callable[[Sequence[EndedLine | LeasedLine]], None]) -> None:
        self._db, self._runner_id, self._stored = db, runner_id, stored
        self._ended: deque[EndedLine] = deque()
        self._back: deque[LeasedLine] = deque()
        self._bytes = 0
        self._less = asyncio.Event()
        self._wake, self._idle = asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._hurry = False
        #: For the metrics: transactions.
        self.count = 0

    def end(self, line: EndedLine) -> None:
        """Store how a line ended, soon."""
        self._ended.append(line)
        self._bytes += line.size_bytes
        self._woken()

    async def room_for(self, leaving: asyncio.Event) -> None:
        """Wait while the answers that wait have too many bytes, at most until `leaving` is set."""
        while self._bytes > MAX_WAITING_BYTES and not leaving.is_set():
            self._less.clear()
            await until_set(self._less, LOOK_S)

    def give_back(self, line: LeasedLine) -> None:
        """Give back a line, soon."""
        self._back.append(line)
        self._woken()

    def _woken(self) -> None:
        self._idle.clear()
        self._wake.set()

    async def drained(self) -> None:
        """Wait until everything is stored. From now on, nothing waits for others."""
        self._hurry = True
        await self._idle.wait()

    async def run(self) -> None:
        """Store what comes, until cancelled."""
        while True:
            if not self._ended and not self._back:
                self._idle.set()
                self._wake.clear()
                await self._wake.wait()
            if not self._hurry and len(self._ended) < LINES_AT_ONCE:
                await asyncio.sleep(GATHER_S)
            try:
                await self._store()
            except Unavailable as error:
                log.warning("ends of lines cannot be stored now", extra={"action": "store", "detail": str(error)})
                await asyncio.sleep(AGAIN_S)

    async def _store(self) -> None:
        while ended := _first(self._ended, LINES_AT_ONCE, BYTES_AT_ONCE, lambda line: line.size_bytes):
            await self._end(ended)
            self._bytes -= sum(line.size_bytes for line in ended)
            self._less.set()
            self._done(self._ended, ended)
        while back := _first(self._back, LINES_AT_ONCE, LINES_AT_ONCE, lambda _: 1):
            await give_back_lines(self._db, self._runner_id, back)
            self._done(self._back, back)

    def _done(self, queue: deque[Item], items: Sequence[Item]) -> None:
        self.count += 1
        for _ in items:
            queue.popleft()
        self._stored(items)  # type: ignore[arg-type]  # a deque of either kind

    async def _end(self, lines: Sequence[EndedLine]) -> None:
        try:
            await end_lines(self._db, self._runner_id, lines)
        except Unavailable:
            raise
        except Exception as error:  # noqa: BLE001 (one line must not end the runner, nor be tried again without end)
            if len(lines) > 1:
                for line in lines:
                    await self._end([line])
                return
            line = lines[0]
            # The error itself may have a tenant's text.
            extra = {"tenant_id": line.tenant_id, "action": "store", "detail": f"{line.batch_id}: {type(error).__name__}"}
            log.error("the end of a line cannot be stored for an unexpected reason", extra=extra)  # noqa: TRY400 (a traceback may have it too)
            if line.answer != UNSTORABLE:
                # Its attempt stays a wasted one, which is charged nothing.
                failed = replace(line, state=LineState.FAILED, request_id=None, status_code=None, answer=UNSTORABLE, event=None, turn=None)
                await self._end([failed])


def _first(queue: deque[Item], count: int, size: int, size_of: Callable[[Item], int]) -> list[Item]:
    """Return the items at the beginning that one transaction takes."""
    found: list[Item] = []
    for item in queue:
        size -= size_of(item)
        if found and (size < 0 or len(found) >= count):
            break
        found.append(item)
    return found
