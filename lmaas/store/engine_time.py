"""Engine time: the time of each engine by phase, and the work that ran on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from sqlalchemy import ColumnElement, Select, Table, func, select
from sqlalchemy.dialects.postgresql import insert

from lmaas.states import EnginePhase, WorkClass
from lmaas.store.database import Database
from lmaas.store.scopes import OPERATOR, SYSTEM
from lmaas.store.tables import base_models, engine_time, tenants, usage_days, work_days

MS_PER_HOUR = 3_600_000


@dataclass(frozen=True, slots=True)
class EngineTime:
    """Milliseconds of one engine in one phase on one day (UTC), and the price of its hour then, in micro-dollars."""

    replica_id: str
    base_model: str
    day: date
    phase: EnginePhase
    price: int
    ms: int


@dataclass(frozen=True, slots=True)
class Consumer:
    """The owner of a use: a tenant, with one of its adapters (by name, for all versions) or with a base model (`adapter` is None), and the
    class of its work.

    With `tenant_id` None, the use belongs to no tenant, and `work` is None.
    """

    tenant_id: str | None
    tenant: str | None
    base_model: str
    adapter: str | None
    work: WorkClass | None = WorkClass.INTERACTIVE


@dataclass(frozen=True, slots=True)
class Work:
    """The work of a consumer's requests on one replica, by the day (UTC) on which they started to run there. Attempts that were wasted are
    part of it."""

    replica_id: str
    day: date
    consumer: Consumer
    run_ms: int
    load_ms: int


@dataclass(frozen=True, slots=True)
class Charge:
    """The charge of a consumer for the requests that arrived on one day (UTC), in picodollars. `unpriced` is the number of requests that
    used tokens and cost nothing, because no price was set."""

    day: date
    consumer: Consumer
    picousd: int
    unpriced: int = 0


async def record_engine_time(db: Database, replica_id: str, base_model_id: str, spans: Mapping[tuple[date, EnginePhase, int], int]) -> None:
    """Write milliseconds by day, phase and price. Each value is the total so far, so writing the same or an older value again changes
    nothing."""
    if not spans:
        return
    values = [
        {"replica_id": replica_id, "base_model_id": base_model_id, "day": day, "phase": phase, "price": price, "ms": ms}
        for (day, phase, price), ms in spans.items()
    ]
    query = insert(engine_time).values(values)
    query = query.on_conflict_do_update(
        index_elements=["replica_id", "day", "phase", "price"], set_={"ms": func.greatest(engine_time.c.ms, query.excluded.ms)}
    )
    async with db.begin(SYSTEM) as connection:
        await connection.execute(query)


async def engine_price(db: Database, base_model_id: str) -> int:
    """Return the current price of an hour of the base model's engines, in micro-dollars."""
    async with db.begin(SYSTEM) as connection:
        return int((await connection.execute(select(base_models.c.engine_price).where(base_models.c.id == base_model_id))).scalar_one())


async def list_engine_time(db: Database, *, since: date | None = None, until: date | None = None) -> list[EngineTime]:
    """Return every engine's time on these days, both inclusive."""
    columns = engine_time.c
    query = select(columns.replica_id, base_models.c.name, columns.day, columns.phase, columns.price, columns.ms)
    query = _within(query.join_from(engine_time, base_models), columns.day, since, until)
    async with db.begin(OPERATOR) as connection:
        rows = (await connection.execute(query)).all()
    return [EngineTime(row[0], row[1], row[2], EnginePhase(row[3]), row[4], row[5]) for row in rows]


@dataclass(frozen=True, slots=True)
class PoolTime:
    """The total time of a pool in one phase, and its cost."""

    base_model: str
    phase: EnginePhase
    ms: int
    cost_microusd: float


async def pool_times(db: Database) -> list[PoolTime]:
    """Return the engine time of all days by base model and phase."""
    columns = engine_time.c
    cost = func.sum(columns.ms * columns.price) / MS_PER_HOUR
    query = select(base_models.c.name, columns.phase, func.sum(columns.ms), cost).join_from(engine_time, base_models)
    async with db.begin(SYSTEM) as connection:
        rows = (await connection.execute(query.group_by(base_models.c.name, columns.phase))).all()
    return [PoolTime(row[0], EnginePhase(row[1]), int(row[2]), float(row[3])) for row in rows]


async def list_work(db: Database, *, since: date | None = None, until: date | None = None) -> list[Work]:
    """Return the work of all tenants' requests on the engines that existed on these days, including their work on other days."""
    columns = work_days.c
    there = _within(select(engine_time.c.replica_id), engine_time.c.day, since, until)
    consumer = _consumer(work_days)
    run_ms, load_ms = func.sum(columns.run_ms), func.sum(columns.load_ms)
    query = (
        select(columns.replica_id, columns.day, *consumer, run_ms, load_ms)
        .join_from(work_days, tenants, columns.tenant_id == tenants.c.id)
        .where(columns.replica_id.in_(there))
        .group_by(columns.replica_id, columns.day, *consumer)
        # Of attempts that were all replaced, zeros are left.
        .having((run_ms != 0) | (load_ms != 0))
    )
    async with db.begin(OPERATOR) as connection:
        rows = (await connection.execute(query)).all()
    return [Work(row[0], row[1], _read_consumer(row[2:7]), int(row[7]), int(row[8])) for row in rows]


async def list_charges(db: Database, *, since: date | None = None, until: date | None = None) -> list[Charge]:
    """Return the charges of all tenants for the requests of these days, both inclusive."""
    columns = usage_days.c
    consumer = _consumer(usage_days)
    charge, unpriced = func.sum(columns.charge_picousd), func.sum(columns.unpriced)
    query = select(columns.day, *consumer, charge, unpriced).join_from(usage_days, tenants, columns.tenant_id == tenants.c.id)
    query = _within(query, columns.day, since, until).group_by(columns.day, *consumer).having((charge != 0) | (unpriced != 0))
    async with db.begin(OPERATOR) as connection:
        rows = (await connection.execute(query)).all()
    return [Charge(row[0], _read_consumer(row[1:6]), int(row[6]), int(row[7])) for row in rows]


def _consumer(table: Table) -> list[ColumnElement[Any]]:
    """Return the fields of a Consumer."""
    return [tenants.c.id, tenants.c.name, table.c.base_model, table.c.adapter, table.c.work]


def _read_consumer(values: Sequence[Any]) -> Consumer:
    return Consumer(values[0], values[1], values[2], values[3], WorkClass(values[4]))


def _within(query: Select[Any], day: ColumnElement[Any], since: date | None, until: date | None) -> Select[Any]:
    if since is not None:
        query = query.where(day >= since)
    if until is not None:
        query = query.where(day <= until)
    return query
