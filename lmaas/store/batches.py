"""Batches of tenants: their creation, their states, and what runners find out about them. Their lines are in `batch_lines`."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, delete, func, insert, select, text, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from lmaas.audit import Audit
from lmaas.errors import Conflict, NotFound, OverLimit
from lmaas.states import OPEN_BATCHES, BatchStatus, Dialect, EventType, batch_sources
from lmaas.store.audit import record
from lmaas.store.database import Database
from lmaas.store.events import add_event
from lmaas.store.paging import Part, rows_of
from lmaas.store.runners import BatchLease, LeaseLost, hold
from lmaas.store.scopes import OPERATOR, SYSTEM
from lmaas.store.tables import batch_pools, batches, tenants
from lmaas.types import BatchLimits

#: The time for which a batch that has ended can be retrieved, from its creation. Its result files may expire earlier.
KEPT = timedelta(days=90)
#: Batches that one statement deletes. They have no lines.
ROWS_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch without its lines.

    `metadata` is a JSON object, `errors` a JSON list of faults. `stop_code` is the reason why pending lines will not run. The counts of
    lines by their end leave out those that have not ended.
    """

    tenant_id: str
    id: str
    dialect: str
    endpoint: str
    key_id: str
    input_file_id: str | None
    completion_window: str
    metadata: bytes
    output_expires_after_s: int | None
    status: str
    errors: bytes | None
    total: int
    completed: int
    failed: int
    cancelled: int
    expired: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    stop_code: str | None
    stop_message: str | None
    output_file_id: str | None
    error_file_id: str | None
    created_at: datetime
    expires_at: datetime
    in_progress_at: datetime | None
    finalizing_at: datetime | None
    completed_at: datetime | None
    failed_at: datetime | None
    expired_at: datetime | None
    cancelling_at: datetime | None
    cancelled_at: datetime | None

    @property
    def ended_at(self) -> datetime | None:
        """The time of its end, None if it has not ended."""
        return self.completed_at or self.failed_at or self.expired_at or self.cancelled_at

    @property
    def without_response(self) -> int:
        """The lines that ended with an error, or without having run."""
        return self.failed + self.cancelled + self.expired


@dataclass(frozen=True, slots=True)
class NewBatch:
    """A batch to create. `metadata` is a JSON object."""

    id: str
    dialect: Dialect
    endpoint: str
    key_id: str
    input_file_id: str
    completion_window: str
    metadata: bytes
    output_expires_after_s: int
    expires_after: timedelta
    #: The number of its requests, if it is known already.
    total: int = 0


#: The events of the ends of batches.
_EVENTS = {
    BatchStatus.COMPLETED: EventType.BATCH_COMPLETED,
    BatchStatus.FAILED: EventType.BATCH_FAILED,
    BatchStatus.EXPIRED: EventType.BATCH_EXPIRED,
    BatchStatus.CANCELLED: EventType.BATCH_CANCELLED,
}
_COLUMNS = tuple(batches.c[name] for name in Batch.__slots__)
#: Of one tenant at a time, so that two creations cannot both find room for one.
_LOCK = text("SELECT pg_advisory_xact_lock(hashtextextended('batches of ' || :tenant, 0))")


def batch_not_found() -> NotFound:
    """Return the error for a batch that does not exist, or belongs to another tenant."""
    return NotFound("The batch does not exist.", code="batch_not_found", param="batch_id")


def _one(tenant_id: str, batch_id: str, dialect: Dialect) -> tuple[ColumnElement[bool], ...]:
    return batches.c.tenant_id == tenant_id, batches.c.id == batch_id, batches.c.dialect == dialect


async def _waiting(connection: AsyncConnection, tenant_id: str) -> int:
    """Return the number of a tenant's lines that wait, with those that are known of batches that are to be validated."""
    pending = select(func.coalesce(func.sum(batch_pools.c.pending), 0)).where(batch_pools.c.tenant_id == tenant_id)
    known = select(func.coalesce(func.sum(batches.c.total), 0)).where(
        batches.c.tenant_id == tenant_id, batches.c.status == BatchStatus.VALIDATING
    )
    return int((await connection.execute(select(pending.scalar_subquery() + known.scalar_subquery()))).scalar_one())


