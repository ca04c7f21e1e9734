"""Measures the cost of row-level security: store functions on a database with policies ÷ on one without, alternating call by call.

Both databases are on one Postgres server and have the same rows, roles, rights and scopes. Each call is a whole transaction, as a gateway
or the metering writer runs it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from sqlalchemy import make_url, text

from bench.frame import Bar, Say, attempted, summary
from lmaas.states import UsageStatus
from lmaas.store import idempotency, tenants, usage, usage_days
from lmaas.store.adapters import find_served
from lmaas.store.database import Database, driver_url
from lmaas.store.idempotency import Claim
from lmaas.store.migrate import upgrade
from lmaas.store.rights import GUARDED, LOGINS, DatabaseRole, role_name
from lmaas.store.scopes import SYSTEM
from lmaas.store.usage import UsageEvent
from lmaas.up.embedded import postgres

NAME = "policy_cost"
NAMES = (NAME,)
TENANTS, ADAPTERS, EVENTS = 1_000, 10, 100
#: Calls of each function on each database in a round.
CALLS, ROUNDS = 300, 7
PASSWORD = "bench"  # noqa: S105 (of a server that only this process reaches)

POPULATE = (
    """INSERT INTO base_models (id, name, source, dtype, linears, max_lora_rank, max_loras, max_cpu_loras, max_num_seqs, max_model_len,
         kv_cache_bytes, engine_args) VALUES ('mod_1', 'base', '/m', 'float32', '{}', 1, 1, 1, 1, 1, 1, '')""",
    """INSERT INTO tenants (id, name, tier, max_queued, max_adapters)
       SELECT 'ten_' || n, 'tenant-' || n, 'standard', 1000, 1000 FROM generate_series(0, :tenants - 1) n""",
    """INSERT INTO api_keys (id, tenant_id, role, name, hash, prefix)
       SELECT 'key_' || n, 'ten_' || n, 'inference', '', 'hash-' || n, '' FROM generate_series(0, :tenants - 1) n""",
    """INSERT INTO adapters (id, tenant_id, name, base_model_id, live_version) SELECT 'ada_' || n, 'ten_' || (n % :tenants),
         'bot-' || (n / :tenants), 'mod_1', 1 FROM generate_series(0, CAST(:tenants AS int) * :adapters - 1) n""",
    """INSERT INTO adapter_versions (adapter_id, tenant_id, version, content_hash, rank, target_modules, size_bytes)
       SELECT id, tenant_id, 1, md5(id), 8, '[]', 1 FROM adapters""",
    """INSERT INTO usage_events (request_id, tenant_id, key_id, base_model, model, status, stream, prompt_tokens, cached_tokens,
         completion_tokens, queue_ms, load_ms, run_ms, created_at) SELECT 'req_' || n, 'ten_' || (n % :tenants), 'key_' || (n % :tenants),
         'base', 'bot-0', 'completed', true, 100, 0, 50, 1, 0, 900, now() FROM generate_series(0, CAST(:tenants AS int) * :events - 1) n""",
)


@dataclass
class Place:
    """One database, with the rights of a gateway and of a controller."""

    gateway: Database
    controller: Database


EVENT = UsageEvent(
    "", "", "key", "base", "bot-0", None, None, UsageStatus.COMPLETED, None, True, 100, 0, 50, 1, 0, 900, None, datetime.now(UTC)
)


async def _claim(place: Place, number: int) -> object:
    return await idempotency.take(place.gateway, Claim(f"ten_{number % TENANTS}", f"key-{number}", b"", f"req-{number}"))


async def _event(place: Place, number: int) -> None:
    await usage.record_events(place.controller, [replace(EVENT, request_id=f"new_{number}", tenant_id=f"ten_{number % TENANTS}")])


HOT: dict[str, Callable[[Place, int], Awaitable[object]]] = {
    "lookup of a key": lambda place, number: tenants.find_principal(place.gateway, f"hash-{number % TENANTS}"),
    "resolution of an adapter": lambda place, number: find_served(place.gateway, f"ten_{number % TENANTS}", "bot-3", None),
    "claim of an idempotency key": _claim,
    "usage event": _event,
    "a month's use": lambda place, number: usage_days.month_total(
        place.gateway, f"ten_{number % TENANTS}", datetime.now(UTC).year, datetime.now(UTC).month
    ),
}


async def measure(model: Path, folder: Path, wanted: Sequence[str], say: Say) -> AsyncIterator[Bar]:
    """Measure the bar if it is requested."""
    del model
    if wanted:
        yield await attempted(NAME, _policy_cost(folder, say))


async def _policy_cost(folder: Path, say: Say) -> Bar:
    say(f"making two databases with {TENANTS:,} tenants and {TENANTS * EVENTS:,} events")
    figures: dict[str, list[float]] = {name: [] for name in HOT}
    milliseconds: dict[str, list[float]] = {name: [] for name in HOT}
    with postgres(folder / "postgres") as url:
        async with place(url, "guarded", guarded=True) as guarded, place(url, "bare", guarded=False) as bare:
            for turn in range(ROUNDS + 1):
                for name, call in HOT.items():
                    took: dict[int, list[float]] = {0: [], 1: []}
                    for number in range(turn * CALLS, (turn + 1) * CALLS):
                        for which in (0, 1) if number % 2 else (1, 0):
                            began = time.perf_counter()
                            await call((bare, guarded)[which], number)
                            took[which].append(time.perf_counter() - began)
                    if turn:  # the first calls open connections and prepare statements
                        figures[name].append(median(took[1]) / median(took[0]))
                        milliseconds[name].append(1000 * median(took[1]))
    detail: dict[str, Any] = {name: summary(each) | {"ms": summary(milliseconds[name])} for name, each in figures.items()}
    worse = max(detail, key=lambda name: float(detail[name]["median"]))
    return Bar(NAME, detail[worse]["median"], "<=", 1.05, {"worse": worse, **detail})


@asynccontextmanager
async def place(url: str, name: str, *, guarded: bool) -> AsyncIterator[Place]:
    """Create a database with rows of many tenants, with or without policies."""
    async with AsyncExitStack() as exits:
        admin = await _opened(exits, url, None, None)
        async with admin.autocommit() as connection:
            await connection.execute(text(f"CREATE DATABASE {name}"))
        mine = make_url(driver_url(url)).set(database=name).render_as_string(hide_password=False)
        await asyncio.to_thread(upgrade, mine, passwords=dict.fromkeys(LOGINS, PASSWORD))
        admin = await _opened(exits, mine, None, None)
        for statement in POPULATE:
            numbers = {"tenants": TENANTS, "adapters": ADAPTERS, "events": EVENTS}
            used = {key: value for key, value in numbers.items() if f":{key}" in statement}
            async with admin.begin(SYSTEM) as connection:
                await connection.execute(text(statement), used)
        async with admin.begin(SYSTEM) as connection:
            for table in () if guarded else sorted(GUARDED):
                await connection.execute(text(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY, NO FORCE ROW LEVEL SECURITY"))
        async with admin.autocommit() as connection:
            await connection.execute(text("VACUUM ANALYZE"))
        roles = [await _opened(exits, mine, role, role) for role in (DatabaseRole.GATEWAY, DatabaseRole.CONTROLLER)]
        yield Place(*roles)


async def _opened(exits: AsyncExitStack, url: str, login: DatabaseRole | None, role: DatabaseRole | None) -> Database:
    if login is not None:
        url = make_url(driver_url(url)).set(username=role_name("lmaas", login), password=PASSWORD).render_as_string(hide_password=False)
    db = Database(url, role)
    exits.push_async_callback(db.close)
    return db
