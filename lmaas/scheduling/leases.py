"""A gateway's open tickets: waiting for a lease, keeping it, and giving it back exactly once."""

import asyncio
import contextlib
import functools
import json
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from lmaas.errors import AdapterUnavailable, LmaasError, Quarantined, Unavailable
from lmaas.scheduling.client import Bounds, Scheduler, Seed, Ticket, gateway_channel
from lmaas.scheduling.states import REFUSALS, NoTicket, RetryReason, TicketState, WaitPhase
from lmaas.types import TokenCounts

log = logging.getLogger(__name__)

RENEW_EVERY_S = 1.0
#: Usage events of this last while, before Redis was last heard of, are told again to a Redis that has lost its memory.
REMEMBER_S = 30.0
#: And no more than this many, whatever the rate.
REMEMBER_AT_MOST = 50_000
#: A ticket that nobody renews is given up by Redis after this while (LEASE_MS): then there is nothing left to take back.
LEASE_S = 6.0
#: Tickets renewed in one call: the server does nothing else meanwhile.
RENEW_AT_ONCE = 200


class Usage(Protocol):
    """The part of a usage record that a ticket settles with."""

    @property
    def run_ms(self) -> int | None:
        """How long the request ran, or None if it never did."""

    def progress(self) -> TokenCounts | None:
        """Return the tokens so far, or None before the engine has reported any."""

    def event(self) -> str:
        """The usage event as JSON."""


class Terms(Protocol):
    """What a request is admitted under."""

    @property
    def bounds(self) -> Bounds:
        """How many may wait."""

    async def seeds(self, scopes: Sequence[str], month: int) -> Mapping[str, Seed]:
        """What these scopes have used in that month. Raises Unavailable."""

    def refusal(self, report: Mapping[str, Any]) -> LmaasError:
        """The error for a ticket that was not taken."""


class Settlement(NamedTuple):
    """What is told of a ticket that has ended: its usage event (empty if it has none), how long it ran, and the tokens that it used."""

    ticket: Ticket
    event: str
    run_ms: int | None
    used: TokenCounts | None


