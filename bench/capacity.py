"""Measures figures of docs/how-to/capacity.md: `python -m bench.capacity`.

The figures are CPU times on one core of each server, which other work on the machine changes little. Each is the median of three rounds.
"""

import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
from redis.asyncio import Redis
from sqlalchemy import text

from bench.fleet import fleets
from bench.fleet.names import Sizes
from bench.load import SCOPES, cpu_s, record
from lmaas.config import Settings
from lmaas.control.controller import Controller
from lmaas.metering.writer import write_events
from lmaas.scheduling.client import Beat, Bounds, Scheduler, Seed, Ticket, connect
from lmaas.scheduling.states import TicketState
from lmaas.states import Observed
from lmaas.store.database import Database
from lmaas.store.migrate import upgrade
from lmaas.store.models import BaseModel, put_base_model
from lmaas.store.replicas import add_replica, observe
from lmaas.store.scopes import SYSTEM
from lmaas.store.tenants import Tenant, create_tenant
from lmaas.types import Resources, TokenCounts
from lmaas.up import embedded

ROUNDS = 3
POOL = "pool"
CALLS = 10_000
AT_ONCE = 32
WAITING = 20_000
EVENTS = 10_000
POOLS, REPLICAS_EACH = 100, 10
BOUNDS = Bounds(10**9, 10**9)
#: Replicas that are only names, half of whose slots are taken in the smaller fleets.
FLEETS = (
    Sizes(1, 64, running=8),
    Sizes(100, 64, running=800),
    Sizes(1000, 64, running=8000),
    Sizes(10_000, 8, at_once=32),
    Sizes(10_000, 8, pools=1000, at_once=32),
)


class Names:
    """A provisioner whose replicas are entries of a dictionary."""

    def __init__(self) -> None:
        self.replicas: dict[str, str] = {}

    async def start(self, replica_id: str, pool_id: str, needs: Resources) -> None:
        """Add the replica."""
        self.replicas[replica_id] = pool_id

    async def kill(self, replica_id: str) -> None:
        """Remove the replica."""
        self.replicas.pop(replica_id, None)

    async def list(self) -> dict[str, str]:
        """Return all replicas."""
        return dict(self.replicas)

    async def last_words(self, replica_id: str) -> str:
        """Return no reason."""
        return ""

    def start_delay_s(self) -> float:
        """Return 0, because starts are never delayed."""
        return 0.0

    def first_start_s(self) -> float:
        """Return the duration of a plain start."""
        return 20.0

    async def capacity(self) -> Resources | None:
        """Return None, because the capacity is unknown."""
        return None


def ticket(number: int) -> Ticket:
    """Return a request of a tenant with an adapter and limits."""
    event = record(number, "ten_1")
    source = "ten_1/" + "a" * 64
    limits: dict[str, Any] = {"prompt_tokens": 700, "completion_tokens": 200, "prices": (150_000, 75_000, 600_000), "limits": SCOPES}
    return Ticket(f"req_{number:032}", POOL, f"ten_{number % 50}", f"gw_{number % 4}", f"ten_1-{'a' * 16}", source, 1, event, **limits)


async def many(calls: int, call: Callable[[int], Awaitable[Any]]) -> None:
    """Run calls concurrently, as many at once as in a busy gateway."""
    for first in range(0, calls, AT_ONCE):
        await asyncio.gather(*(call(number) for number in range(first, min(first + AT_ONCE, calls))))


