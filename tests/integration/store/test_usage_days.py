"""The daily sums of the ledger: exact after every write, filled by their migration, and the only source of reports."""

import asyncio
import base64
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DataError

from lmaas.errors import InvalidRequest
from lmaas.metering.usage import CANCELLED, PUT_BACK
from lmaas.states import UsageDimension, UsageStatus, WorkClass
from lmaas.store import migrate, usage_days
from lmaas.store.database import Database, driver_url
from lmaas.store.migrate import upgrade
from lmaas.store.paging import Part
from lmaas.store.scopes import OPERATOR, SYSTEM, AnyScope
from lmaas.store.tenants import delete_tenant
from lmaas.store.usage import EventFilter, UsageEvent, insert_events, list_events, record_events
from lmaas.store.usage_days import UsageFilter, UsageRow, compare, month_total, report
from tests.integration.store.build import tenant, usage_event
from tests.support.conditions import until

DAY, MONTH, TENANT, KEY, MODEL, ADAPTER, WORK = UsageDimension
INTERACTIVE, BACKGROUND = WorkClass
FRIDAY, SATURDAY = date(2026, 1, 2), date(2026, 1, 3)
LATE = datetime(2026, 1, 2, 23, 59, 59, 999_000, tzinfo=UTC)
NIGHT = datetime(2026, 1, 3, tzinfo=UTC)


def figures(rows: list[UsageRow], *fields: str) -> list[tuple[Any, ...]]:
    return [tuple(getattr(row, field) for field in fields) for row in rows]


async def agree(db: Database, *days: date) -> int:
    """Check that the sums of these days equal the ledger's, and return the number of their events."""
    total = 0
    for day in days or (FRIDAY, SATURDAY):
        events, differences = await compare(db, day)
        assert differences == []
        total += events
    return total


async def test_groups_and_their_figures(db: Database) -> None:
    acme, other = await tenant(db, "acme"), await tenant(db, "other")
    bot = {"model": "bot@1", "adapter": f"{acme.id}-a", "key_id": "key_1"}
    await record_events(
        db,
        [
            usage_event("r1", acme.id, charge_picousd=2**62),
            usage_event("r2", acme.id, status=UsageStatus.FAILED, created_at=LATE, charge_picousd=2**62 + 1),
            usage_event("r3", acme.id, status=UsageStatus.ABORTED, **bot | {"model": "bot"}),
            usage_event("r4", acme.id, created_at=NIGHT, status=UsageStatus.EXPIRED, prompt_tokens=0, cached_tokens=0, completion_tokens=0),
            usage_event("r5", acme.id, **bot),
            usage_event("r6", other.id, work=BACKGROUND),
            usage_event("p1", None, status=UsageStatus.PROBE),
        ],
    )
    assert await agree(db) == 7
    rows = await report(db, OPERATOR, list(UsageDimension))
    of_acme = (FRIDAY, date(2026, 1, 1), acme.id, "acme", None, None, "base", None, INTERACTIVE)
    assert rows[1] == UsageRow(*of_acme, 2, 1, 0, 20, 8, 10, 600, 2**63 + 1, {}, rows[1].cursor)
    assert figures(rows, "day", "tenant", "key_id", "adapter", "work", "requests", "failed_requests", "unpriced_requests") == [
        (SATURDAY, "acme", None, None, INTERACTIVE, 1, 1, 0),
        (FRIDAY, "acme", None, None, INTERACTIVE, 2, 1, 0),
        (FRIDAY, "acme", "key_1", "bot", INTERACTIVE, 2, 0, 2),
        (FRIDAY, "other", None, None, BACKGROUND, 1, 0, 1),
        (FRIDAY, None, None, None, INTERACTIVE, 1, 0, 0),
    ]
    assert figures(await report(db, OPERATOR, [TENANT]), "tenant", "requests") == [("acme", 5), ("other", 1), (None, 1)]
    assert figures(await report(db, OPERATOR, [MONTH, WORK]), "month", "work", "requests") == [
        (date(2026, 1, 1), INTERACTIVE, 6),
        (date(2026, 1, 1), BACKGROUND, 1),
    ]
    assert figures(await report(db, acme.id, [ADAPTER]), "day", "adapter", "requests") == [(None, None, 3), (None, "bot", 2)]
    await delete_tenant(db, acme.id)
    assert figures(await report(db, acme.id, [DAY]), "day", "requests") == [(SATURDAY, 1), (FRIDAY, 4)]  # for the bill
    assert await usage_days.find_owner(db, acme.id) == acme.id
    assert await usage_days.find_owner(db, "acme") is None
    assert await usage_days.find_owner(db, "other") == other.id


