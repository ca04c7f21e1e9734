"""Measures the cost of idle tenants: the time to admit a request among many idle tenants ÷ among a few.

It measures the path from a key to a lease, as a gateway runs it (key, model name, limits, fair queue, lease), with a separate Postgres and
Valkey for each size. All tenants have sent requests before: the ledger has their events, and Valkey the remaining keys of their requests.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from sqlalchemy import text

from bench.frame import Bar, Say, attempted, interleaved, ratios, summary
from lmaas.admission.limits import PrincipalLimits, limited_scopes
from lmaas.admission.months import Months
from lmaas.config import Settings
from lmaas.inference.catalog import Catalog
from lmaas.keys import PREFIX
from lmaas.metering.usage import UsageRecord
from lmaas.scheduling.client import Beat, Bounds, Scheduler, Ticket, connect
from lmaas.scheduling.leases import Leases
from lmaas.scheduling.states import NoTicket
from lmaas.states import Observed, UsageStatus
from lmaas.store.database import Database, new_id
from lmaas.store.migrate import upgrade
from lmaas.store.models import BaseModel
from lmaas.store.rights import DatabaseRole
from lmaas.store.scopes import SYSTEM
from lmaas.types import Principal, TokenCounts
from lmaas.up.bootstrap import register_model
from lmaas.up.embedded import embedded_servers
from lmaas.web.auth import Authenticator

NAME = "tenants_at_rest"
NAMES = (NAME,)
#: The numbers of tenants, and of all their adapters.
FEW, MANY = (10, 100), (10_000, 100_000)
#: In a round, each of ASKING tenants sends requests to each of ADAPTERS adapters: a first one, and another one.
ASKING, ADAPTERS = 10, 10
ROUNDS = 11
#: The number of each tenant's events in the ledger.
EVENTS = 10
AT_ONCE = 250
BOUNDS = Bounds(10_000, 20_000)

POPULATE = (
    """INSERT INTO tenants (id, name, tier, max_queued, max_adapters, requests_per_minute, tokens_per_month, budget_per_month)
       SELECT 'ten_' || n, 'tenant-' || n, 'standard', 1000, 1000, 100000000, 1000000000000, 1000000000000
       FROM generate_series(0, :tenants - 1) n""",
    """INSERT INTO api_keys (id, tenant_id, role, name, hash, prefix)
       SELECT 'key_' || n, 'ten_' || n, 'inference', 'bench', encode(sha256(convert_to(:prefix || n, 'UTF8')), 'hex'), 'sk-'
       FROM generate_series(0, :tenants - 1) n""",
    """INSERT INTO adapters (id, tenant_id, name, base_model_id, live_version)
       SELECT 'ada_' || n, 'ten_' || (n % :tenants), 'bot-' || (n / :tenants), :model, 1 FROM generate_series(0, :adapters - 1) n""",
    """INSERT INTO adapter_versions (adapter_id, tenant_id, version, content_hash, rank, target_modules, size_bytes)
       SELECT 'ada_' || n, 'ten_' || (n % :tenants), 1, md5(n::text), 8, '[]'::jsonb, 1000000 FROM generate_series(0, :adapters - 1) n""",
    """INSERT INTO usage_events (request_id, tenant_id, key_id, base_model, model, status, stream, prompt_tokens, cached_tokens,
         completion_tokens, queue_ms, load_ms, run_ms, created_at)
       SELECT 'req_' || n, 'ten_' || (n % :tenants), 'key_' || (n % :tenants), 'model', 'bot-0', 'completed', true, 100, 0, 50, 1, 0, 900,
         now() - n % 1000 * interval '1 minute' FROM generate_series(0, CAST(:tenants AS int) * :events - 1) n""",
    "ANALYZE",
)


@dataclass
class Place:
    """Postgres and Valkey with their tenants."""

    db: Database
    scheduler: Scheduler
    model: BaseModel
    tenants: int
    adapters: int
    #: The replica that runs the requests admitted now.
    replica: str = ""

    async def round(self, number: int) -> tuple[float, float]:
        """Return the median milliseconds of an admission: of a tenant's first request with an adapter, and of the next."""
        chance = random.Random(number)  # noqa: S311
        pairs = [
            (tenant, adapter)
            for tenant in chance.sample(range(self.tenants), ASKING)
            for adapter in chance.sample(range(self.adapters // self.tenants), ADAPTERS)
        ]
        chance.shuffle(pairs)
        # Its caches are empty, as in a gateway that has just started.
        gateway = Door(self)
        await self.run_all(await asyncio.gather(*(gateway.adapter(*pair) for pair in pairs)), number)
        gateway = Door(self)
        passes = []
        for _ in range(2):
            took = []
            for pair in pairs:
                began = time.perf_counter()
                async with gateway.admitted(*pair):
                    took.append((time.perf_counter() - began) * 1000)
            passes.append(median(took))
        return passes[0], passes[1]

    async def run_all(self, adapters: Sequence[str], number: int) -> None:
        """Provide a replica with all these adapters, so that every request gets a lease at once."""
        if self.replica:
            await self.scheduler.deregister(self.model.id, self.replica)
        self.replica = f"rest-{number}"
        beat = Beat("http://127.0.0.1:9", 256, 256, Observed.READY, sorted(adapters))
        await self.scheduler.heartbeat(self.model.id, self.replica, replace(beat, state=Observed.STARTING))
        await self.scheduler.heartbeat(self.model.id, self.replica, beat)


class Door:
    """The parts of a gateway that admit requests."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self.authenticate = Authenticator(place.db, 300)
        self._catalog = Catalog(place.db)
        self._months = Months(place.db)
        self._leases = Leases(place.scheduler, new_id("gw"))

    async def adapter(self, tenant: int, adapter: int) -> str:
        """Return the engine's name of an adapter."""
        return (await self._catalog.resolve(f"ten_{tenant}", f"bot-{adapter}")).adapter

    @asynccontextmanager
    async def admitted(self, tenant: int, adapter: int) -> AsyncIterator[None]:
        """Admit a request of this tenant with its key, from the key to the lease. The request ends with the block."""
        principal = await self.authenticate(_key(tenant))
        name = f"bot-{adapter}"
        model = await self._catalog.resolve(principal.tenant_id or "", name)
        record = UsageRecord(
            new_id("req"), principal.tenant_id, principal.key_id, model.base.name, name, model.adapter, model.version, stream=True
        )
        ticket = _ticket(record, principal, self._place.model.id, model.adapter, self._leases.gateway)
        async with self._leases.open(ticket, record, PrincipalLimits(self._months, principal, BOUNDS), deadline_s=10) as opened:
            lease = await opened.wait(5)
            if lease is None:
                raise RuntimeError("a request was not admitted at once")
            yield
            record.start(lease.replica, lease.queue_ms, lease.load_ms)
            record.count({"prompt_tokens": 100, "completion_tokens": 50})
            record.end(UsageStatus.COMPLETED)


def _key(tenant: int) -> str:
    return f"{PREFIX}{tenant}"


def _ticket(record: UsageRecord, principal: Principal, pool: str, adapter: str, gateway: str) -> Ticket:
    return Ticket(
        id=record.request_id,
        pool=pool,
        tenant=principal.tenant_id or "",
        gateway=gateway,
        adapter=adapter,
        source=adapter,
        weight=1,
        event=record.event(),
        prompt_tokens=100,
        completion_tokens=50,
        limits=limited_scopes(principal),
    )


@asynccontextmanager
async def place(model: Path, folder: Path, tenants: int, adapters: int) -> AsyncIterator[Place]:
    """Start servers with this many tenants, each of which has sent requests before."""
    given = Settings(home=folder / "home", model=str(model))
    given.home.mkdir(parents=True)
    console = Console(quiet=True)
    with embedded_servers(given) as settings:
        await asyncio.to_thread(upgrade, str(settings.database_url))
        async with AsyncExitStack() as exits:
            db = Database(str(settings.database_url), DatabaseRole.GATEWAY)
            exits.push_async_callback(db.close)
            admin = Database(str(settings.database_url))
            exits.push_async_callback(admin.close)
            base = await register_model(settings, db, console)
            redis = connect(str(settings.redis_url))
            exits.push_async_callback(redis.aclose)
            numbers = {"tenants": tenants, "adapters": adapters, "events": EVENTS, "model": base.id, "prefix": PREFIX}
            for statement in POPULATE:
                async with admin.begin(SYSTEM) as connection:
                    used = {name: value for name, value in numbers.items() if f":{name}" in statement}
                    await connection.execute(text(statement), used)
            made = Place(db, Scheduler(redis), base, tenants, adapters)
            await _all_asked(made)
            yield made


async def _all_asked(made: Place) -> None:
    """Run one request of each tenant, so that Valkey has the keys that requests leave behind."""
    await made.run_all([], 0)
    door = Door(made)
    for start in range(0, made.tenants, AT_ONCE):
        await asyncio.gather(*(_asked(made, door, tenant) for tenant in range(start, min(made.tenants, start + AT_ONCE))))


async def _asked(made: Place, door: "Door", tenant: int) -> None:
    principal = await door.authenticate(_key(tenant))
    record = UsageRecord(new_id("req"), principal.tenant_id, principal.key_id, made.model.name, "bot-0", None, None, stream=True)
    ticket = _ticket(record, principal, made.model.id, "", "bench")
    report = await made.scheduler.submit(ticket, BOUNDS)
    if report["state"] == NoTicket.UNSEEDED:
        seeds = await Months(made.db).seeds(ticket.tenant, report["scopes"], report["month"])
        await made.scheduler.submit(ticket, BOUNDS, seeds=seeds)
    await made.scheduler.release(ticket, "", 100, TokenCounts(100, 0, 50))


async def measure(model: Path, folder: Path, wanted: Sequence[str], say: Say) -> AsyncIterator[Bar]:
    """Measure the bar if it is requested."""
    if wanted:
        yield await attempted(NAME, _at_rest(model, folder, say))


async def _at_rest(model: Path, folder: Path, say: Say) -> Bar:
    say(f"making {MANY[0]:,} tenants with {MANY[1]:,} adapters")
    async with place(model, folder / "few", *FEW) as few, place(model, folder / "many", *MANY) as many:
        await interleaved(1, {"few": few.round, "many": many.round})  # opens connections and fills the servers' caches
        figures = await interleaved(ROUNDS, {"few": partial(_later, few), "many": partial(_later, many)})
    detail: dict[str, Any] = {}
    for index, name in enumerate(("first request", "next request")):
        ms = {size: [each[index] for each in rounds] for size, rounds in figures.items()}
        detail[name] = summary(ratios(ms["many"], ms["few"])) | {"ms": {size: summary(each) for size, each in ms.items()}}
    worse = max(detail, key=lambda name: float(detail[name]["median"]))
    sizes = {"few": FEW, "many": MANY}
    return Bar(NAME, detail[worse]["median"], "<=", 1.2, {"worse": worse, **detail[worse], **detail, "tenants and adapters": sizes})


async def _later(where: Place, number: int) -> tuple[float, float]:
    return await where.round(number + 1)