async def scheduler_calls(redis: Redis) -> dict[str, float]:
    """Measure the server's CPU time in µs for each call of the scheduler."""
    await redis.flushall()
    scheduler = Scheduler(redis)
    information: Any = await redis.info("server")
    server = psutil.Process(int(information["process_id"]))
    adapter = ticket(0).adapter
    beat = Beat("http://10.0.0.1:8000", 10**6, 8, Observed.READY, [adapter])
    month = time.gmtime().tm_year * 100 + time.gmtime().tm_mon
    seeds = {scope.id: Seed(month, 0, 0) for scope in SCOPES}
    await scheduler.heartbeat(POOL, "rep_0", beat)
    tickets = [ticket(number) for number in range(CALLS)]
    figures = {}

    async def first(one: Ticket) -> None:
        """Submit the first ticket of a month, with the usage so far."""
        for _ in range(len(SCOPES)):
            await scheduler.submit(one, BOUNDS, seeds=seeds)
        await scheduler.release(one, one.event, 1000)

    await first(tickets[0])

    async def measure(name: str, calls: int, call: Callable[[int], Awaitable[Any]]) -> None:
        before = cpu_s(server)
        await many(calls, call)
        figures[name] = (cpu_s(server) - before) / calls * 1e6

    async def submit(number: int) -> None:
        if (await scheduler.submit(tickets[number], BOUNDS))["state"] != TicketState.GRANTED:
            raise RuntimeError("a request with a free slot was not granted")

    async def release(number: int) -> None:
        await scheduler.release(tickets[number], tickets[number].event, 1000, TokenCounts(700, 300, 200))

    async def renew(number: int) -> None:
        first = number * 32 % (CALLS - 32)
        await scheduler.renew(POOL, [(each.id, TokenCounts(700, 300, 100)) for each in tickets[first : first + 32]])

    await measure("submit, granted at once", CALLS, submit)
    await measure("renew of 32 requests", 1000, renew)
    await measure("heartbeat", 2000, lambda number: scheduler.heartbeat(POOL, "rep_0", beat))
    await measure("stats", 200, lambda number: scheduler.stats(POOL))
    await measure("release, with its event", CALLS, release)
    # With one slot, all requests wait.
    await redis.flushall()
    await scheduler.heartbeat(POOL, "rep_0", Beat("http://10.0.0.1:8000", 1, 8, Observed.READY, [adapter]))
    await first(tickets[0])

    async def memory() -> int:
        found: Any = await redis.info("memory")
        return int(found["used_memory"])

    empty = await memory()
    waiting = [ticket(number) for number in range(CALLS, CALLS + WAITING)]
    await measure("submit, queued", WAITING, lambda number: scheduler.submit(waiting[number], BOUNDS))
    figures["bytes of memory for each waiting request"] = (await memory() - empty) / WAITING
    return figures


async def fleet_calls(folder: Path) -> dict[str, float]:
    """Measure the server's CPU time in µs for each call in fleets of several sizes."""
    figures = {}
    for sizes in FLEETS:
        async with fleets(folder / f"{sizes.replicas}-{sizes.pools}", fleet=sizes) as made:
            fleet = made["fleet"]
            await fleet.live()
            name = f"{sizes.replicas} replicas in {sizes.pools} pools, {sizes.resident} resident adapters each"
            figures[f"heartbeat, {name}"] = await fleet.heartbeats()
            await fleet.live()
            figures[f"submit, granted at once, and release, {name}"] = await fleet.with_room()
    return figures


async def ledger(redis: Redis, db: Database, owner: Tenant, server: Callable[[], float], round_: int) -> dict[str, float]:
    """Measure the metering writer, and the size of a row."""
    await redis.flushall()
    for first in range(0, EVENTS, 1000):
        async with redis.pipeline(transaction=False) as pipeline:
            for number in range(first, first + 1000):
                pipeline.xadd(f"lmaas:{{{POOL}}}:usage", {"event": record(number, owner.id, round_)})
            await pipeline.execute()
    stream: Any = await redis.memory_usage(f"lmaas:{{{POOL}}}:usage", samples=0)
    ours, theirs, began = cpu_s(psutil.Process()), server(), time.perf_counter()
    while await write_events(redis, db, POOL):
        pass
    took = time.perf_counter() - began
    async with db.begin(SYSTEM) as connection:
        size, rows = (await connection.execute(text("SELECT pg_total_relation_size('usage_events'), count(*) FROM usage_events"))).one()
    return {
        "events a second, one writer (wall clock)": EVENTS / took,
        "CPU µs of the controller for each event": (cpu_s(psutil.Process()) - ours) / EVENTS * 1e6,
        "CPU µs of Postgres for each event": (server() - theirs) / EVENTS * 1e6,
        "bytes of a row, indexes included": size / rows,
        "bytes of Redis for each event not yet written": stream / EVENTS,
    }