FILTERS: dict[str, tuple[UsageFilter, int]] = {
    "all": (UsageFilter(), 5),
    "since": (UsageFilter(since=SATURDAY), 1),
    "until": (UsageFilter(until=FRIDAY), 4),
    "one day": (UsageFilter(since=FRIDAY, until=FRIDAY), 4),
    "no day": (UsageFilter(since=date(2026, 1, 4)), 0),
    "key": (UsageFilter(key_id="key_1"), 2),
    "no key": (UsageFilter(key_id="key_2"), 0),
    "model": (UsageFilter(model="base"), 4),
    "adapter": (UsageFilter(adapter="bot"), 2),
    "the name of a model is no adapter": (UsageFilter(adapter="base"), 0),
    "work": (UsageFilter(work=BACKGROUND), 1),
    "several": (UsageFilter(since=FRIDAY, model="base", adapter="bot", work=INTERACTIVE), 2),
}


async def test_filters(db: Database) -> None:
    acme = await tenant(db, "acme")
    await record_events(
        db,
        [
            usage_event("r1", acme.id),
            usage_event("r2", acme.id, created_at=LATE, model="bot", adapter="a", key_id="key_1"),
            usage_event("r3", acme.id, created_at=LATE, model="bot@7", adapter="b", key_id="key_1"),
            usage_event("r4", acme.id, base_model="small", model="small", work=BACKGROUND),
            usage_event("r5", acme.id, created_at=NIGHT),
        ],
    )
    for name, (wanted, count) in FILTERS.items():
        assert sum(row.requests for row in await report(db, OPERATOR, [DAY], wanted=wanted)) == count, name


async def test_waste_is_kept_apart(db: Database) -> None:
    acme, other = await tenant(db, "acme"), await tenant(db, "other")
    wasted = {"status": UsageStatus.WASTED, "work": BACKGROUND}
    await record_events(
        db,
        [
            usage_event("r1", acme.id, work=BACKGROUND, charge_picousd=7),
            usage_event("r2", acme.id, charge_picousd=20),
            usage_event("w1", acme.id, code="put_back", **wasted),
            usage_event("w2", acme.id, code="put_back", **wasted),
            usage_event("w3", acme.id, code="runner_lost", **wasted),
            usage_event("w4", other.id, **wasted),
        ],
    )
    await agree(db)
    rows = await report(db, OPERATOR, [DAY, TENANT, WORK], with_waste=True)
    assert figures(rows, "tenant", "work", "requests", "prompt_tokens", "run_ms", "charge_picousd", "waste") == [
        ("acme", INTERACTIVE, 1, 10, 300, 20, {}),
        ("acme", BACKGROUND, 1, 10, 300, 7, {"put_back": 30, "runner_lost": 15}),
        ("other", BACKGROUND, 0, 0, 0, 0, {"unfinished": 15}),
    ]
    assert figures(await report(db, OPERATOR, [TENANT]), "tenant", "requests", "waste") == [("acme", 2, {})]
    assert await month_total(db, acme.id, 2026, 1) == (30, 27)
    assert await month_total(db, acme.id, 2026, 2) == (0, 0)
    assert await month_total(db, other.id, 2026, 1) == (0, 0)


@pytest.mark.parametrize("by", [[dimension] for dimension in UsageDimension] + [list(UsageDimension), [DAY, TENANT], [KEY, WORK]], ids=str)
async def test_pages_are_the_whole_report(db: Database, by: list[UsageDimension]) -> None:
    owners = [await tenant(db, name) for name in ("acme", "other")]
    await record_events(
        db,
        [
            usage_event(
                f"r{number}",
                owners[number % 2].id if number % 7 else None,
                created_at=NIGHT + timedelta(days=number % 5, hours=number),
                key_id=(None, "key_1", "key_2")[number % 3],
                model=("base", "bot", "bot@1", "other")[number % 4],
                adapter=(None, "a", "a", "b")[number % 4],
                work=BACKGROUND if number % 3 else INTERACTIVE,
                status=UsageStatus.WASTED if number % 6 == 0 else UsageStatus.COMPLETED,
            )
            for number in range(60)
        ],
    )
    scopes: list[AnyScope] = [OPERATOR, owners[0].id]
    for scope in scopes:
        whole = await report(db, scope, by, with_waste=True)
        assert sum(row.requests for row in whole) > 0
        for limit in (1, 3, 1000):
            found, after = [], None
            while True:
                rows = await report(db, scope, by, Part(limit, after), with_waste=True)
                found += rows[:limit]
                if len(rows) <= limit:
                    break
                after = found[-1].cursor
            assert found == whole


