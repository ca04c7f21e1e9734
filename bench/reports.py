"""Measures whether reports depend on the number of requests: a tenant's year by day and model over MANY events ÷ the same over FEW.

Both databases are on one Postgres server. The events are spread over the days of a year, keys, models, adapters and statuses, and were in
the ledger before the migration that counts them, as in a service that is upgraded. Each report is read as the API reads it, by a gateway's
role, all pages of it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from sqlalchemy import make_url, text

from bench.frame import Bar, Say, attempted, interleaved, ratios, summary
from lmaas.api.shapes.common import MAX_PAGE
from lmaas.states import UsageDimension
from lmaas.store.database import Database, driver_url
from lmaas.store.migrate import upgrade
from lmaas.store.paging import Part
from lmaas.store.rights import LOGINS, DatabaseRole, role_name
from lmaas.store.scopes import SYSTEM
from lmaas.store.usage_days import UsageFilter, report
from lmaas.up.embedded import postgres

NAME = "usage_report_s"
NAMES = (NAME,)
FEW, MANY = 100_000, 10_000_000
#: Events that one statement adds, and the migration before the daily sums.
AT_ONCE, BEFORE = 500_000, "0018"
ROUNDS = 11
PASSWORD = "bench"  # noqa: S105 (of a server that only this process reaches)
YEAR = UsageFilter(date(2026, 1, 1), date(2026, 12, 31))
BY = (UsageDimension.DAY, UsageDimension.MODEL)

TENANT = "INSERT INTO tenants (id, name, tier, max_queued, max_adapters) VALUES ('ten_1', 'acme', 'standard', 1, 1)"
EVENTS = """
    INSERT INTO usage_events (request_id, tenant_id, key_id, base_model, model, adapter, status, stream, prompt_tokens, cached_tokens,
        completion_tokens, queue_ms, load_ms, run_ms, replica_id, created_at, charge_picousd)
    SELECT 'req_' || n, 'ten_1', 'key_' || n % 3, 'base-' || n % 2, CASE WHEN n % 5 = 0 THEN 'base-' || n % 2 ELSE 'bot-' || n % 5 END,
        CASE WHEN n % 5 <> 0 THEN 'bot' END, CASE WHEN n % 50 = 0 THEN 'failed' ELSE 'completed' END, false, 100, 10, 50, 1, 0, 900,
        'rep_' || n % 40, timestamptz '2026-01-01Z' + n * (interval '365 days' / CAST(:events AS int)), 1000
    FROM generate_series(CAST(:first AS int), CAST(:last AS int)) n
"""


async def measure(model: Path, folder: Path, wanted: Sequence[str], say: Say) -> AsyncIterator[Bar]:
    """Measure the requested bars of NAMES."""
    if NAME in wanted:
        yield await attempted(NAME, _measured(folder, say))


async def _measured(folder: Path, say: Say) -> Bar:
    with postgres(folder / "postgres") as url:
        async with AsyncExitStack() as exits:
            databases: dict[int, Database] = {}
            counted: dict[str, float] = {}
            for events in (FEW, MANY):
                say(f"a ledger of {events:,} events")
                databases[events], counted[f"migration_{events}_s"] = await _database(exits, url, events)
            took = await interleaved(
                ROUNDS, {str(events): lambda _, events=events: _read(databases[events]) for events in databases}  # type: ignore[misc]  # a lambda's default
            )  # fmt: skip
    found = ratios(took[str(MANY)], took[str(FEW)])
    detail: dict[str, Any] = {"ms": {events: 1000 * median(each) for events, each in took.items()}} | counted
    return Bar(NAME, median(found), "<=", 2.0, summary(found) | detail)


async def _read(db: Database) -> float:
    """Read a tenant's year by day and model, and return how long that took. Raises RuntimeError unless it has a line for each group."""
    began, lines, after = time.perf_counter(), 0, None
    while True:
        rows = await report(db, "ten_1", BY, Part(MAX_PAGE, after), wanted=YEAR)
        lines += len(rows[:MAX_PAGE])
        if len(rows) <= MAX_PAGE:
            break
        after = rows[MAX_PAGE - 1].cursor
    if lines != 2 * 365:
        raise RuntimeError(f"the report has {lines} lines")
    return time.perf_counter() - began


async def _database(exits: AsyncExitStack, url: str, events: int) -> tuple[Database, float]:
    """Create a database with this many events, and return it for a gateway with the seconds in which its events were counted."""
    admin = Database(url)
    async with admin.autocommit() as connection:
        await connection.execute(text(f"CREATE DATABASE reports_{events}"))
    await admin.close()
    mine = make_url(driver_url(url)).set(database=f"reports_{events}")
    shown = mine.render_as_string(hide_password=False)
    await asyncio.to_thread(upgrade, shown, BEFORE)
    admin = Database(shown)
    for number, statement in enumerate([TENANT, *[EVENTS] * (events // min(AT_ONCE, events))]):
        async with admin.begin(SYSTEM) as connection:
            await connection.execute(text("SET LOCAL statement_timeout = '10min'"))
            first = (number - 1) * AT_ONCE
            values = {"first": first, "last": first + min(AT_ONCE, events) - 1, "events": events} if number else {}
            await connection.execute(text(statement), values)
    began = time.perf_counter()
    await asyncio.to_thread(upgrade, shown, passwords=dict.fromkeys(LOGINS, PASSWORD))
    took = time.perf_counter() - began
    async with admin.autocommit() as connection:
        await connection.execute(text("VACUUM ANALYZE usage_days"))
    await admin.close()
    login = mine.set(username=role_name("lmaas", DatabaseRole.GATEWAY), password=PASSWORD)
    db = Database(login.render_as_string(hide_password=False), DatabaseRole.GATEWAY)
    exits.push_async_callback(db.close)
    return db, took
