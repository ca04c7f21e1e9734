"""Engine time, and the work during it, on a real Postgres."""

from datetime import UTC, date, datetime

import pytest
from sqlalchemy import text

from lmaas.metering.cogs import report
from lmaas.states import EnginePhase, UsageStatus
from lmaas.store.database import Database
from lmaas.store.engine_time import (
    Charge,
    Consumer,
    EngineTime,
    Work,
    engine_price,
    list_charges,
    list_engine_time,
    list_work,
    record_engine_time,
)
from lmaas.store.models import BaseModel, change_base_model
from lmaas.store.replicas import add_replica
from lmaas.store.scopes import SYSTEM
from lmaas.store.tenants import Tenant, delete_tenant
from lmaas.store.usage import record_events
from tests.integration.store.build import base_model, tenant, usage_event

STARTING, LOADING, BUSY, BACKGROUND, IDLE = EnginePhase
FRIDAY, SATURDAY = date(2026, 1, 2), date(2026, 1, 3)


@pytest.fixture
async def base(db: Database) -> BaseModel:
    return await base_model(db)


@pytest.fixture
async def acme(db: Database) -> Tenant:
    return await tenant(db, "acme")


async def replica(db: Database, base: BaseModel, name: str) -> None:
    await add_replica(db, name, base.id)
    async with db.begin(SYSTEM) as connection:
        await connection.execute(text("UPDATE replicas SET created_at = '2026-01-02T01:00:00Z'"))


async def test_writing_again_or_something_older_changes_nothing(db: Database, base: BaseModel) -> None:
    await replica(db, base, "rep_1")
    await record_engine_time(db, "rep_1", base.id, {})
    first = {(FRIDAY, STARTING, 5): 2000, (FRIDAY, IDLE, 5): 10}
    later = {(FRIDAY, IDLE, 5): 500, (FRIDAY, BUSY, 5): 7, (FRIDAY, BUSY, 6): 8, (SATURDAY, BUSY, 6): 9}
    for spans in (first, later, later, first):
        await record_engine_time(db, "rep_1", base.id, spans)
    expected = {(span, ms) for span, ms in (first | later).items()}
    found = await list_engine_time(db)
    assert {((row.day, row.phase, row.price), row.ms) for row in found} == expected
    assert len(found) == len(expected)
    assert {(row.replica_id, row.base_model) for row in found} == {("rep_1", "base")}
    assert await list_engine_time(db, since=SATURDAY) == [EngineTime("rep_1", "base", SATURDAY, BUSY, 6, 9)]
    assert {row.day for row in await list_engine_time(db, until=FRIDAY)} == {FRIDAY}


async def test_an_operators_prices(db: Database, base: BaseModel) -> None:
    prices = ("prompt_price", "cached_price", "completion_price", "engine_price")
    assert [getattr(base, name) for name in prices] == [0, 0, 0, 0]
    changed = await change_base_model(db, "base", {name: number for number, name in enumerate(prices, 1)})
    assert [getattr(changed, name) for name in prices] == [1, 2, 3, 4]
    assert await base_model(db, engine_price=99) == changed  # `lmaas up` registers it again at every start
    assert await engine_price(db, base.id) == 4


async def test_what_ran_on_the_engines_of_these_days(db: Database, base: BaseModel, acme: Tenant) -> None:
    for name, day in (("rep_1", FRIDAY), ("rep_2", SATURDAY)):
        await replica(db, base, name)
        await record_engine_time(db, name, base.id, {(day, BUSY, 0): 1000})
    # Arrived on Friday, and began to run on Saturday.
    night = datetime(2026, 1, 2, 23, 59, 59, tzinfo=UTC)
    await record_events(
        db,
        [
            usage_event("r1", acme.id),
            usage_event("r2", acme.id, status=UsageStatus.FAILED),
            usage_event("r3", acme.id, created_at=night, queue_ms=700, load_ms=300),
            usage_event("r4", acme.id, created_at=night, queue_ms=700, load_ms=299),
            usage_event("r5", acme.id, model="bot", adapter=f"{acme.id}-aa"),
            usage_event("r6", acme.id, model="bot@2", adapter=f"{acme.id}-bb", adapter_version=2),
            usage_event("r7", acme.id, replica_id="rep_2"),
            usage_event("r8", acme.id, replica_id=None, status=UsageStatus.EXPIRED),
            usage_event("r9", acme.id, replica_id="rep_of_before"),
            usage_event("p1", None, status=UsageStatus.PROBE),
        ],
    )
    plain, bot = Consumer(acme.id, "acme", "base", None), Consumer(acme.id, "acme", "base", "bot")
    on_first = [Work("rep_1", FRIDAY, plain, 900, 303), Work("rep_1", SATURDAY, plain, 300, 300), Work("rep_1", FRIDAY, bot, 600, 4)]
    on_second = [Work("rep_2", FRIDAY, plain, 300, 2)]

    def in_order(rows: list[Work]) -> list[Work]:
        return sorted(rows, key=lambda row: (row.replica_id, row.consumer.adapter or "", row.day))

    assert in_order(await list_work(db)) == in_order(on_first + on_second)
    assert in_order(await list_work(db, until=FRIDAY)) == in_order(on_first)
    assert await list_work(db, since=SATURDAY) == on_second
    assert await list_work(db, since=date(2026, 1, 4)) == []


async def test_charges_are_those_of_the_day_of_arrival_also_of_a_deleted_tenant(db: Database, base: BaseModel, acme: Tenant) -> None:
    night = datetime(2026, 1, 2, 23, 59, 59, tzinfo=UTC)
    await record_events(
        db,
        [
            usage_event("r1", acme.id, charge_picousd=2**62),
            usage_event("r2", acme.id, charge_picousd=2**62, created_at=night, queue_ms=5000),
            usage_event("r3", acme.id, charge_picousd=1, created_at=datetime(2026, 1, 3, tzinfo=UTC), replica_id=None),
            usage_event("r4", acme.id),
        ],
    )
    await delete_tenant(db, acme.id)
    consumer = Consumer(acme.id, "acme", "base", None)
    friday, saturday = Charge(FRIDAY, consumer, 2**63, unpriced=1), Charge(SATURDAY, consumer, 1)
    assert sorted(await list_charges(db), key=lambda charge: charge.day) == [friday, saturday]
    assert await list_charges(db, until=FRIDAY) == [friday]
    assert await list_charges(db, since=SATURDAY) == [saturday]


async def test_the_report_reconciles_with_the_rows(db: Database, base: BaseModel, acme: Tenant) -> None:
    other = await tenant(db, "other")
    for name in ("rep_1", "rep_2"):
        await replica(db, base, name)
    await record_engine_time(db, "rep_1", base.id, {(FRIDAY, STARTING, 36_000): 20_001, (FRIDAY, BUSY, 36_000): 7, (FRIDAY, IDLE, 1): 5})
    await record_engine_time(db, "rep_2", base.id, {(FRIDAY, IDLE, 36_000): 1_000})
    await record_events(db, [usage_event(f"r{number}", owner.id) for number, owner in enumerate((acme, other, other))])
    found = report(await list_engine_time(db), await list_work(db), await list_charges(db))
    async with db.begin(SYSTEM) as connection:
        in_all = (await connection.execute(text("SELECT sum(ms) FROM engine_time"))).scalar_one()
    assert found.engine_ms == in_all == 21_013
    assert (found.allocated_ms, found.unallocated_ms) == (20_013, 1000)
    assert [(line.consumer and line.consumer.tenant, sum(line.ms.values())) for line in found.lines] == [
        ("acme", 6671),
        ("other", 13_342),
        (None, 1000),
    ]