async def test_a_place_in_another_report_is_refused(db: Database) -> None:
    acme = await tenant(db, "acme")
    await record_events(db, [usage_event("r1", acme.id)])
    [row] = await report(db, acme.id, [DAY, MODEL])
    [other] = await report(db, acme.id, [MODEL])
    assert await report(db, acme.id, [MODEL, DAY], Part(5, row.cursor)) == []
    for cursor in (other.cursor, row.cursor[:-2], row.cursor + "AA", "", "none", "é", "W10", "WzFd", "/" * 9, "A" * 1999):
        with pytest.raises(InvalidRequest) as refused:
            await report(db, acme.id, [DAY, MODEL], Part(5, cursor))
        assert (refused.value.error_code, refused.value.param) == ("invalid_cursor", "after")


PLACES = [
    '["day",-1]',
    '["day",4000000]',
    '["day",true]',
    '["day","2026"]',
    '["day",1,2]',
    '["day"]',
    '["model","a\\u0000"]',
    '["model","\\ud800"]',
]


@pytest.mark.parametrize("place", PLACES)
async def test_a_place_that_was_made_up_is_refused(db: Database, place: str) -> None:
    cursor = base64.urlsafe_b64encode(place.encode()).decode().rstrip("=")
    for by in ([DAY], [MODEL]):
        with pytest.raises(InvalidRequest, match="'after'"):
            await report(db, OPERATOR, by, Part(5, cursor))


NARROW = {
    "none": EventFilter(),
    "a key": EventFilter(key_id="key_1"),
    "an adapter": EventFilter(adapter="bot"),
    "an end": EventFilter(status=UsageStatus.FAILED),
    "waste": EventFilter(status=UsageStatus.WASTED),
    "a model": EventFilter(model="base"),
    "days": EventFilter(since=date(2026, 1, 9), until=date(2026, 2, 2), work=BACKGROUND),
    "several": EventFilter(key_id="key_1", status=UsageStatus.FAILED, until=date(2026, 2, 10)),
    "nothing": EventFilter(key_id="key_2"),
}


async def test_rare_events_are_found_on_their_days(db: Database) -> None:
    acme, other = await tenant(db, "acme"), await tenant(db, "other")
    events = [
        usage_event(
            f"r{number:03}",
            (acme if number % 3 else other).id,
            # Several a day, and days without any.
            created_at=NIGHT + timedelta(hours=7 * number + (60 if number % 17 == 0 else 0)),
            key_id="key_1" if number % 10 == 1 else None,
            model="bot@1" if number % 7 == 0 else "base",
            adapter="a" if number % 7 == 0 else None,
            status=(UsageStatus.FAILED, UsageStatus.WASTED, UsageStatus.COMPLETED, UsageStatus.COMPLETED)[number % 4],
            work=BACKGROUND if number % 5 == 0 else INTERACTIVE,
        )
        for number in range(200)
    ]
    await record_events(db, events)

    def is_wanted(event: UsageEvent, wanted: EventFilter) -> bool:
        day = event.created_at.date()
        within = (wanted.since is None or day >= wanted.since) and (wanted.until is None or day <= wanted.until)
        pairs = [
            (wanted.key_id, event.key_id),
            (wanted.adapter, event.adapter_name),
            (wanted.status, event.status),
            (wanted.work, event.work),
            (wanted.model, event.base_model),
        ]
        return within and all(value is None or value == actual for value, actual in pairs)

    for name, wanted in NARROW.items():
        for scope, owner in ((OPERATOR, None), (acme.id, acme.id)):
            expected = [event for event in events if is_wanted(event, wanted) and owner in (None, event.tenant_id)]
            expected.sort(key=lambda event: (event.created_at, event.request_id), reverse=True)
            for limit in (1, 7, 1000):
                found, after = [], None
                while True:
                    rows = await list_events(db, scope, Part(limit, after), wanted=wanted)
                    found += rows[:limit]
                    if len(rows) <= limit:
                        break
                    after = found[-1].request_id
                assert found == expected, (name, owner, limit)


