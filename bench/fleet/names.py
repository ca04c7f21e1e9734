"""A fleet of replicas without engines, and requests for them: the calls of supervisors and gateways."""

import asyncio
import contextlib
import json
import random
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import psutil
from redis.asyncio import Redis

from bench.load import SCOPES, cpu_s, record
from lmaas.scheduling.client import Beat, Bounds, Scheduler, Seed, Ticket, gateway_channel
from lmaas.scheduling.leases import RENEW_AT_ONCE
from lmaas.scheduling.states import NoTicket, TicketState
from lmaas.states import Observed
from lmaas.types import TokenCounts

#: The number of adapters that a replica runs at once (the default setting).
ADAPTER_SLOTS = 8
#: The number of adapters that are resident on all replicas of a pool, and on how many replicas each other one is resident.
COMMON, COPIES = 4, 4
TENANTS = 50
BOUNDS = Bounds(10**9, 10**9)
#: The number of calls that are sent together to load a fleet.
LOADED_AT_ONCE = 128
#: The number of tickets that are submitted between two rounds of heartbeats.
LOADED_BETWEEN_BEATS = 2000
#: The length of a window. Heartbeats and leases stay valid for longer.
WINDOW_S = 1.0
#: A silent replica is removed after GONE_MS (layout.lua), which is a second less.
SILENT_S = 31.0
#: The number of calls after the death of a replica that are examined.
CALLS_AFTER = 200
USED = TokenCounts(700, 300, 200)


@dataclass(frozen=True)
class Sizes:
    """A fleet: replicas in all pools together, resident adapters of each, tickets that run all the time, sequence slots of each replica,
    tickets that wait when all slots are taken, and requests that run at once beside those that run all the time."""

    replicas: int
    resident: int
    pools: int = 1
    running: int = 0
    slots: int = 16
    waiting: int = 1000
    at_once: int = 4


