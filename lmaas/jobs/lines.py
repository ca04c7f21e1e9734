"""Leases lines of batches as far as engines have room for them, reads them, and has them run."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine, Mapping
from typing import Any

from lmaas.errors import LmaasError, NotFound, Unavailable
from lmaas.files.service import Files
from lmaas.inference.observers import Observers
from lmaas.inference.protocol import AnyProtocol
from lmaas.inference.serving import Inferences
from lmaas.jobs.attempts import Attempts, ended
from lmaas.jobs.budgets import Budgets
from lmaas.jobs.commits import Commits
from lmaas.jobs.held import HeldLine, HeldLines, PoolCount
from lmaas.jobs.keys import Keys
from lmaas.jobs.metrics import JobMetrics
from lmaas.jobs.runner import until_set
from lmaas.jobs.turns import shares
from lmaas.jobs.window import Room, Window
from lmaas.metering.usage import CANCELLED, PUT_BACK, STOPPED
from lmaas.scheduling.client import Scheduler
from lmaas.store.database import Database
from lmaas.store.line_leases import LARGE_BYTES, Offer, backlog, claim_lines, give_back_lines, leased_lines, stop_batch, stopped

log = logging.getLogger(__name__)

#: The intervals between reads of the backlog, and of the room of the engines, which is read more often while lines end.
BACKLOG_S, LOOK_S, MIN_LOOK_S = 1.0, 0.5, 0.1
#: The interval between reads of the room of a pool without a ready engine.
COLD_LOOK_S = 2.0
#: The interval between checks for batches that were cancelled or have expired.
STOP_LOOK_S = 0.75
#: The lines that a runner leases at most, of all pools and of one.
MAX_LINES, MAX_POOL_LINES = 2_048, 1_024
#: The lines with which several runners were lost that a runner leases at most.
MAX_SUSPECTS = 4
#: The lines that are read from a file at a time.
READ_AT_ONCE = 256
#: The maximum number of times that lines of other batches are leased instead of those that are left out.
MAX_ROUNDS = 3
#: The time that engines have to end attempts that are broken off, with the exact usage. Delivery waits as long.
LEAVE_S = 4.0
#: The time after which lines are given back that wait for a pool without a ready engine.
COLD_S = 3.0
#: The pause after a failure.
AGAIN_S = 1.0
FILE_GONE = "input_file_not_found"


class LineWorker:
    """Runs the lines of batches."""

    def __init__(
        self,
        db: Database,
        files: Files,
        scheduler: Scheduler,
        inferences: Inferences,
        protocols: Mapping[str, AnyProtocol],
        keys: Keys,
        metrics: JobMetrics,
        drain_s: float,
        observers: Observers,
    ) -> None:
        self._db, self._files, self._scheduler, self._inferences = db, files, scheduler, inferences
        self._observers = observers
        self._protocols, self._keys, self._metrics, self._drain_s = protocols, keys, metrics, drain_s

    async def run(self, runner_id: str, stopping: asyncio.Event) -> None:
        """Run lines until `stopping` is set. Those that run then are given back at once."""
        held = HeldLines()
        commits = Commits(self._db, runner_id, held.remove)
        budgets = Budgets(self._inferences.months)
        attempts = Attempts(self._db, self._inferences, self._protocols, self._keys, held, commits, budgets, self._metrics, self._observers)
        feeder = Feeder(runner_id, self._db, self._files, self._scheduler, held, attempts, self._drain_s + COLD_S)
        self._metrics.holds(held, commits, feeder.windows)
        try:
            async with asyncio.TaskGroup() as group:
                storing = group.create_task(commits.run(), name="commit-lines")
                leading = [group.create_task(feeder.run(), name="lease-lines"), group.create_task(self._watch(held), name="watch-batches")]
                await stopping.wait()
                for task in leading:
                    task.cancel()
                await feeder.leave()
                # If Postgres is away, what is leased is free once this runner counts as lost.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._drain_s):
                        await commits.drained()
                storing.cancel()
        finally:
            await feeder.leave()

    async def _watch(self, held: HeldLines) -> None:
        """Have lines given back whose batch was cancelled, has expired or is gone, and those not begun whose batch was stopped."""
        while True:
            batches = list({line.batch for line in held})
            try:
                found = await stopped(self._db, batches) if batches else {}
                for line in held:
                    if line.batch in found and not (found[line.batch] and (line.runs or line.ended)):
                        line.leave(CANCELLED)
            except Unavailable as error:
                log.warning("batches cannot be read now", extra={"action": "watch", "detail": str(error)})
            await asyncio.sleep(STOP_LOOK_S)


class Feeder:
    """Leases lines and starts them, for one runner."""

    def __init__(
        self, runner_id: str, db: Database, files: Files, scheduler: Scheduler, held: HeldLines, attempts: Attempts, drain_s: float
    ) -> None:
        self._runner_id, self._db, self._files, self._scheduler = runner_id, db, files, scheduler
        self._held, self._attempts, self._drain_s = held, attempts, drain_s
        self.windows: dict[str, Window] = {}
        #: The lines that were leased for each tenant. It is halved now and then, so that the past counts less.
        self._served: dict[str, int] = {}
        self._offers: list[Offer] = []
        self._read_at = float("-inf")
        #: True if lines may be leased that are not held, because Postgres did not reply.
        self._in_doubt = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Lease and start lines until cancelled."""
        while True:
            self._wake.clear()
            try:
                await self.feed(time.monotonic())
            except Unavailable as error:
                log.warning("lines cannot be leased now", extra={"action": "lease", "detail": str(error)})
                await asyncio.sleep(AGAIN_S)
            await asyncio.sleep(MIN_LOOK_S)
            await until_set(self._wake, LOOK_S)

    async def feed(self, now: float) -> None:
        """Lease and start what the engines of each pool have room for. Raises Unavailable, and LeaseLost."""
        if self._in_doubt:
            await self._give_back_unknown()
        if now - self._read_at >= BACKLOG_S:
            self._offers, self._read_at = await backlog(self._db), now
        pools: dict[str, list[Offer]] = {}
        for offer in self._offers:
            if offer.endpoint not in self._attempts.protocols:
                continue  # of a newer release
            pools.setdefault(offer.pool_id, []).append(offer)
        counts = self._held.counted()
        for pool_id in self.windows.keys() - pools.keys() - counts.keys():
            del self.windows[pool_id]
        none = PoolCount()
        # Pools with the fewest lines come first, because the bound of all lines may not be enough for all pools.
        for pool_id in sorted(pools.keys() | counts.keys(), key=lambda pool_id: counts.get(pool_id, none).held):
            window, count = self.windows.setdefault(pool_id, Window()), counts.get(pool_id, none)
            window.observe(count.begun, count.put_back, now)
            if count.held or now >= window.idle_until:
                await self._feed_pool(pool_id, pools.get(pool_id, []), count, now)

    async def _feed_pool(self, pool_id: str, offers: list[Offer], count: PoolCount, now: float) -> None:
        window = self.windows[pool_id]
        try:
            room = await self._room(pool_id)
        except Unavailable as error:
            # Perhaps only for this pool, so the others go on.
            window.idle_until = now + COLD_LOOK_S
            log.warning("lines of a pool cannot be leased now", extra={"action": "lease", "pool_id": pool_id, "detail": str(error)})
            return
        window.idle_until = now + (LOOK_S if room.ready else COLD_LOOK_S)
        if (cold_s := window.cold_s(room, now)) > COLD_S:
            # The controller decides by what waits in the tables whether it starts an engine. A line that has begun may run on an engine
            # that drains, or wait again because its engine was lost.
            for line in self._held:
                if line.pool_id == pool_id and (not line.runs or cold_s > self._drain_s):
                    line.leave(PUT_BACK)
        wanted = window.wanted(room, count.waiting)
        wanted = min(wanted, MAX_LINES - len(self._held), MAX_POOL_LINES - count.held)
        full = self._held.without_room(pool_id)
        offers = [offer for offer in offers if offer.tenant_id not in full]
        for _ in range(MAX_ROUNDS):
            counts = shares(offers, wanted, self._served) if wanted > 0 else {}
            if not counts:
                return
            found = await self._lease(pool_id, offers, counts)
            left_out = {batch for batch, count in counts.items() if len(found.get(batch, ())) < count}
            if not left_out:
                return
            self._read_at = float("-inf")
            wanted -= sum(map(len, found.values()))
            offers = [offer for offer in offers if (offer.tenant_id, offer.batch_id) not in left_out]

    async def _lease(
        self, pool_id: str, offers: list[Offer], counts: Mapping[tuple[str, str], int]
    ) -> Mapping[tuple[str, str], list[HeldLine]]:
        """Lease so many lines of each batch, or fewer, and have them read."""
        suspects = MAX_SUSPECTS - self._held.suspects
        self._in_doubt = True
        leases = await claim_lines(self._db, self._runner_id, pool_id, counts, self._held.large_bytes, suspects)
        self._in_doubt = False
        by_batch: dict[tuple[str, str], list[HeldLine]] = {}
        facts = {(offer.tenant_id, offer.batch_id): offer for offer in offers}
        for lease in leases:
            line = HeldLine(lease, facts[lease.tenant_id, lease.batch_id])
            self._held.add(line)
            self._served[lease.tenant_id] = self._served.get(lease.tenant_id, 0) + 1
            by_batch.setdefault(line.batch, []).append(line)
        self._offers = [
            offer._replace(pending=offer.pending - len(by_batch.get((offer.tenant_id, offer.batch_id), ())))
            if offer.pool_id == pool_id
            else offer
            for offer in self._offers
        ]
        if sum(self._served.values()) > MAX_LINES:
            self._served = {tenant_id: count // 2 for tenant_id, count in self._served.items() if count > 1}
        for lines in by_batch.values():
            # Small ones do not wait for large ones.
            large = [line for line in lines if line.lease.byte_length > LARGE_BYTES]
            for line in large:
                line.without_room = True
            for portion in ([line for line in lines if not line.without_room], large):
                if portion:
                    self._start(self._read(portion.copy()))
        return by_batch

    async def _give_back_unknown(self) -> None:
        """Give back lines that were leased although Postgres did not reply. Raises Unavailable."""
        unknown = [lease for lease in await leased_lines(self._db, self._runner_id) if not self._held.holds(lease)]
        # A line whose end was stored meanwhile is not leased any more, so it stays as it is.
        if unknown:
            await give_back_lines(self._db, self._runner_id, unknown)
        self._in_doubt = False

    async def _room(self, pool_id: str) -> Room:
        found = await self._scheduler.room(pool_id)
        return Room(found["ready"], found["slots"], found["room"], found["queued"])

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        self._wake.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("a part of the runner failed", exc_info=error)
            raise SystemExit(1)

    async def _read(self, lines: list[HeldLine]) -> None:
        """Read leased lines of one batch, and start each."""
        while lines:
            portion = [lines.pop(0)]
            if not await self._held.room_for(portion[0]):
                self._attempts.give_back(portion[0])
                continue
            while lines and len(portion) < READ_AT_ONCE and self._held.has_room(lines[0]):
                portion.append(lines.pop(0))
            await self._read_portion(portion)

    async def _read_portion(self, portion: list[HeldLine]) -> None:
        offer = portion[0].offer
        ranges = [(line.lease.byte_offset, line.lease.byte_length) for line in portion]
        while not portion[0].leaving.is_set():
            try:
                file = await self._files.get(offer.tenant_id, offer.input_file_id or "")
                texts = await self._files.read(file, ranges)
            except NotFound:
                message = f"The input file '{offer.input_file_id}' was deleted or has expired while the batch ran."
                if await self._stopped(offer, message):
                    break
            except LmaasError as error:
                log.warning("lines cannot be read now", extra={"tenant_id": offer.tenant_id, "action": "read", "detail": str(error)})
            else:
                for line, text in zip(portion, texts, strict=True):
                    line.text = text
                    self._start(self._attempts.run(line))
                return
            await until_set(portion[0].leaving, AGAIN_S)
        for line in portion:
            self._held.forget_text(line)
            self._attempts.give_back(line)

    async def _stopped(self, offer: Offer, message: str) -> bool:
        try:
            await stop_batch(self._db, offer.tenant_id, offer.batch_id, FILE_GONE, message)
        except Unavailable:
            return False
        return True

    async def leave(self) -> None:
        """Have every line given back: engines end what runs, and report its exact usage."""
        for line in self._held:
            line.leave(STOPPED)
        while self._tasks:
            await ended(set(self._tasks), LEAVE_S)