def random_event(chance: random.Random, owners: list[str]) -> UsageEvent:
    """Return an event of one of few requests, so that many are written again, with any values that count."""
    number = chance.randrange(40)
    tenant_id = owners[number % len(owners)]
    status = chance.choice([*UsageStatus])
    return usage_event(
        f"r{number}",
        tenant_id,
        status=status,
        code=chance.choice([None, CANCELLED, PUT_BACK]),
        key_id=chance.choice([None, "key_1"]),
        model=chance.choice(["base", "bot@2"]),
        adapter=chance.choice([None, "a"]),
        work=chance.choice([*WorkClass]),
        replica_id=chance.choice([None, "rep_1", "rep_2"]),
        prompt_tokens=chance.randrange(5),
        completion_tokens=chance.randrange(5),
        queue_ms=chance.randrange(3_600_000),
        charge_picousd=chance.randrange(3),
        created_at=LATE - timedelta(minutes=chance.randrange(60)) + timedelta(minutes=chance.randrange(60)),
    )


async def test_sums_stay_exact_whatever_replaces_what_and_whoever_writes(db: Database) -> None:
    """The metering writer and job runners write events of the same requests at the same time. None waits for another for ever."""
    chance = random.Random(16)
    owners = [(await tenant(db, f"t{number}")).id for number in range(3)]

    async def writer() -> None:
        for _ in range(15):
            await record_events(db, [random_event(chance, owners) for _ in range(20)])

    async def runner() -> None:
        # As in `batch_lines.end_lines`: all tenants in one transaction, in their order, each in its scope.
        for _ in range(15):
            events = [random_event(chance, owners) for _ in range(20)]
            async with db.begin(SYSTEM) as connection:
                for owner in sorted(owners):
                    await connection.execute(text("SELECT set_config('lmaas.tenant', :owner, true)"), {"owner": owner})
                    if of_owner := [event for event in events if event.tenant_id == owner]:
                        await insert_events(connection, of_owner)

    async with asyncio.TaskGroup() as group:
        for work in (writer, writer, runner, runner, runner):
            group.create_task(work())
    assert await agree(db, FRIDAY, SATURDAY, date(2026, 1, 4)) == 40


async def test_an_event_that_is_not_stored_is_not_counted(db: Database) -> None:
    acme = await tenant(db, "acme")
    await record_events(db, [usage_event("r1", acme.id)])
    await record_events(db, [usage_event("r1", acme.id, prompt_tokens=1000)])
    await record_events(db, [usage_event("r1", acme.id, status=UsageStatus.WASTED)])
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 (the block is what is tested)
        async with db.begin(SYSTEM) as connection:
            await insert_events(connection, [usage_event("r2", acme.id)])
            raise ZeroDivisionError
    assert figures(await report(db, OPERATOR, [DAY]), "requests", "prompt_tokens") == [(1, 10)]
    assert await agree(db) == 1


@pytest.mark.parametrize(
    ("change", "table", "more"),
    [
        ("UPDATE usage_days SET prompt_tokens = prompt_tokens + 7", "usage_days", {"prompt_tokens": -7}),
        ("DELETE FROM usage_days", "usage_days", {"requests": 1, "unpriced": 1, "run_ms": 300}),
        ("UPDATE work_days SET load_ms = 0", "work_days", {"load_ms": 2}),
        ("UPDATE usage_days SET adapter = 'bot'", "usage_days", {"requests": 1}),
    ],
)
async def test_a_sum_that_is_wrong_is_found(db: Database, change: str, table: str, more: dict[str, int]) -> None:
    acme = await tenant(db, "acme")
    await record_events(db, [usage_event("r1", acme.id, key_id="key_1")])
    async with db.begin(SYSTEM) as connection:
        await connection.execute(text(change))
    events, differences = await compare(db, FRIDAY)
    assert events == 1
    first = differences[-1]
    assert (first.table, first.group["tenant_id"], first.group["base_model"]) == (table, acme.id, "base")
    assert more.items() <= first.more.items()


# The migration.