class Fleet:
    """The replicas and the requests of some pools. The names of the pools begin with `name`."""

    def __init__(self, name: str, sizes: Sizes, redis: Redis, server: psutil.Process) -> None:
        self.sizes = sizes
        self._scheduler = Scheduler(redis)
        self._redis, self._server = redis, server
        self._pools = [f"{name}-{number:04}" for number in range(sizes.pools)]
        self._gateway = f"gw_{name}"
        each = sizes.replicas // sizes.pools
        self._common = min(COMMON, sizes.resident)
        self._own = sizes.resident - self._common
        #: The number of a pool's adapters that are resident on few of its replicas.
        self._rare = max(self._own, each * self._own // COPIES)
        self._beats = [(pool, f"rep-{pool}-{number:05}", self._beat(number)) for number in range(each) for pool in self._pools]
        self._chance = random.Random(1)  # noqa: S311 (a load, not a secret)
        self._made = 0
        #: The seconds that the latest heartbeats of all replicas took.
        self._lived_s = 0.0
        #: Running tickets with their replicas, and waiting tickets, both by id.
        self._running: dict[str, tuple[Ticket, str]] = {}
        self._waiting: dict[str, Ticket] = {}

    def _beat(self, number: int) -> Beat:
        own = [_rare(number * self._own + each, self._rare) for each in range(self._own)]
        common = [_common(each) for each in range(self._common)]
        return Beat(f"http://10.0.0.1:{number}", self.sizes.slots, ADAPTER_SLOTS, Observed.READY, common + own)

    def _ticket(self, adapter: str) -> Ticket:
        self._made += 1
        pool, tenant = self._pools[self._made % len(self._pools)], self._made % TENANTS
        limits = tuple(msgspec.structs.replace(scope, id=f"{scope.scope}_{tenant}") for scope in SCOPES)
        return Ticket(
            id=f"req_{pool}_{self._made:024}",
            pool=pool,
            tenant=f"ten_{tenant}",
            gateway=self._gateway,
            adapter=adapter,
            source=f"ten_{tenant}/{'a' * 64}",
            weight=1,
            event=record(self._made, f"ten_{tenant}"),
            prompt_tokens=700,
            completion_tokens=200,
            prices=(150_000, 75_000, 600_000),
            limits=limits,
        )

    def _with_common(self) -> Ticket:
        """Return a ticket with an adapter that all replicas have."""
        return self._ticket(_common(self._chance.randrange(self._common)))

    def _with_any(self) -> Ticket:
        """Return a ticket: a quarter of them with the base model, a quarter with a common adapter, and half with a rare one."""
        kind = self._chance.random()
        if kind < 0.25:
            return self._ticket("")
        return self._with_common() if kind < 0.5 or not self._own else self._ticket(_rare(self._chance.randrange(self._rare), self._rare))

    async def load(self) -> None:
        """Report all replicas, and start the tickets that run all the time."""
        await self.live()
        await self._run_more(self.sizes.running)

    async def _run_more(self, count: int) -> None:
        while count > 0:
            await _many(range(min(count, LOADED_BETWEEN_BEATS)), lambda _: self._run())
            count -= LOADED_BETWEEN_BEATS
            await self.live()

    async def _run(self) -> None:
        ticket = self._with_common()
        self._running[ticket.id] = (ticket, await self._granted(ticket))

    async def _granted(self, ticket: Ticket) -> str:
        """Submit a ticket and return its replica."""
        report = await self._submit(ticket)
        if report["state"] != TicketState.GRANTED:
            free = self.sizes.slots * len(self._beats) - len(self._running)
            raise RuntimeError(
                f"a ticket for {ticket.adapter or 'the base model'} is {report['state']}, but {free} slots are free; "
                f"the heartbeats before took {self._lived_s:.1f} s, and after 5 s a replica counts as silent"
            )
        return str(report["replica"])

    async def _submit(self, ticket: Ticket) -> dict[str, Any]:
        report = await self._scheduler.submit(ticket, BOUNDS)
        while report["state"] == NoTicket.UNSEEDED:
            seeds = {scope: Seed(report["month"], 0, 0) for scope in report["scopes"]}
            report = await self._scheduler.submit(ticket, BOUNDS, seeds=seeds)
        return report

    async def _release(self, ticket: Ticket) -> None:
        if not await self._scheduler.release(ticket, ticket.event, 1000, USED):
            raise RuntimeError(f"the scheduler has lost the ticket {ticket.id}")

    async def live(self, silent: str = "") -> None:
        """Send the heartbeats of all replicas except `silent`, and renew all tickets, as happens once a second."""
        began = time.perf_counter()
        await _many((beat for beat in self._beats if beat[1] != silent), lambda beat: self._scheduler.heartbeat(*beat))
        by_pool: dict[str, list[str]] = {}
        for ticket in (*(ticket for ticket, _ in self._running.values()), *self._waiting.values()):
            by_pool.setdefault(ticket.pool, []).append(ticket.id)
        calls = [(pool, ids[at : at + RENEW_AT_ONCE]) for pool, ids in by_pool.items() for at in range(0, len(ids), RENEW_AT_ONCE)]
        await _many(calls, lambda call: self._scheduler.renew(call[0], [(name, None) for name in call[1]]))
        self._lived_s = time.perf_counter() - began

    async def _cpu_us(self, calls: Callable[[], Awaitable[int]], window_s: float) -> float:
        """Return the microseconds of the server's CPU for each call, over a window of calls."""
        done, before, began = 0, cpu_s(self._server), time.perf_counter()
        while time.perf_counter() - began < window_s:
            done += await calls()
        return (cpu_s(self._server) - before) / done * 1e6

    async def with_room(self, window_s: float = WINDOW_S) -> float:
        """Return the CPU µs of a submit that is granted at once, with its release."""
        await self._turns(TENANTS)  # the first request of each tenant needs its usage of the month

        async def turns() -> int:
            await self._turns(self.sizes.at_once)
            return self.sizes.at_once

        return await self._cpu_us(turns, window_s)

    async def _turns(self, count: int) -> None:
        for _ in range(0, count, self.sizes.at_once):
            tickets = [self._with_any() for _ in range(self.sizes.at_once)]
            await asyncio.gather(*map(self._granted, tickets))
            await asyncio.gather(*map(self._release, tickets))

    async def heartbeats(self, window_s: float = WINDOW_S) -> float:
        """Return the CPU µs of a heartbeat."""
        at = 0

        async def beats() -> int:
            nonlocal at
            some = [self._beats[(at + number) % len(self._beats)] for number in range(LOADED_AT_ONCE)]
            at += len(some)
            await asyncio.gather(*(self._scheduler.heartbeat(*beat) for beat in some))
            return len(some)

        return await self._cpu_us(beats, window_s)

    @asynccontextmanager
    async def full(self) -> AsyncIterator[Callable[..., Awaitable[float]]]:
        """Take all slots, and let tickets wait. Yields a function that returns the CPU µs of a release, which grants a waiting ticket, with
        the submit of another one that waits. The tickets end with the block."""
        before = set(self._running)
        granted: deque[str] = deque()
        listening = asyncio.Event()

        async def listen() -> None:
            async for message in self._scheduler.listen(gateway_channel(self._gateway)):
                listening.set()
                news = json.loads(message) if message else {}
                if news.get("event") == TicketState.GRANTED:
                    self._running[news["id"]] = (self._waiting.pop(news["id"]), news["replica"])
                    granted.append(news["id"])

        async def wait(_: int = 0) -> None:
            ticket = self._with_common()
            self._waiting[ticket.id] = ticket
            await self._submit(ticket)

        async def turn() -> None:
            ticket, _ = self._running.pop(granted.popleft())
            await self._release(ticket)
            await wait()

        async def turns() -> int:
            count = min(self.sizes.at_once, len(granted))
            await asyncio.gather(*(turn() for _ in range(count)))
            await asyncio.sleep(0)  # grants may be on their way
            return count

        async def measured(window_s: float = WINDOW_S) -> float:
            return await self._cpu_us(turns, window_s)

        listener = asyncio.create_task(listen(), name="grants")
        try:
            await listening.wait()
            await self.live()
            await self._run_more(self.sizes.slots * len(self._beats) - len(self._running))
            granted.extend(set(self._running) - before)
            await _many(range(self.sizes.waiting), wait)
            yield measured
        finally:
            listener.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await listener
        # Waiting tickets end first, so that the end of a running one grants nothing.
        running = [ticket for name, (ticket, _) in self._running.items() if name not in before]
        for tickets in (list(self._waiting.values()), running):
            await _many(tickets, lambda ticket: self._scheduler.release(ticket, "", None))
        self._running = {name: each for name, each in self._running.items() if name in before}
        self._waiting.clear()

    async def lose_replica(self) -> float:
        """Remove a replica whose engine has ended, as its supervisor does. Returns the ms of the longest call: that one, or one of those
        after it. Then the replica and as many running tickets as before come back."""
        dying = self._busiest()
        async with self._calls_logged():
            await self._scheduler.deregister(*dying[:2])
            longest = await self._longest_call_ms()
        await self._bring_back(dying)
        return longest

    async def silence_replica(self) -> float:
        """Stop the heartbeats of a replica. Returns the ms of the longest call in the second in which it is removed."""
        dying = self._busiest()
        began, longest = time.perf_counter(), 0.0
        async with self._calls_logged():
            while time.perf_counter() - began < SILENT_S:
                await self._redis.slowlog_reset()
                await self.live(silent=dying[1])
                longest = await self._longest_call_ms()
        await self._bring_back(dying)
        return longest

    def _busiest(self) -> tuple[str, str, Beat]:
        """Return the replica with most running tickets."""
        [(busiest, _)] = Counter(replica for _, replica in self._running.values()).most_common(1)
        return next(beat for beat in self._beats if beat[1] == busiest)

    @asynccontextmanager
    async def _calls_logged(self) -> AsyncIterator[None]:
        """Record the duration of every call inside the server."""
        kept: Any = await self._redis.config_get("slowlog-*")
        try:
            await self._redis.config_set("slowlog-max-len", 100_000)
            await self._redis.config_set("slowlog-log-slower-than", 0)
            await self._redis.slowlog_reset()
            yield
        finally:
            for name, value in kept.items():
                await self._redis.config_set(name, value)

    async def _longest_call_ms(self) -> float:
        """Make some more calls, and return the longest since the log was emptied. A renewal is left out: it is a call for many tickets."""
        await self._turns(CALLS_AFTER // 2)
        calls = [call for call in await self._redis.slowlog_get(-1) if call["command"].startswith(b"FCALL")]
        return max(int(call["duration"]) for call in calls if b"_renew " not in call["command"]) / 1000

    async def _bring_back(self, dead: tuple[str, str, Beat]) -> None:
        lost = [ticket for ticket, replica in self._running.values() if replica == dead[1]]
        for ticket in lost:
            [report] = (await self._scheduler.renew(ticket.pool, [(ticket.id, None)]))["tickets"]
            if report["state"] != TicketState.REVOKED:
                raise RuntimeError(f"a ticket is {report['state']}, although its replica is gone")
            await self._release(self._running.pop(ticket.id)[0])
        await self._scheduler.heartbeat(*dead)
        await _many(lost, lambda _: self._run())


def _common(number: int) -> str:
    return f"ten_0-common{number:010}"


def _rare(number: int, of: int) -> str:
    return f"ten_1-rare{number % of:012}"


async def _many(items: Iterable[Any], call: Callable[[Any], Awaitable[Any]]) -> None:
    """Call for each item, as many at once as one connection sends together."""
    some: list[Any] = []
    for item in items:
        some.append(item)
        if len(some) == LOADED_AT_ONCE:
            await asyncio.gather(*map(call, some))
            some.clear()
    await asyncio.gather(*map(call, some))
