"""Builds tickets and heartbeats for tests of the scheduler, and reads its keys."""

import json
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

from lmaas.errors import LmaasError, OverLimit
from lmaas.scheduling.client import Beat, Bounds, Scheduler, Seed, Ticket, library, stored_replica
from lmaas.scheduling.leases import Leases, OpenTicket
from lmaas.scheduling.states import RetryReason
from lmaas.states import Observed
from lmaas.types import TokenCounts
from tests.integration.scheduling.contradictions import READ_POOL, contradictions, read

KEY = "lmaas:{p}"
EVENT = {"request_id": "", "status": "aborted", "code": None, "prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 0}


def ticket(number: int, tenant: str = "a", adapter: str = "", weight: int = 1, gateway: str = "g") -> Ticket:
    """Return a ticket of pool `p`."""
    event = json.dumps(EVENT | {"request_id": f"r{number}", "tenant_id": tenant})
    return Ticket(f"r{number}", "p", tenant, gateway, adapter, f"src/{adapter}", weight, event)


def beat(state: str = "ready", slots: int = 2, adapter_slots: int = 1, resident: tuple[str, ...] = (), cleared: bool = False) -> Beat:
    """Return a heartbeat."""
    return Beat("http://engine", slots, adapter_slots, Observed(state), list(resident), cleared)


@asynccontextmanager
async def quick(scheduler: Scheduler, **constants: int) -> AsyncIterator[None]:
    """Use a copy of the library with smaller constants, so that leases expire during a test."""
    text = library()
    for name, value in constants.items():
        before, after = text.split(f"local {name} = ", 1)
        text = f"{before}local {name} = {value} --{after}"
    usual, other = vars(scheduler).copy(), vars(Scheduler(scheduler.redis, text))
    vars(scheduler).update(other)
    try:
        yield
    finally:
        vars(scheduler).update(usual)


class Pool:
    """The pool `p` of a scheduler, and its stored state."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.redis = scheduler.redis

    async def beat(self, replica: str = "x", **facts: Any) -> dict[str, Any]:
        """Send a heartbeat of a replica."""
        return await self.scheduler.heartbeat("p", replica, beat(**facts))

    async def submit(self, *tickets: Ticket, max_queued: int = 1000) -> list[str]:
        """Submit tickets and return their states."""
        return [(await self.scheduler.submit(each, Bounds(max_queued, 10_000)))["state"] for each in tickets]

    async def release(self, *numbers: int) -> list[bool]:
        """Release tickets by number, without an event. Each has used one token of each kind."""
        return [await self.scheduler.release(ticket(number), "", None, TokenCounts(1, 0, 1)) for number in numbers]

    async def retry(
        self, number: int, replica: str = "x", reason: RetryReason = RetryReason.ENGINE, attempt: int | None = None
    ) -> dict[str, Any]:
        """Give back a ticket's lease: the current one, or that of an earlier delivery."""
        now = (await self.tickets()).get(f"r{number}", {}).get("attempts", 0)
        return await self.scheduler.retry(ticket(number), replica, reason, now if attempt is None else attempt)

    async def tickets(self) -> dict[str, dict[str, Any]]:
        """Return every ticket by id."""
        stored = read(await cast("Awaitable[str]", self.redis.eval(READ_POOL, 1, KEY))).get("tickets", {})
        return {name: json.loads(text) for name, text in stored.items()}

    async def replicas(self) -> dict[str, dict[str, Any]]:
        """Return every replica by id."""
        stored: Any = await self.redis.hgetall(f"{KEY}:replicas")
        return {name: stored_replica(text) for name, text in stored.items()}

    async def states(self) -> dict[str, str]:
        """Return the state of each ticket by id."""
        return {name: each["state"] for name, each in (await self.tickets()).items()}

    async def placed(self) -> set[str]:
        """Return the tickets that hold a slot."""
        return {name for name, state in (await self.states()).items() if state in ("granted", "loading")}

    async def events(self) -> list[dict[str, Any]]:
        """Return the usage events so far."""
        entries: Any = await self.redis.xrange(f"{KEY}:usage")
        return [json.loads(fields["event"]) for _, fields in entries]

    async def check(self) -> None:
        """Raise AssertionError if the stored state contradicts itself."""
        raw = read(await cast("Awaitable[str]", self.redis.eval(READ_POOL, 1, KEY)))
        wrong = contradictions(raw)
        assert not wrong, "\n".join(wrong)
        for name, replica in (await self.replicas()).items():
            assert max(replica["load"] - replica["back"], replica["back"]) <= replica["slots"], name
            assert replica["runs"] <= replica["adapter_slots"], name


@dataclass(frozen=True)
class Room:
    """Limits whose refusal is the state of the report."""

    bounds: Bounds

    async def seeds(self, scopes: Sequence[str], month: int) -> dict[str, Seed]:
        return {scope: Seed(month, 0, 0) for scope in scopes}

    def refusal(self, report: Mapping[str, Any]) -> LmaasError:
        return OverLimit(str(report["state"]), code=str(report["state"]))


class Used:
    """A usage record with the given values."""

    def __init__(self, name: str = "r1", run_ms: int | None = 100) -> None:
        self.name, self.run_ms, self.tokens = name, run_ms, 0

    def progress(self) -> TokenCounts:
        return TokenCounts(5, 0, self.tokens)

    def used(self) -> TokenCounts:
        return self.progress()

    def event(self) -> str:
        return json.dumps({"request_id": self.name, "completion_tokens": self.tokens})


@asynccontextmanager
async def opened(
    leases: Leases, one: Ticket | None = None, used: Used | None = None, max_queued: int = 10, deadline_s: float = 10
) -> AsyncIterator[OpenTicket]:
    one = one or ticket(1)
    async with leases.open(one, used or Used(one.id), Room(Bounds(max_queued, 10_000)), deadline_s=deadline_s) as each:
        yield each


async def ids(pool: Pool) -> list[str]:
    return [event["request_id"] for event in await pool.events()]
