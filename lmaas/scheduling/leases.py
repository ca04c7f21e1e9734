"""A gateway's open tickets: waiting for a lease, renewing it, and releasing it exactly once."""

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
from lmaas.scheduling.states import REFUSALS, TERMINAL, NoTicket, RetryReason, TicketState, WaitPhase
from lmaas.types import TokenCounts

log = logging.getLogger(__name__)

RENEW_EVERY_S = 1.0
#: The period before the last reply from Redis whose usage events are reported again when Redis has lost its memory.
REMEMBER_S = 30.0
#: The maximum number of these events.
REMEMBER_AT_MOST = 50_000
#: The time after which Redis gives up a ticket that is not renewed (LEASE_MS). Nothing is left to release then.
LEASE_S = 6.0
#: The number of tickets that are renewed in one call, during which the server does nothing else.
RENEW_AT_ONCE = 50


class Usage(Protocol):
    """The part of a usage record that a ticket settles with."""

    @property
    def run_ms(self) -> int | None:
        """Milliseconds for which the request ran, or None if it never ran."""

    def progress(self) -> TokenCounts | None:
        """Return the tokens so far, or None before the engine has reported any."""

    def used(self) -> TokenCounts | None:
        """Return the tokens that count when it has ended, or None if none do."""

    def event(self) -> str:
        """Return the usage event as JSON."""


class AdmissionLimits(Protocol):
    """The limits under which a request is admitted."""

    @property
    def bounds(self) -> Bounds:
        """The maximum numbers of waiting tickets."""

    async def seeds(self, scopes: Sequence[str], month: int) -> Mapping[str, Seed]:
        """Return the usage of these scopes in that month. Raises Unavailable."""

    def refusal(self, report: Mapping[str, Any]) -> LmaasError:
        """Return the error for a refused ticket."""


class Settlement(NamedTuple):
    """The report about a ticket that has ended: its usage event (empty if it has none), the time for which it ran, and the tokens that it
    used."""

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
    """The place of a waiting ticket by the scheduler's last report, which arrived at `heard` (monotonic seconds).

    In the phase LOADING, no other field is set. `position` counts from 1 in the order of service, if the tenants' turns cost the same.
    `late_ms` is the time by which the next turn or the start is later than usual. `assumed` is true while the usual time of a start is not
    known.
    """

    phase: WaitPhase
    heard: float
    position: int = 0
    wait_ms: int = 0
    late_ms: int = 0
    assumed: bool = False


