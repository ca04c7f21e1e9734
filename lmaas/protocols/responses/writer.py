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

#: The time for which the end of an answer waits until Postgres has stored the response, and for room before. Afterwards the client gets it
#: anyway.
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
        """Its size in memory."""
        return self.response.size_bytes + sum(item.size_bytes for item in self.items)


@dataclass(slots=True)
class _Queue:
    """The waiting responses of one tenant, in the order in which they ended."""

    turns: deque[Turn] = field(default_factory=deque)
    size_bytes: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """The part of one tenant in a transaction of several tenants."""

    tenant_id: str
    responses: Sequence[Response]
    stored: "asyncio.Future[None]"


class Writer:
    """Stores the responses of one gateway.

    Each tenant that has something to store has a task, which takes whatever has come while it waited. So the responses of a tenant are
    stored in the order in which they ended. What the tasks of several tenants have taken is one transaction: one for each tenant cost
    four times the CPU time of storing a response. A flood of one tenant delays another one by one transaction, and so does a deletion of a
    tenant that runs. What cannot be stored for an unexpected reason is lost alone. `failed` is called with a task that failed nevertheless.
    """

    def __init__(
        self, db: Database, metrics: GatewayMetrics, kept_for: timedelta, failed: Callable[["asyncio.Task[None]"], None] | None = None
    ) -> None:
        self._db, self._metrics, self._kept_for, self._failed = db, metrics, kept_for, failed
        self._queues: dict[str, _Queue] = {}
        self._waiting_bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._turns, self._closing = asyncio.Semaphore(AT_ONCE), asyncio.Event()
        #: Responses that wait for room, in the order in which they ended.
        self._without_room: deque[tuple[str, Turn]] = deque()
        #: The parts that wait for the next transaction.
        self._parts: dict[_Part, None] = {}

    async def store(self, tenant_id: str, turn: Turn) -> None:
        """Store a response, and wait for that for at most STORE_S. If Postgres takes longer, it is stored later.

        If there is no room, it waits for that as long, and then is lost.
        """
        if any(other == tenant_id for other, _ in self._without_room) or self._full(tenant_id, turn):
            self._without_room.append((tenant_id, turn))
        else:
            self._add(tenant_id, turn)
        await asyncio.wait((turn.stored,), timeout=STORE_S)
        if (tenant_id, turn) in self._without_room:
            limit = self._full(tenant_id, turn) or "others of the tenant that wait for room"
            self._without_room.remove((tenant_id, turn))
            self._lose(tenant_id, turn, f"it could not wait for Postgres beside {limit}")

    def _full(self, tenant_id: str, turn: Turn) -> str:
        """Return the limit that the turn would exceed, an empty text if it is none. Whatever waits alone is within the limits."""
        queue = self._queues.get(tenant_id)
        if queue is not None and queue.size_bytes and queue.size_bytes + turn.size_bytes > MAX_TENANT_BYTES:
            return f"{MAX_TENANT_BYTES:,} bytes of its tenant"
        if self._waiting_bytes and self._waiting_bytes + turn.size_bytes > MAX_WAITING_BYTES:
            return f"{MAX_WAITING_BYTES:,} bytes of all tenants"
        return ""

    def _add(self, tenant_id: str, turn: Turn) -> None:
        size, queue = turn.size_bytes, self._queues.get(tenant_id)
        if queue is None:
            queue = self._queues[tenant_id] = _Queue()
            task = asyncio.create_task(self._write(tenant_id, queue), name=f"responses-{tenant_id}")
            self._tasks.add(task)
            task.add_done_callback(self._done)
        queue.turns.append(turn)
        queue.size_bytes += size
        self._waiting_bytes += size

    def _make_use_of_room(self) -> None:
        """Add what waits for room and has it now. A tenant's responses stay in order."""
        still: deque[tuple[str, Turn]] = deque()
        full: set[str] = set()
        for tenant_id, turn in self._without_room:
            if tenant_id in full or self._full(tenant_id, turn):
                full.add(tenant_id)
                still.append((tenant_id, turn))
            else:
                self._add(tenant_id, turn)
        self._without_room = still

    def _lose(self, tenant_id: str, turn: Turn, why: str) -> None:
        self._metrics.lost_responses.inc()
        log.error(f"a response is lost: {why}", extra={"tenant_id": tenant_id, "action": "store", "detail": turn.response.id})
        if not turn.stored.done():
            turn.stored.set_result(None)

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if self._failed is not None:
            self._failed(task)

    async def _write(self, tenant_id: str, queue: _Queue) -> None:
        """Store what waits of a tenant, until nothing is left."""
        most = RESPONSES_AT_ONCE
        while queue.turns:
            group = _next_group(queue.turns, most)
            try:
                await self._save(tenant_id, group)
            except Unavailable as error:
                log.warning("responses cannot be stored now", extra={"tenant_id": tenant_id, "action": "store", "detail": str(error)})
                with suppress(TimeoutError):
                    async with asyncio.timeout(AGAIN_S):
                        await self._closing.wait()
                        return
                continue
            except Exception as error:  # noqa: BLE001 (one response must not end the gateway, nor be tried again without end)
                # The error itself may have a tenant's text.
                extra = {"tenant_id": tenant_id, "action": "store", "detail": type(error).__name__}
                log.error("responses cannot be stored for an unexpected reason", extra=extra)  # noqa: TRY400
                if len(group) > 1:
                    most = 1
                    continue
                self._lose(tenant_id, group[0], f"{type(error).__name__} when it was stored")
            for _ in group:
                turn = queue.turns.popleft()
                queue.size_bytes -= turn.size_bytes
                self._waiting_bytes -= turn.size_bytes
                if not turn.stored.done():
                    turn.stored.set_result(None)
            self._make_use_of_room()
        del self._queues[tenant_id]

    async def _save(self, tenant_id: str, group: Sequence[Turn]) -> None:
        first = group[0]
        if first.conversation_id is None:
            await self._save_together(tenant_id, [turn.response for turn in group])
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
            if len(parts) > 1 and not isinstance(error, Unavailable):
                # It may be because of one tenant.
                for part in parts:
                    await self._save_parts([part])
                return
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
                self._lose(tenant_id, turn, "Postgres was away until the gateway stopped")
        while self._without_room:
            self._lose(*self._without_room.popleft(), "Postgres was away until the gateway stopped")

    async def drained(self) -> None:
        """Wait until everything is stored."""
        while self._tasks:
            await asyncio.wait(self._tasks)


def _next_group(turns: deque[Turn], most: int) -> list[Turn]:
    """Return the turns at the beginning that one transaction stores: one that belongs to a conversation, or at most `most` that do not."""
    group = [turns[0]]
    if turns[0].conversation_id is not None:
        return group
    size = turns[0].size_bytes
    for index in range(1, min(len(turns), most)):
        turn = turns[index]
        size += turn.size_bytes
        if turn.conversation_id is not None or size > BYTES_AT_ONCE:
            break
        group.append(turn)
    return group
