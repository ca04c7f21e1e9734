"""Replicas: what the controller desires, and what their supervisors observe, in separate columns."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import func, insert, literal, select, true, update

from lmaas.audit import Audit
from lmaas.states import TERMINAL, Desired, Observed, sources
from lmaas.store.audit import record
from lmaas.store.database import Database, Writes
from lmaas.store.paging import Part, rows_of
from lmaas.store.scopes import SYSTEM, AnyScope
from lmaas.store.tables import base_models, replicas

#: Failed starts older than this, in seconds, are ignored.
FAILURE_WINDOW_S = 1800.0


@dataclass(frozen=True, slots=True)
class Replica:
    """One engine and its supervisor. An id is never used twice, so it is its own generation."""

    id: str
    base_model_id: str
    desired: str
    observed: str
    url: str | None
    reason: str | None
    created_at: datetime
    ready_at: datetime | None
    ended_at: datetime | None
    start: dict[str, Any] | None = None


_COLUMNS = [replicas.c[name] for name in Replica.__slots__]


async def add_replica(db: Writes, replica_id: str, base_model_id: str) -> bool:
    """Add a replica; return False if its base model has been deleted. Called before the start, so that every process has a row."""
    # Locked, as in the deletion of a base model: each waits for the other and sees its result.
    known = (
        select(literal(replica_id), base_models.c.id, literal(Desired.RUNNING.value), literal(Observed.STARTING.value))
        .where(base_models.c.id == base_model_id, base_models.c.deleted_at.is_(None))
        .with_for_update(key_share=True, read=True)
    )
    query = insert(replicas).from_select(["id", "base_model_id", "desired", "observed"], known).returning(replicas.c.id)
    async with db.begin(SYSTEM) as connection:
        return (await connection.execute(query)).first() is not None


async def list_replicas(db: Database, *, base_model_id: str | None = None, ended: bool = False, part: Part | None = None) -> list[Replica]:
    """Return the replicas, or a part of them, newest first; those that have ended only if `ended`.

    Raises InvalidRequest for a part after an unknown one.
    """
    query = select(*_COLUMNS)
    if base_model_id is not None:
        query = query.where(replicas.c.base_model_id == base_model_id)
    if not ended:
        query = query.where(replicas.c.observed.not_in(TERMINAL))
    async with db.begin(SYSTEM) as connection:
        rows = await rows_of(connection, query, part, replicas.c.created_at, replicas.c.id, newest_first=True)
    return [Replica(*row) for row in rows]


async def get_replica(db: Database, replica_id: str) -> Replica | None:
    """Return the replica, or None if it does not exist."""
    async with db.begin(SYSTEM) as connection:
        row = (await connection.execute(select(*_COLUMNS).where(replicas.c.id == replica_id))).one_or_none()
    return None if row is None else Replica(*row)


async def desire_stop(db: Writes, replica_id: str, scope: AnyScope = SYSTEM, *, audit: Audit | None = None) -> bool:
    """Request that the replica drains and stops. Return False if it has ended already. The scope is OPERATOR for an operator's request."""
    present = select(replicas.c.desired).where(replicas.c.id == replica_id, replicas.c.observed.not_in(TERMINAL)).with_for_update()
    async with db.begin(scope) as connection:
        desired = (await connection.execute(present)).scalar_one_or_none()
        if desired is not None and desired != Desired.STOPPED:
            await connection.execute(update(replicas).where(replicas.c.id == replica_id).values(desired=Desired.STOPPED))
            await record(connection, audit, None, replica_id)
    return desired is not None


async def observe(
    db: Writes,
    replica_id: str,
    state: Observed,
    *,
    url: str | None = None,
    reason: str | None = None,
    start: Mapping[str, int | str] | None = None,
) -> bool:
    """Move the replica to `state` if the transition table allows it. False means a lost race: the replica is already in a later state."""
    values: dict[str, object] = {"observed": state}
    if start is not None:
        values["start"] = dict(start)
    if url is not None:
        values["url"] = url
    if reason is not None:
        values["reason"] = reason[:2000]
    if state is Observed.READY:
        values["ready_at"] = func.now()
    if state in TERMINAL:
        values["ended_at"] = func.now()
    query = (
        update(replicas).where(replicas.c.id == replica_id, replicas.c.observed.in_(sources(state))).values(values).returning(replicas.c.id)
    )
    async with db.begin(SYSTEM) as connection:
        return (await connection.execute(query)).first() is not None