@dataclass(frozen=True, slots=True)
class Lease:
    """The claim on a replica's slot: the request may be sent to `url` now."""

    replica: str
    url: str
    queue_ms: int
    load_ms: int


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a waiting ticket stands by the scheduler's last report, which came at `heard` (monotonic seconds).

    In the phase LOADING nothing else is known. `position` counts from 1 in the order of service, if the tenants' turns cost the same.
    `late_ms` is by how much the next turn or the start is later than usual. `assumed`: the usual time of a start is not known yet.
    """

    phase: WaitPhase
    heard: float
    position: int = 0
    wait_ms: int = 0
    late_ms: int = 0
    assumed: bool = False


class OpenTicket:
    """A request that was accepted. It waits, runs, perhaps waits once more, and is settled."""

    def __init__(self, ticket: Ticket, usage: Usage, terms: Terms, deadline_s: float, scheduler: Scheduler) -> None:
        self.ticket = ticket
        self.usage = usage
        self.terms = terms
        #: What is left of a minute's limits: `requests` and `tokens` → limit, remaining, ms until all of it is back.
        self.left: Mapping[str, Sequence[int]] = {}
        self.opened = time.monotonic()
        self.deadline = self.opened + deadline_s
        #: As long as there is no lease.
        self.standing = Standing(WaitPhase.ASKED, self.opened)
        self.lease: Lease | None = None
        self.attempts = 0
        self._on_revoked: Callable[[], None] | None = None
        #: The lost lease that Redis has not heard of: replica, reason, attempt.
        self._owed: tuple[str, RetryReason, int] | None = None
        self._failure: LmaasError | None = None
        self._changed = asyncio.Event()
        self._scheduler = scheduler

    @property
    def waited_ms(self) -> int:
        """How long ago the request was accepted."""
        return round((time.monotonic() - self.opened) * 1000)

    async def wait(self, timeout_s: float) -> Lease | None:
        """The lease, or None if there is none yet after `timeout_s` seconds.

        Raises Unavailable past the deadline, Quarantined after two lost engines, AdapterUnavailable if the adapter does not load.
        """
        left = self.deadline - time.monotonic()
        if self.lease is None and self._failure is None and left > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(timeout_s, left)):
                    await self._changed.wait()
        if self._failure is not None:
            raise self._failure
        if self.lease is None and time.monotonic() >= self.deadline:
            raise Unavailable(
                "No engine had room for this request before its deadline. Retry later.",
                retry_after_s=max(1.0, self.standing.wait_ms / 1000),
            )
        return self.lease

    def wake(self) -> None:
        """Have a `wait` return at once."""
        self._changed.set()

    def on_revoked(self, callback: Callable[[], None]) -> None:
        """Have `callback` called when the replica is gone although its connection may still stand."""
        self._on_revoked = callback

    async def retry(self, lost: Lease, reason: RetryReason) -> None:
        """Give the lease back because its replica failed before the first byte. After the second time, `wait` raises."""
        self._owed = (lost.replica, reason, self.attempts)
        self.attempts += 1
        self.lease = None
        self._on_revoked = None
        self._changed.clear()
        # If Redis is away just now, the next renewal tells it.
        with contextlib.suppress(Unavailable):
            await self.tell()

    async def tell(self) -> None:
        """Tell Redis of a lost lease, if it does not know yet. Raises Unavailable."""
        owed = self._owed
        if owed is not None:
            report = await self._scheduler.retry(self.ticket, *owed)
            if self._owed is owed:
                self._owed = None
            self.apply(report)

    def apply(self, report: dict[str, Any]) -> bool:
        """Take news from the scheduler; False if the scheduler no longer knows the ticket."""
        state = report["state"]
        if state == TicketState.GRANTED and self.lease is None and report["attempts"] == self.attempts:
            self.lease = Lease(report["replica"], report["url"], report["queue_ms"], report["load_ms"])
            self._changed.set()
            return True
        if state == NoTicket.UNKNOWN:
            return False
        if state != TicketState.FAILED and report.get("attempts", self.attempts) != self.attempts:
            return True  # late news of an earlier delivery
        if state == TicketState.QUEUED:
            self.standing = Standing(
                WaitPhase(report["phase"]),
                time.monotonic(),
                int(report["position"]),
                int(report["wait_ms"]),
                int(report["late_ms"]),
                report["assumed"],
            )
        elif state == TicketState.LOADING:
            self.standing = Standing(WaitPhase.LOADING, time.monotonic())
        elif state == TicketState.REVOKED:
            if self.lease is None:
                # Its replica had gone before we heard of the grant: the next renewal asks for another.
                self._owed = ("", RetryReason.ENGINE, self.attempts)
                self.attempts += 1
            elif self._on_revoked is not None:
                self._on_revoked()
        elif state in REFUSALS:
            self._fail(self.terms.refusal(report))
        elif state == TicketState.FAILED:
            self.give_up()
        elif state == TicketState.LOAD_FAILED:
            self._fail(
                AdapterUnavailable(f"The adapter could not be loaded: {report.get('reason', 'see the replica log')}", retry_after_s=30)
            )
        return True

    def give_up(self) -> None:
        """Two engines failed: no third."""
        self._fail(Quarantined("Two engines failed while they processed this request, so it is not tried a third time."))

    def _fail(self, error: LmaasError) -> None:
        self._failure = self._failure or error
        self._changed.set()


class Leases:
    """All open tickets of one gateway. `run` keeps them alive and must be running while tickets are open."""

    def __init__(self, scheduler: Scheduler, gateway: str) -> None:
        self.scheduler = scheduler
        self.gateway = gateway
        self._open: dict[str, OpenTicket] = {}
        #: Tickets that Redis has been asked to take. They may be granted before we hear that they are, but nothing keeps or puts them back.
        self._asked: dict[str, OpenTicket] = {}
        #: Releases with an event that Redis has not taken yet, by pool.
        self._unsettled: dict[str, deque[Settlement]] = {}
        #: And those without one, each with when it was told: Redis may or may not have taken a ticket of which we did not hear.
        self._unheard: deque[tuple[float, Settlement]] = deque()
        self._settling: set[asyncio.Future[Any]] = set()
        #: Usage events by pool, each with when it was told.
        self._recent: dict[str, deque[tuple[float, str]]] = {}
        self._epochs: dict[str, str] = {}
        #: When Redis last answered all renewals (monotonic seconds).
        self._heard = time.monotonic()

    @property
    def open_count(self) -> int:
        """The number of tickets that were accepted and have not ended."""
        return len(self._open)

    @asynccontextmanager
    async def open(self, ticket: Ticket, usage: Usage, terms: Terms, *, deadline_s: float) -> AsyncIterator[OpenTicket]:
        """Accept a request. Whatever happens in the block, its end frees the slot and records one usage event.

        Raises the terms' refusal if it is over a limit, Unavailable if Redis is away; then nothing was accepted.
        """
        opened = OpenTicket(ticket, usage, terms, deadline_s, self.scheduler)
        self._asked[ticket.id] = opened
        try:
            report = await self.scheduler.submit(ticket, terms.bounds)
            if report["state"] == NoTicket.UNSEEDED:
                seeds = await terms.seeds(report["scopes"], report["month"])
                report = await self.scheduler.submit(ticket, terms.bounds, seeds=seeds)
        except BaseException:
            # The server may have taken the ticket although we did not hear of it: it must not stay. Nobody waits for that.
            self._tell_end(Settlement(ticket, "", None, None))
            raise
        finally:
            del self._asked[ticket.id]
        self._see_epoch(ticket.pool, report.get("epoch"))
        if report["state"] in REFUSALS:
            raise terms.refusal(report)
        self._open[ticket.id] = opened
        opened.left = report.get("left") or {}
        opened.apply(report)
        try:
            yield opened
        finally:
            if ticket.id in self._open:
                # It goes on although the request's own task is cancelled.
                await asyncio.wait({self.settle(opened)})

    def settle(self, opened: OpenTicket) -> "asyncio.Future[Any]":
        """End a ticket, once: frees its slot and records its usage event as it stands, in one step. Nobody needs to wait for that."""
        ticket, usage = opened.ticket, opened.usage
        del self._open[ticket.id]
        return self._tell_end(Settlement(ticket, usage.event(), usage.run_ms, usage.progress()))

    def _tell_end(self, settlement: Settlement) -> "asyncio.Future[Any]":
        # No task: that would cost more than what it does.
        told = self.scheduler.send_release(*settlement)
        self._settling.add(told)
        told.add_done_callback(functools.partial(self._end_told, settlement))
        return told

    def _end_told(self, settlement: Settlement, told: "asyncio.Future[Any]") -> None:
        self._settling.discard(told)
        if told.cancelled() or told.exception() is not None:
            self._settle_later(settlement)
        else:
            self.scheduler.released(settlement.ticket, told.result())
            self._remember(settlement)

    def _settle_later(self, settlement: Settlement) -> None:
        """Have the next renewal tell it."""
        if settlement.event:
            self._unsettled.setdefault(settlement.ticket.pool, deque()).append(settlement)
            return
        # While Redis is away there is one for each request that is refused.
        now = time.monotonic()
        while self._unheard and self._unheard[0][0] < now - LEASE_S:
            self._unheard.popleft()
        self._unheard.append((now, settlement))

    def _remember(self, settlement: Settlement) -> None:
        pool, event = settlement.ticket.pool, settlement.event
        if event:
            recent = self._recent.get(pool)
            if recent is None:
                recent = self._recent[pool] = deque(maxlen=REMEMBER_AT_MOST)
            recent.append((time.monotonic(), event))

    async def _release(self, settlement: Settlement) -> None:
        await self.scheduler.release(*settlement)
        self._remember(settlement)

    async def run(self) -> None:
        """Hear of grants, and renew every second. Runs until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listen(), name="lease-grants")
            group.create_task(self._renew_forever(), name="lease-renewal")

    async def _listen(self) -> None:
        async for message in self.scheduler.listen(gateway_channel(self.gateway)):
            if not message:
                await self.renew()
                continue
            news = json.loads(message)
            opened = self._open.get(news["id"]) or self._asked.get(news["id"])
            if opened is not None:
                opened.apply(news | {"state": news["event"]})

    async def _renew_forever(self) -> None:
        while True:
            await asyncio.sleep(RENEW_EVERY_S)
            await self.renew()

    async def renew(self) -> None:
        """Renew every open ticket, tell how far each is, and mend what Redis has forgotten. Then settle what could not be settled."""
        await self._renew()
        await self._settle_rest()

    async def _renew(self) -> None:
        # Pools of recent events too: if Redis loses them now, nobody else would notice.
        self._forget_old()
        heard = time.monotonic()
        pools: dict[str, list[OpenTicket]] = {pool: [] for pool in self._recent}
        for opened in self._open.values():
            pools.setdefault(opened.ticket.pool, []).append(opened)
        for pool, tickets in _in_portions(pools):
            try:
                for opened in tickets:
                    await opened.tell()
                progress = [(opened.ticket.id, opened.usage.progress() if opened.lease else None) for opened in tickets]
                reply = await self.scheduler.renew(pool, progress)
                self._see_epoch(pool, reply["epoch"])
                for opened, report in zip(tickets, reply["tickets"], strict=True):
                    if opened.ticket.id in self._open and not opened.apply(report):
                        await self._put_back(opened)
            except Unavailable:
                heard = self._heard
                log.warning("tickets could not be renewed", extra={"action": "renew", "pool_id": pool})
        self._heard = heard

    def _forget_old(self) -> None:
        oldest = self._heard - REMEMBER_S
        for pool, recent in list(self._recent.items()):
            while recent and recent[0][0] < oldest:
                recent.popleft()
            if not recent:
                del self._recent[pool]

    async def _put_back(self, opened: OpenTicket) -> None:
        if opened.lease is not None:
            await self.scheduler.restore(opened.ticket, opened.lease.replica, waited_ms=opened.waited_ms, attempts=opened.attempts)
        elif opened.attempts > 1:
            opened.give_up()
        else:
            report = await self.scheduler.submit(opened.ticket, opened.terms.bounds, waited_ms=opened.waited_ms, attempts=opened.attempts)
            opened.apply(report)
            if opened.ticket.id not in self._open:
                # It ended while it was put back.
                await self.scheduler.release(opened.ticket, "", None)

    async def _settle_rest(self) -> None:
        # Pool by pool at the same time: one that does not take something holds up no other.
        pools = {*self._unsettled, *(settlement.ticket.pool for _, settlement in self._unheard)}
        await asyncio.gather(*(self._settle_pool(pool) for pool in pools))

    async def _settle_pool(self, pool: str) -> None:
        # Taken off only when it is told; a second teller at the same moment does no harm, since the ledger takes each event once.
        events = self._unsettled.get(pool)
        try:
            while events:
                item = events[0]
                await self._release(item)
                with contextlib.suppress(ValueError):
                    events.remove(item)
            if events is not None and self._unsettled.get(pool) is events:
                del self._unsettled[pool]
            for unheard in [each for each in self._unheard if each[1].ticket.pool == pool]:
                if unheard[0] >= time.monotonic() - LEASE_S:
                    await self._release(unheard[1])
                with contextlib.suppress(ValueError):
                    self._unheard.remove(unheard)
        except Unavailable:
            log.warning("ended tickets could not be settled", extra={"action": "settle", "pool_id": pool})

    def _see_epoch(self, pool: str, epoch: str | None) -> None:
        """Another epoch means that Redis has lost its memory, and perhaps events that the ledger does not have yet."""
        if epoch is None:
            return
        known, self._epochs[pool] = self._epochs.get(pool, epoch), epoch
        if known != epoch:
            log.warning("the queue was lost and is being rebuilt", extra={"action": "rebuild", "pool_id": pool})
            for _, event in self._recent.get(pool, ()):
                self._settle_later(Settlement(_told_again(pool), event, None, None))

    async def drained(self) -> None:
        """Wait until no ticket is open and every event is told; for shutdown."""
        while self._open or self._asked or self._settling or self._unsettled:
            await self._settle_rest()
            await asyncio.sleep(0.05)
        await self._settle_rest()


def _told_again(pool: str) -> Ticket:
    """A ticket that no longer exists, to release together with an event: the ledger takes each event once."""
    return Ticket(id="-", pool=pool, tenant="", gateway="", adapter="", source="", weight=1, event="")


def _in_portions(pools: Mapping[str, list[OpenTicket]]) -> Iterator[tuple[str, list[OpenTicket]]]:
    for pool, tickets in pools.items():
        for start in range(0, max(1, len(tickets)), RENEW_AT_ONCE):
            yield pool, tickets[start : start + RENEW_AT_ONCE]