class OpenTicket:
    """An accepted request. It waits, runs, may wait and run once more, and is settled."""

    def __init__(self, ticket: Ticket, usage: Usage, limits: AdmissionLimits, deadline_s: float, scheduler: Scheduler) -> None:
        self.ticket = ticket
        self.usage = usage
        self.limits = limits
        #: The remaining part of a minute's limits: `requests` and `tokens` → limit, remaining, ms until all of it is available again.
        self.left: Mapping[str, Sequence[int]] = {}
        self.opened = time.monotonic()
        self.deadline = self.opened + deadline_s
        #: Valid as long as there is no lease.
        self.standing = Standing(WaitPhase.ASKED, self.opened)
        self.lease: Lease | None = None
        self.attempts = 0
        #: True if the slot of this background ticket was taken back. Then it holds nothing any more, and only its end is left.
        self.yielded = False
        self._on_revoked: Callable[[], None] | None = None
        self._on_yielded: Callable[[], None] | None = None
        #: A lost lease that has not been reported to Redis yet: replica, reason, attempt.
        self._owed: tuple[str, RetryReason, int] | None = None
        self._failure: LmaasError | None = None
        self._changed = asyncio.Event()
        self._scheduler = scheduler

    @property
    def waited_ms(self) -> int:
        """Milliseconds since the request was accepted."""
        return round((time.monotonic() - self.opened) * 1000)

    async def wait(self, timeout_s: float) -> Lease | None:
        """Return the lease, or None if there is none after `timeout_s` seconds.

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
        """Make a `wait` return immediately."""
        self._changed.set()

    def on_revoked(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the replica has been removed although the connection to it may still be open."""
        self._on_revoked = callback

    def on_yielded(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the slot is taken back while the request runs, at once if that has happened."""
        self._on_yielded = callback
        if self.yielded:
            callback()

    async def retry(self, lost: Lease, reason: RetryReason) -> None:
        """Give back a lease whose replica failed before the first byte. After the second time, `wait` raises."""
        self._owed = (lost.replica, reason, self.attempts)
        self.attempts += 1
        self.lease = None
        self._on_revoked = self._on_yielded = None
        self._changed.clear()
        # If Redis is unavailable now, the next renewal reports it.
        with contextlib.suppress(Unavailable):
            await self.report_lost()

    async def report_lost(self) -> None:
        """Report a lost lease to Redis, if that has not been done yet. Raises Unavailable."""
        owed = self._owed
        if owed is not None:
            report = await self._scheduler.retry(self.ticket, *owed)
            if self._owed is owed:
                self._owed = None
            self.apply(report)

    def apply(self, report: dict[str, Any]) -> bool:
        """Apply a report of the scheduler. Returns False if the scheduler no longer has the ticket."""
        state = report["state"]
        if state == TicketState.GRANTED and self.lease is None and report["attempts"] == self.attempts:
            self.lease = Lease(report["replica"], report["url"], report["queue_ms"], report["load_ms"])
            self._changed.set()
            return True
        if state == NoTicket.UNKNOWN:
            return False
        if state not in TERMINAL and report.get("attempts", self.attempts) != self.attempts:
            return True  # a late report about an earlier delivery, which an end is not: no other one follows it
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
                # The replica was removed before the grant arrived here. The next renewal requests another one.
                self._owed = ("", RetryReason.ENGINE, self.attempts)
                self.attempts += 1
            elif self._on_revoked is not None:
                self._on_revoked()
        elif state == TicketState.YIELDED:
            self._yield()
        elif state in REFUSALS:
            self._fail(self.limits.refusal(report))
        elif state == TicketState.FAILED:
            self.give_up()
        elif state == TicketState.LOAD_FAILED:
            self._fail(
                AdapterUnavailable(f"The adapter could not be loaded: {report.get('reason', 'see the replica log')}", retry_after_s=30)
            )
        return True

    def _yield(self) -> None:
        if not self.yielded:
            self.yielded = True
            self._changed.set()
            if self._on_yielded is not None:
                self._on_yielded()

    def give_up(self) -> None:
        """Fail the request because two engines failed while they worked on it."""
        self._fail(Quarantined("Two engines failed while they processed this request, so it is not tried a third time."))

    def _fail(self, error: LmaasError) -> None:
        self._failure = self._failure or error
        self._changed.set()


class Leases:
    """The open tickets of one gateway. `run` renews them and must run while tickets are open."""

    def __init__(self, scheduler: Scheduler, gateway: str) -> None:
        self.scheduler = scheduler
        self.gateway = gateway
        self._open: dict[str, OpenTicket] = {}
        #: Tickets that are being submitted. A grant may arrive before the reply. They are neither renewed nor put back yet.
        self._asked: dict[str, OpenTicket] = {}
        #: Releases with an event that Redis has not accepted yet, by pool.
        self._unsettled: dict[str, deque[Settlement]] = {}
        #: Releases without an event, each with its time. If the reply to a submitted ticket was lost, Redis may or may not have the ticket.
        self._unheard: deque[tuple[float, Settlement]] = deque()
        self._settling: set[asyncio.Future[Any]] = set()
        #: Recorded usage events by pool, each with its time.
        self._recent: dict[str, deque[tuple[float, str]]] = {}
        self._epochs: dict[str, str] = {}
        #: The time at which Redis last replied to all renewals (monotonic seconds).
        self._heard = time.monotonic()

    @property
    def open_count(self) -> int:
        """The number of tickets that were accepted and have not ended."""
        return len(self._open)

    @asynccontextmanager
    async def open(self, ticket: Ticket, usage: Usage, limits: AdmissionLimits, *, deadline_s: float) -> AsyncIterator[OpenTicket]:
        """Accept a request. However the block ends, its slot is freed and one usage event is recorded.

        Raises the refusal of `limits` if a limit is exceeded, and Unavailable if Redis cannot be reached. Nothing was accepted then.
        """
        opened = OpenTicket(ticket, usage, limits, deadline_s, self.scheduler)
        self._asked[ticket.id] = opened
        try:
            report = await self.scheduler.submit(ticket, limits.bounds)
            if report["state"] == NoTicket.UNSEEDED:
                seeds = await limits.seeds(report["scopes"], report["month"])
                report = await self.scheduler.submit(ticket, limits.bounds, seeds=seeds)
        except BaseException:
            # The server may have accepted the ticket although its reply was lost, so it is released, without waiting for that.
            self._send_end(Settlement(ticket, "", None, None))
            raise
        finally:
            del self._asked[ticket.id]
        self._see_epoch(ticket.pool, report.get("epoch"))
        if report["state"] in REFUSALS:
            raise limits.refusal(report)
        self._open[ticket.id] = opened
        opened.left = report.get("left") or {}
        opened.apply(report)
        try:
            yield opened
        finally:
            if ticket.id in self._open:
                # This goes on even if the request's task is cancelled.
                await asyncio.wait({self.settle(opened)})

    def settle(self, opened: OpenTicket) -> "asyncio.Future[Any]":
        """End a ticket, once: free its slot and record its usage event with the current counts, in one step. The caller need not wait for
        that."""
        ticket, usage = opened.ticket, opened.usage
        del self._open[ticket.id]
        return self._send_end(Settlement(ticket, usage.event(), usage.run_ms, usage.used()))

    def _send_end(self, settlement: Settlement) -> "asyncio.Future[Any]":
        # Not in a task, which would cost more than the work itself.
        sent = self.scheduler.send_release(*settlement)
        self._settling.add(sent)
        sent.add_done_callback(functools.partial(self._end_sent, settlement))
        return sent

    def _end_sent(self, settlement: Settlement, sent: "asyncio.Future[Any]") -> None:
        self._settling.discard(sent)
        if sent.cancelled() or sent.exception() is not None:
            self._settle_later(settlement)
        else:
            self.scheduler.released(settlement.ticket, sent.result())
            self._remember(settlement)

    def _settle_later(self, settlement: Settlement) -> None:
        """Leave the report to the next renewal."""
        if settlement.event:
            self._unsettled.setdefault(settlement.ticket.pool, deque()).append(settlement)
            return
        # While Redis is unavailable, there is one for each refused request, so old ones are dropped.
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
        """Receive grants, and renew every second, until cancelled."""
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
        """Renew every open ticket with its progress, and put back those that Redis has lost. Then retry releases that failed."""
        await self._renew()
        await self._settle_rest()

    async def _renew(self) -> None:
        # Pools with recent events are renewed too, because otherwise a loss of those events in Redis would not be noticed.
        self._forget_old()
        heard = time.monotonic()
        pools: dict[str, list[OpenTicket]] = {pool: [] for pool in self._recent}
        for opened in self._open.values():
            pools.setdefault(opened.ticket.pool, []).append(opened)
        for pool, tickets in _in_portions(pools):
            try:
                for opened in tickets:
                    await opened.report_lost()
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
        if opened.yielded:
            return  # its owner is about to end it
        if opened.lease is not None:
            await self.scheduler.restore(opened.ticket, opened.lease.replica, waited_ms=opened.waited_ms, attempts=opened.attempts)
        elif opened.attempts > 1:
            opened.give_up()
        else:
            report = await self.scheduler.submit(opened.ticket, opened.limits.bounds, waited_ms=opened.waited_ms, attempts=opened.attempts)
            opened.apply(report)
            if opened.ticket.id not in self._open:
                # It ended while it was being put back.
                await self.scheduler.release(opened.ticket, "", None)

    async def _settle_rest(self) -> None:
        # All pools at the same time, so that a pool that does not accept a release does not delay the others.
        pools = {*self._unsettled, *(settlement.ticket.pool for _, settlement in self._unheard)}
        await asyncio.gather(*(self._settle_pool(pool) for pool in pools))

    async def _settle_pool(self, pool: str) -> None:
        # An event is removed only when it is reported. Concurrent calls do no harm, because the ledger stores each event once.
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
        """Detect another epoch, which means that Redis has lost its memory, perhaps with events that the ledger does not have yet."""
        if epoch is None:
            return
        known, self._epochs[pool] = self._epochs.get(pool, epoch), epoch
        if known != epoch:
            log.warning("the queue was lost and is being rebuilt", extra={"action": "rebuild", "pool_id": pool})
            for _, event in self._recent.get(pool, ()):
                self._settle_later(Settlement(_no_ticket(pool), event, None, None))

    async def drained(self) -> None:
        """Wait until no ticket is open and every event is recorded; for shutdown."""
        while self._open or self._asked or self._settling or self._unsettled:
            await self._settle_rest()
            await asyncio.sleep(0.05)
        await self._settle_rest()


def _no_ticket(pool: str) -> Ticket:
    """Return a ticket that does not exist, to be released with an event that is reported again."""
    return Ticket(id="-", pool=pool, tenant="", gateway="", adapter="", source="", weight=1, event="")


def _in_portions(pools: Mapping[str, list[OpenTicket]]) -> Iterator[tuple[str, list[OpenTicket]]]:
    for pool, tickets in pools.items():
        for start in range(0, max(1, len(tickets)), RENEW_AT_ONCE):
            yield pool, tickets[start : start + RENEW_AT_ONCE]