async def usual_start_ms(db: Database, base_model_id: str, by: str, last: int = 10) -> int | None:
    """Return the median duration of the pool's last starts in ms, without the time in which they waited for a zygote. Uses the starts made
    `by` the same means, or else all starts. None if there were none."""
    waited = func.coalesce(replicas.c.start["zygote_ms"].as_integer(), 0)
    total = replicas.c.start["total_ms"].as_integer() - waited
    for same in (replicas.c.start["by"].as_string() == by, true()):
        newest = (
            select(total.label("ms"))
            .where(replicas.c.base_model_id == base_model_id, replicas.c.start.is_not(None), same)
            .order_by(replicas.c.created_at.desc())
            .limit(last)
            .subquery()
        )
        async with db.begin(SYSTEM) as connection:
            median = (await connection.execute(select(func.percentile_cont(0.5).within_group(newest.c.ms)))).scalar()
        if median is not None:
            return round(float(median))
    return None


async def recent_failures(db: Database, base_model_id: str, within_s: float = FAILURE_WINDOW_S) -> tuple[int, float]:
    """Return the number of replicas of the pool that failed before they became ready, in the last `within_s` seconds and since the last one
    that became ready, and the time since the last failure."""
    ago = func.extract("epoch", func.now() - func.max(replicas.c.ended_at))
    since = select(func.max(replicas.c.ready_at)).where(replicas.c.base_model_id == base_model_id).scalar_subquery()
    query = select(func.count(), func.coalesce(ago, within_s)).where(
        replicas.c.base_model_id == base_model_id,
        replicas.c.observed.in_((Observed.FAILED, Observed.LOST)),
        replicas.c.ready_at.is_(None),
        replicas.c.ended_at > func.greatest(since, func.now() - func.make_interval(0, 0, 0, 0, 0, 0, within_s)),
    )
    async with db.begin(SYSTEM) as connection:
        count, seconds = (await connection.execute(query)).one()
    return int(count), float(seconds)


@dataclass(frozen=True, slots=True)
class PoolFailures:
    """The replicas of a base model that failed lately: while they started, and after they had become ready."""

    base_model: str
    starting: int
    running: int


async def failures_by_pool(db: Database, within_s: float = 600.0) -> list[PoolFailures]:
    """Return the replicas that failed within so many seconds, for each base model that has any."""
    ready = func.count(replicas.c.ready_at)
    query = (
        select(base_models.c.name, func.count() - ready, ready)
        .join_from(replicas, base_models)
        .where(
            replicas.c.observed.in_((Observed.FAILED, Observed.LOST)),
            replicas.c.ended_at > func.now() - func.make_interval(0, 0, 0, 0, 0, 0, within_s),
        )
        .group_by(base_models.c.name)
    )
    async with db.begin(SYSTEM) as connection:
        return [PoolFailures(row[0], int(row[1]), int(row[2])) for row in await connection.execute(query)]


@dataclass(frozen=True, slots=True)
class FailedStarts:
    """A pool's consecutive failed starts: their number, the reason of the last one, and the time since then."""

    count: int
    reason: str
    ago_s: float


async def failed_starts(db: Database, base_model_id: str, within_s: float = FAILURE_WINDOW_S) -> FailedStarts | None:
    """Return the starts that failed in the last `within_s` seconds and since the last success; None if there are none."""
    count, ago_s = await recent_failures(db, base_model_id, within_s)
    if count == 0:
        return None
    query = (
        select(replicas.c.reason)
        .where(
            replicas.c.base_model_id == base_model_id,
            replicas.c.observed.in_((Observed.FAILED, Observed.LOST)),
            replicas.c.ready_at.is_(None),
        )
        .order_by(replicas.c.ended_at.desc())
        .limit(1)
    )
    async with db.begin(SYSTEM) as connection:
        return FailedStarts(count, (await connection.execute(query)).scalar_one_or_none() or "", ago_s)


async def model_names(db: Database) -> dict[str, str]:
    """Return the names of base models by id."""
    async with db.begin(SYSTEM) as connection:
        return {row.id: row.name for row in await connection.execute(select(base_models.c.id, base_models.c.name))}