async def ticks(settings: Settings, redis: Redis, db: Database, server: Callable[[], float]) -> dict[str, float]:
    """Measure a tick of the controller with many pools and replicas that need no action."""
    await redis.flushall()
    async with db.begin(SYSTEM) as connection:
        await connection.execute(text("TRUNCATE replicas CASCADE"))  # remove the rows of the last round
    scheduler, names = Scheduler(redis), Names()
    for pool in range(POOLS):
        bounds: dict[str, Any] = {"min_replicas": REPLICAS_EACH, "max_replicas": REPLICAS_EACH}
        model = BaseModel("", f"base-{pool:03}", "no-model", "float32", {}, 16, 8, 8, 16, 2048, 2**28, "", **bounds)
        model = await put_base_model(db, model)
        for number in range(REPLICAS_EACH):
            replica = f"rep_{pool:03}_{number}"
            await add_replica(db, replica, model.id)
            await observe(db, replica, Observed.READY, url="http://10.0.0.1:8000")
            names.replicas[replica] = model.id
            await scheduler.heartbeat(model.id, replica, Beat("http://10.0.0.1:8000", 16, 8, Observed.READY, []))
    information: Any = await redis.info("server")
    valkey = psutil.Process(int(information["process_id"]))
    controller = Controller(settings, db, scheduler, names)
    await controller.tick()
    ours, theirs, queue, began = cpu_s(psutil.Process()), server(), cpu_s(valkey), time.perf_counter()
    for _ in range(3):
        await controller.tick()
    return {
        f"seconds of a tick, {POOLS} pools and {POOLS * REPLICAS_EACH} replicas (wall clock)": (time.perf_counter() - began) / 3,
        "CPU s of the controller for it": (cpu_s(psutil.Process()) - ours) / 3,
        "CPU s of Postgres for it": (server() - theirs) / 3,
        "CPU s of Valkey for it": (cpu_s(valkey) - queue) / 3,
    }


async def measured() -> dict[str, float]:
    """Return all figures, each the median of the rounds."""
    rounds: list[dict[str, float]] = []
    with (
        tempfile.TemporaryDirectory(prefix="lmaas-capacity-") as folder,
        embedded.postgres(Path(folder) / "postgres") as database_url,
        embedded.valkey(Path(folder) / "valkey") as redis_url,
    ):
        await asyncio.to_thread(upgrade, database_url)
        settings = Settings(home=Path(folder), database_url=database_url, redis_url=redis_url, idle_timeout_s=1e6)
        db, redis = Database(database_url), connect(redis_url)
        postmaster = int((Path(folder) / "postgres" / "postmaster.pid").read_text().split()[0])

        def postgres_s() -> float:
            return sum(cpu_s(process) for process in psutil.Process(postmaster).children())

        owner = await create_tenant(db, "acme", "standard", 10, 10)
        for round_ in range(ROUNDS):
            figures = await scheduler_calls(redis) | await fleet_calls(Path(folder) / f"fleets-{round_}")
            figures |= await ledger(redis, db, owner, postgres_s, round_)
            figures |= await ticks(settings, redis, db, postgres_s)
            rounds.append(figures)
        await redis.aclose()
        await db.close()
    return {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}


if __name__ == "__main__":
    json.dump({name: round(value, 4) for name, value in asyncio.run(measured()).items()}, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")
