"""Group commit: responses that end at the same time are stored together, before their clients receive the end."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta

from lmaas.errors import Unavailable
from lmaas.observability import GatewayMetrics
from lmaas.store.conversations import Item, save_turn
from lmaas.store.database import Database
from lmaas.store.responses import Response, save_together

log = logging.getLogger(__name__)

#: The time for which the end of an answer waits until Postgres has stored the response. Afterwards the client gets it anyway.
STORE_S = 2.0
#: The delay before a failed write is tried again.
AGAIN_S = 1.0
#: The transactions that run at a time. The other connections are for reading.
AT_ONCE = 2
#: The limits of one transaction.
RESPONSES_AT_ONCE = 256
BYTES_AT_ONCE = 4 * 1024 * 1024
#: The limits of what waits for Postgres, of one tenant and of all. Responses beyond them are lost.
MAX_TENANT_BYTES = 16 * 1024 * 1024
MAX_WAITING_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """A response that is to be stored, with the items that it appends to a conversation."""

    response: Response
    conversation_id: str | None = None
    items: Sequence[Item] = ()
    stored: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def size_bytes(self) -> int:
        """What it takes of memory."""
        return self.response.size_bytes + sum(item.size_bytes for item in self.items)


@dataclass(slots=True)
class _Queue:
    """What waits of one tenant, in the order in which the responses ended."""

    turns: deque[Turn] = field(default_factory=deque)
    size_bytes: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """What one tenant contributes to a transaction of several tenants."""

    tenant_id: str
    responses: Sequence[Response]
    stored: "asyncio.Future[None]"


class Writer:
    """Stores the responses of one gateway.

    Each tenant that has something to store has a task, which takes whatever has come while it waited. So the responses of a tenant are
    stored in the order in which they ended. What the tasks of several tenants have taken is one transaction: one for each tenant cost
    four times the CPU time of storing a response. A flood of one tenant delays another one by one transaction, and so does a deletion of a
    tenant that runs. `failed` is called with a task that failed unexpectedly.
    """

    def __init__(
        self, db: Database, metrics: GatewayMetrics, kept_for: timedelta, failed: Callable[["asyncio.Task[None]"], None] | None = None
    ) -> None:
        self._db, self._metrics, self._kept_for, self._failed = db, metrics, kept_for, failed
        self._queues: dict[str, _Queue] = {}
        self._waiting_bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._turns, self._closing = asyncio.Semaphore(AT_ONCE), asyncio.Event()
        #: What waits for the next transaction.
        self._parts: dict[_Part, None] = {}

    async def store(self, tenant_id: str, turn: Turn) -> None:
        """Store a response, and wait for that for at most STORE_S. If Postgres takes longer, it is stored later."""
        queue = self._queues.get(tenant_id)
        size = turn.size_bytes
        if self._waiting_bytes + size > MAX_WAITING_BYTES or (queue is not None and queue.size_bytes + size > MAX_TENANT_BYTES):
            self._lose(tenant_id, turn)
            return
        if queue is None:
            queue = self._queues[tenant_id] = _Queue()
            task = asyncio.create_task(self._write(tenant_id, queue), name=f"responses-{tenant_id}")
            self._tasks.add(task)
            task.add_done_callback(self._done)
        queue.turns.append(turn)
        queue.size_bytes += size
        self._waiting_bytes += size
        await asyncio.wait((turn.stored,), timeout=STORE_S)

    def _lose(self, tenant_id: str, turn: Turn) -> None:
        self._metrics.lost_responses.inc()
        log.error(
            "a response is lost: Postgres was away for too long",
            extra={"tenant_id": tenant_id, "action": "store", "detail": turn.response.id},
        )

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if self._failed is not None:
            self._failed(task)

    async def _write(self, tenant_id: str, queue: _Queue) -> None:
        """Store what waits of a tenant, until nothing is left."""
        while queue.turns:
            try:
                batch = _next_batch(queue.turns)
                await self._save(tenant_id, batch)
            except Unavailable as error:
                log.warning("responses cannot be stored now", extra={"tenant_id": tenant_id, "action": "store", "detail": str(error)})
                with suppress(TimeoutError):
                    async with asyncio.timeout(AGAIN_S):
                        await self._closing.wait()
                        return
                continue
            for _ in batch:
                turn = queue.turns.popleft()
                queue.size_bytes -= turn.size_bytes
                self._waiting_bytes -= turn.size_bytes
                if not turn.stored.done():
                    turn.stored.set_result(None)
        del self._queues[tenant_id]

    async def _save(self, tenant_id: str, batch: Sequence[Turn]) -> None:
        first = batch[0]
        if first.conversation_id is None:
            await self._save_together(tenant_id, [turn.response for turn in batch])
        else:
            async with self._turns:
                await save_turn(self._db, tenant_id, first.response, first.conversation_id, first.items, self._kept_for)

    async def _save_together(self, tenant_id: str, responses: Sequence[Response]) -> None:
        """Store responses together with those that other tenants' tasks have taken meanwhile."""
        own = _Part(tenant_id, responses, asyncio.get_running_loop().create_future())
        self._parts[own] = None
        async with self._turns:
            # Otherwise another task has taken the part along.
            if own in self._parts:
                await self._save_parts(self._next_parts())
        await own.stored

    async def _save_parts(self, parts: Sequence[_Part]) -> None:
        try:
            await save_together(self._db, [(part.tenant_id, part.responses) for part in parts], self._kept_for)
        except Exception as error:  # noqa: BLE001 (it is raised by each of the tasks whose part this is)
            for part in parts:
                part.stored.set_exception(error)
        else:
            for part in parts:
                part.stored.set_result(None)

    def _next_parts(self) -> Sequence[_Part]:
        """Take the parts that wait the longest, as many as one transaction stores."""
        taken: list[_Part] = []
        count = size = 0
        for part in self._parts:
            count += len(part.responses)
            size += sum(response.size_bytes for response in part.responses)
            if taken and (count > RESPONSES_AT_ONCE or size > BYTES_AT_ONCE):
                break
            taken.append(part)
        for part in taken:
            del self._parts[part]
        return taken

    async def close(self) -> None:
        """Give up what cannot be stored now. Waits for the transactions that run."""
        self._closing.set()
        await self.drained()
        for tenant_id, queue in self._queues.items():
            for turn in queue.turns:
                self._lose(tenant_id, turn)

    async def drained(self) -> None:
        """Wait until everything is stored."""
        while self._tasks:
            await asyncio.wait(self._tasks)


def _next_batch(turns: deque[Turn]) -> list[Turn]:
    """Return the turns at the beginning that one transaction stores: one that belongs to a conversation, or some that do not."""
    batch = [turns[0]]
    if turns[0].conversation_id is not None:
        return batch
    size = turns[0].size_bytes
    for index in range(1, min(len(turns), RESPONSES_AT_ONCE)):
        turn = turns[index]
        size += turn.size_bytes
        if turn.conversation_id is not None or size > BYTES_AT_ONCE:
            break
        batch.append(turn)
    return batch