@pytest.fixture
async def before(database_url: str) -> AsyncIterator[Database]:
    """A database of the release before the sums, with a tenant and events of some days."""
    engine = create_engine(driver_url(database_url))
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()
    upgrade(database_url, "0017")
    db = Database(database_url)
    async with db.begin(SYSTEM) as connection:
        await connection.execute(
            text("INSERT INTO tenants (id, name, tier, max_queued, max_adapters) VALUES ('ten_acme', 'acme', 'standard', 1, 1)")
        )
    chance = random.Random(1)
    events = [
        replace(random_event(chance, ["ten_acme"]), request_id=f"old{number}", created_at=LATE + timedelta(hours=5 * number))
        for number in range(40)
    ]
    await record_events(db, events)
    yield db
    await db.close()


DAYS = [FRIDAY + timedelta(days=number) for number in range(10)]


async def test_the_migration_counts_what_is_there(before: Database, database_url: str) -> None:
    await asyncio.to_thread(upgrade, database_url)
    assert await agree(before, *DAYS) == 40
    assert sum(row.requests for row in await report(before, OPERATOR, [DAY], with_waste=True)) > 0
    await record_events(before, [usage_event("new", None, created_at=NIGHT)])
    assert await agree(before, *DAYS) == 41


async def test_the_running_release_writes_while_the_migration_counts(before: Database, database_url: str) -> None:
    """The writer of the running release continues, so events arrive before, while and after their day is counted. Each counts exactly
    once."""
    stop = asyncio.Event()
    chance = random.Random(2)

    async def writer() -> int:
        number = 0
        while not stop.is_set():
            events = [
                replace(
                    random_event(chance, ["ten_acme"]),
                    request_id=f"new{number + each}",
                    created_at=LATE + timedelta(hours=chance.randrange(200)),
                )
                for each in range(5)
            ]
            # It also replaces stand-ins that were there before.
            events.append(replace(random_event(chance, ["ten_acme"]), request_id=f"old{chance.randrange(40)}", created_at=LATE))
            await record_events(before, events)
            number += 5
        return number

    writing = asyncio.create_task(writer())
    await asyncio.to_thread(upgrade, database_url)
    stop.set()
    count = await writing
    assert count > 0
    assert await agree(before, *DAYS) == 40 + count


async def test_a_migration_that_was_stopped_half_way_continues(before: Database, database_url: str) -> None:
    # The third day cannot be counted at first: two events of one group have too many tokens.
    async with before.begin(SYSTEM) as connection:
        await connection.execute(
            text(
                "UPDATE usage_events SET prompt_tokens = 8000000000000000000, created_at = '2026-01-04', status = 'failed', code = NULL, "
                "key_id = NULL, adapter = NULL, work = 'interactive' WHERE request_id IN ('old20', 'old21')"
            )
        )
    with pytest.raises(DataError, match="bigint out of range"):
        await asyncio.to_thread(upgrade, database_url)
    async with before.begin(SYSTEM) as connection:
        filled = (await connection.execute(text("SELECT count(*) FROM usage_fill"))).scalar_one()
        assert filled == 2
        await connection.execute(text("DELETE FROM usage_events WHERE prompt_tokens > 1000"))
    await asyncio.to_thread(upgrade, database_url)
    assert await agree(before, *DAYS) == 38
    async with before.begin(SYSTEM) as connection:
        assert (await connection.execute(text("SELECT to_regclass('usage_fill')"))).scalar_one() is None


async def test_a_transaction_that_writes_events_is_waited_for(before: Database, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    more = [usage_event(f"day{number}", "ten_acme", created_at=NIGHT + timedelta(days=number)) for number in range(60)]
    await record_events(before, more)
    monkeypatch.setattr(migrate, "LOCK_TIMEOUT_S", 0.05)
    pauses: list[float] = []
    monkeypatch.setattr("lmaas.store.migrate.time.sleep", pauses.append)

    async def counted() -> bool:
        async with before.begin(SYSTEM) as connection:
            exists = (await connection.execute(text("SELECT to_regclass('usage_fill')"))).scalar_one() is not None
            return exists and bool((await connection.execute(text("SELECT count(*) FROM usage_fill"))).scalar_one())

    migrating = asyncio.create_task(asyncio.to_thread(upgrade, database_url))
    await until(counted, every_s=0.002)
    async with before.begin(SYSTEM) as connection:
        await insert_events(connection, [usage_event("held", "ten_acme")])
        await until(lambda: len(pauses) > 0 or migrating.done(), every_s=0.002)
        assert not migrating.done(), "it had ended before the transaction began"
    await migrating
    assert await agree(before, FRIDAY, *[SATURDAY + timedelta(days=number) for number in range(60)]) == 40 + 60 + 1