async def create_batch(
    connection: AsyncConnection, tenant_id: str, new: NewBatch, limits: BatchLimits, *, audit: Audit | None = None
) -> Batch:
    """Store a new batch in a transaction, to be validated. Raises NotFound for a deleted tenant, and OverLimit."""
    # The lock waits for a running deletion of the tenant. It comes first, because the code that adds the batch's input file in the same
    # transaction has locked the row.
    living = select(tenants.c.id).where(tenants.c.id == tenant_id, tenants.c.deleted_at.is_(None)).with_for_update(read=True)
    if (await connection.execute(living)).first() is None:
        raise NotFound("The tenant does not exist.", code="tenant_not_found")
    await connection.execute(_LOCK, {"tenant": tenant_id})
    await _check_limits(connection, tenant_id, new.total, limits)
    values = {
        "tenant_id": tenant_id,
        "id": new.id,
        "dialect": new.dialect,
        "endpoint": new.endpoint,
        "key_id": new.key_id,
        "input_file_id": new.input_file_id,
        "completion_window": new.completion_window,
        "metadata": new.metadata,
        "output_expires_after_s": new.output_expires_after_s,
        "status": BatchStatus.VALIDATING,
        "total": new.total,
        "expires_at": func.now() + new.expires_after,
    }
    row = (await connection.execute(insert(batches).values(values).returning(*_COLUMNS))).one()
    await record(connection, audit, tenant_id, new.id)
    return Batch(*row)


async def check_limits(db: Database, tenant_id: str, limits: BatchLimits) -> None:
    """Raise OverLimit if this tenant may not create a batch as things are now, before its requests are read."""
    async with db.begin(tenant_id) as connection:
        await _check_limits(connection, tenant_id, 0, limits)


async def _check_limits(connection: AsyncConnection, tenant_id: str, total: int, limits: BatchLimits) -> None:
    is_open = select(func.count()).where(batches.c.tenant_id == tenant_id, batches.c.status.in_(OPEN_BATCHES))
    if (count := (await connection.execute(is_open)).scalar_one()) >= limits.batches:
        raise OverLimit(
            f"This tenant has {count:,} batches that have not ended, and {limits.of} allows {limits.batches:,}. Wait until one has ended, "
            "or cancel one.",
            code="batch_limit_exceeded",
            retry_after_s=60,
        )
    if (refusal := _refusal(await _waiting(connection, tenant_id), max(total, 1), limits)) is not None:
        raise OverLimit(refusal, code="batch_limit_exceeded", retry_after_s=60)


def _refusal(waiting: int, more: int, limits: BatchLimits) -> str | None:
    """Return why so many lines may not be added, None if they may. One batch alone is never too large."""
    if not waiting or waiting + more <= limits.lines:
        return None
    return (
        f"This tenant has {waiting:,} requests that wait in batches, and {limits.of} allows {limits.lines:,}. Wait until some have run, or "
        "cancel a batch."
    )


async def get_batch(db: Database, tenant_id: str, batch_id: str, dialect: Dialect) -> Batch:
    """Return a batch that this tenant created with this API. Raises NotFound."""
    async with db.begin(tenant_id) as connection:
        return await _get(connection, tenant_id, batch_id, dialect)


async def _get(connection: AsyncConnection, tenant_id: str, batch_id: str, dialect: Dialect) -> Batch:
    row = (await connection.execute(select(*_COLUMNS).where(*_one(tenant_id, batch_id, dialect)))).one_or_none()
    if row is None:
        raise batch_not_found()
    return Batch(*row)


async def list_batches(db: Database, tenant_id: str, dialect: Dialect, part: Part, *, newest_first: bool = True) -> list[Batch]:
    """Return a part of the tenant's batches in the order of their creation. Raises InvalidRequest for a part after an unknown batch."""
    own = (batches.c.tenant_id == tenant_id, batches.c.dialect == dialect)
    async with db.begin(tenant_id) as connection:
        query = select(*_COLUMNS).where(*own)
        rows = await rows_of(connection, query, part, batches.c.created_at, batches.c.id, *own, newest_first=newest_first)
    return [Batch(*row) for row in rows]


async def cancel_batch(db: Database, tenant_id: str, batch_id: str, dialect: Dialect, *, audit: Audit | None = None) -> Batch:
    """Begin to cancel a batch, or return one that is being cancelled. Raises NotFound, and Conflict if all of its lines have ended."""
    changing = (
        update(batches)
        .where(*_one(tenant_id, batch_id, dialect), batches.c.status.in_(batch_sources(BatchStatus.CANCELLING)))
        .values(status=BatchStatus.CANCELLING, cancelling_at=func.now())
        .returning(*_COLUMNS)
    )
    async with db.begin(tenant_id) as connection:
        row = (await connection.execute(changing)).one_or_none()
        if row is not None:
            await record(connection, audit, tenant_id, batch_id)
            return Batch(*row)
        batch = await _get(connection, tenant_id, batch_id, dialect)
    if batch.status != BatchStatus.CANCELLING:
        raise Conflict(f"The batch is {batch.status.replace('_', ' ')}, so it cannot be cancelled any more.", code="batch_not_cancellable")
    return batch


async def delete_batch(db: Database, tenant_id: str, batch_id: str, dialect: Dialect, *, audit: Audit | None = None) -> Batch:
    """Delete a batch that has ended, and return it. Raises NotFound, and Conflict for one that has not ended."""
    ended = batches.c.status.not_in(OPEN_BATCHES)
    deleting = delete(batches).where(*_one(tenant_id, batch_id, dialect), ended).returning(*_COLUMNS)
    async with db.begin(tenant_id) as connection:
        row = (await connection.execute(deleting)).one_or_none()
        if row is not None:
            await record(connection, audit, tenant_id, batch_id)
            return Batch(*row)
        await _get(connection, tenant_id, batch_id, dialect)
    raise Conflict("The batch has not ended. Cancel it first, or wait for its end.", code="batch_not_ended")


async def delete_batches(db: Database, tenant_id: str) -> int:
    """Delete one batch of a deleted tenant with its lines, for an operator. Returns the number of those deleted: 0 if none is left."""
    one = select(batches.c.id).where(batches.c.tenant_id == tenant_id).limit(1).scalar_subquery()
    async with db.begin(OPERATOR) as connection:
        # Lines go with their batch, and may be many: a statement for each batch.
        gone = await connection.execute(delete(batches).where(batches.c.tenant_id == tenant_id, batches.c.id == one))
    return gone.rowcount


async def open_batches(db: Database) -> dict[str, int]:
    """Return the number of all tenants' batches in each state that is no end, for a controller."""
    query = select(batches.c.status, func.count()).where(batches.c.status.in_(OPEN_BATCHES)).group_by(batches.c.status)
    async with db.begin(SYSTEM) as connection:
        found = {status: int(count) for status, count in await connection.execute(query)}
    return {status.value: found.get(status, 0) for status in OPEN_BATCHES}


async def delete_old_batches(db: Database) -> int:
    """Delete some batches of all tenants that were created KEPT ago and have ended, for a controller. Returns their number."""
    old = (batches.c.created_at < func.now() - KEPT, batches.c.status.not_in(OPEN_BATCHES))
    some = select(batches.c.tenant_id, batches.c.id).where(*old).limit(ROWS_AT_ONCE)
    async with db.begin(SYSTEM) as connection:
        gone = await connection.execute(delete(batches).where(tuple_(batches.c.tenant_id, batches.c.id).in_(some)))
    return gone.rowcount


async def leased_batch(db: Database, lease: BatchLease, *statuses: BatchStatus) -> Batch:
    """Return the batch of a runner's lease, in one of these states. Raises LeaseLost."""
    async with db.begin(lease.tenant_id) as connection:
        query = select(*_COLUMNS).where(*_leased(lease), batches.c.status.in_(statuses))
        return _found((await connection.execute(query)).one_or_none(), lease)


async def move_leased(connection: AsyncConnection, lease: BatchLease, target: BatchStatus, **values: object) -> Batch:
    """Move the batch of a runner's lease to another state, with the time of that and these values. If it ends, add the event of its end.

    The runner cannot be declared lost until the end of the transaction. Raises LeaseLost if it was, if another runner has the batch, or if
    the batch has left the states from which `target` can be reached.
    """
    await hold(connection, lease.runner_id)
    changing = (
        update(batches)
        .where(*_leased(lease), batches.c.status.in_(batch_sources(target)))
        .values(status=target, **{f"{target.value}_at": func.now()}, **values)
        .returning(*_COLUMNS)
    )
    batch = _found((await connection.execute(changing)).one_or_none(), lease)
    if (type_ := _EVENTS.get(target)) is not None:
        await add_event(connection, lease.tenant_id, type_, {"id": batch.id})
    return batch


async def refusal_of_lines(connection: AsyncConnection, tenant_id: str, more: int, limits_of: Callable[[str], BatchLimits]) -> str | None:
    """Return why so many lines may not be added for this tenant, None if they may. No others are added until the end of the transaction.

    `limits_of` returns the limits of a tier.
    """
    await connection.execute(_LOCK, {"tenant": tenant_id})
    tier = (await connection.execute(select(tenants.c.tier).where(tenants.c.id == tenant_id))).scalar_one()
    return _refusal(await _waiting(connection, tenant_id), more, limits_of(tier))


def _leased(lease: BatchLease) -> tuple[ColumnElement[bool], ...]:
    own = (batches.c.tenant_id == lease.tenant_id, batches.c.id == lease.batch_id)
    return *own, batches.c.runner_id == lease.runner_id, batches.c.attempt == lease.attempt


def _found(row: Any, lease: BatchLease) -> Batch:
    if row is None:
        raise LeaseLost(lease.runner_id)
    return Batch(*row)
