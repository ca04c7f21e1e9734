"""The deliveries of events to webhooks as job runners see them: leased, sent, and recorded.

A delivery is leased while it is sent, and what came of that is stored in one transaction. If a runner dies between the two, another one
sends the event again under the same id, so each event is sent at least once. Transactions lock a webhook before its deliveries.
"""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, case, delete, func, null, select, text, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from lmaas.audit import Action, Audit
from lmaas.states import DeliveryState
from lmaas.store.audit import record
from lmaas.store.database import Database
from lmaas.store.runners import hold
from lmaas.store.scopes import LEASES, SYSTEM
from lmaas.store.tables import webhook_deliveries as rows
from lmaas.store.tables import webhooks
from lmaas.store.webhooks import fail_waiting

#: The time for which a delivery that has ended can be seen and sent again, and the most of them for one webhook.
KEPT = timedelta(days=7)
MAX_ENDED = 1_000
#: Deliveries that one statement deletes.
ROWS_AT_ONCE = 1_000
#: The deliveries that all runners send at a time: to one webhook, and for one tenant. To a webhook that fails, one.
MAX_OF_WEBHOOK, MAX_OF_TENANT = 4, 8

_IS_DUE = text("SELECT FROM webhook_deliveries WHERE state = 'pending' AND runner_id IS NULL AND due_at <= now() LIMIT 1")
#: `turn` steps from one webhook for which something waits to the next, so the cost does not depend on how much waits for each.
_CLAIM = text(
    """
    WITH RECURSIVE turn AS (
        (
            SELECT tenant_id, webhook_id FROM webhook_deliveries WHERE state = 'pending'
            ORDER BY tenant_id, webhook_id LIMIT 1
        )
        UNION ALL
        SELECT following.tenant_id, following.webhook_id FROM turn, LATERAL (
            SELECT tenant_id, webhook_id FROM webhook_deliveries AS later
            WHERE state = 'pending' AND (later.tenant_id, later.webhook_id) > (turn.tenant_id, turn.webhook_id)
            ORDER BY tenant_id, webhook_id LIMIT 1
        ) AS following
    ), leased AS (
        SELECT tenant_id, webhook_id, count(*) AS number FROM webhook_deliveries WHERE runner_id IS NOT NULL GROUP BY tenant_id, webhook_id
    ), due AS (
        SELECT next.*, coalesce(own.number, 0) + next.place AS place_of_webhook,
            CASE WHEN webhook.failing_since IS NULL THEN :of_webhook ELSE 1 END AS most
        FROM turn
        JOIN webhooks AS webhook ON webhook.tenant_id = turn.tenant_id AND webhook.id = turn.webhook_id
        LEFT JOIN leased AS own ON own.tenant_id = turn.tenant_id AND own.webhook_id = turn.webhook_id,
        LATERAL (
            SELECT tenant_id, webhook_id, id, due_at, row_number() OVER (ORDER BY due_at) AS place FROM (
                SELECT tenant_id, webhook_id, id, due_at FROM webhook_deliveries AS waiting
                WHERE waiting.tenant_id = turn.tenant_id AND waiting.webhook_id = turn.webhook_id AND state = 'pending'
                    AND runner_id IS NULL AND due_at <= now()
                ORDER BY due_at LIMIT :of_webhook
            ) AS first
        ) AS next
    ), ranked AS (
        SELECT due.*, row_number() OVER (PARTITION BY due.tenant_id ORDER BY place_of_webhook, due_at)
            + coalesce((SELECT sum(number) FROM leased WHERE leased.tenant_id = due.tenant_id), 0) AS place_of_tenant
        FROM due WHERE place_of_webhook <= most
    ), chosen AS (
        SELECT tenant_id, webhook_id, id FROM ranked WHERE place_of_tenant <= :of_tenant ORDER BY place_of_tenant, due_at LIMIT :most
    ), locked AS (
        SELECT tenant_id, webhook_id, id FROM webhook_deliveries
        WHERE (tenant_id, webhook_id, id) IN (SELECT tenant_id, webhook_id, id FROM chosen) AND state = 'pending' AND runner_id IS NULL
        FOR UPDATE SKIP LOCKED
    )
    UPDATE webhook_deliveries AS delivery SET runner_id = :runner, attempt = delivery.attempt + 1 FROM locked
    WHERE delivery.tenant_id = locked.tenant_id AND delivery.webhook_id = locked.webhook_id AND delivery.id = locked.id
    RETURNING delivery.tenant_id, delivery.webhook_id, delivery.id, delivery.attempt
    """
)


@dataclass(frozen=True, slots=True)
class DeliveryLease:
    """A runner's claim on a delivery. Every write names it."""

    tenant_id: str
    webhook_id: str
    event_id: str
    runner_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Message:
    """The message to send: the body, signed with these keys. `failures` are the attempts that failed before."""

    url: str
    keys: tuple[bytes, ...]
    type: str
    body: bytes
    failures: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of an attempt: success without an `error`. For a failure, `retry_in_s` is the time until the next attempt; None means no
    further one.

    `is_gone` is true if the target wants no more events.
    """

    duration_ms: int
    status_code: int | None = None
    error: str | None = None
    retry_in_s: float | None = None
    is_gone: bool = False


async def claim(db: Database, runner_id: str, most: int) -> list[DeliveryLease]:
    """Lease at most `most` deliveries that are due. Tenants and their webhooks take turns. Raises LeaseLost if the runner was declared
    lost."""
    async with db.begin(LEASES) as connection:
        await hold(connection, runner_id)
        if (await connection.execute(_IS_DUE)).first() is None:
            return []
        values = {"runner": runner_id, "most": most, "of_webhook": MAX_OF_WEBHOOK, "of_tenant": MAX_OF_TENANT}
        found = (await connection.execute(_CLAIM, values)).all()
    return [DeliveryLease(row.tenant_id, row.webhook_id, row.id, runner_id, row.attempt) for row in found]


async def give_back_others(db: Database, runner_id: str, kept: Collection[DeliveryLease]) -> None:
    """Give back what a runner has leased, except for `kept`: it was leased although Postgres did not reply."""
    held = [(lease.tenant_id, lease.webhook_id, lease.event_id) for lease in kept]
    others = rows.c.runner_id == runner_id
    if held:
        others &= tuple_(rows.c.tenant_id, rows.c.webhook_id, rows.c.id).not_in(held)
    async with db.begin(LEASES) as connection:
        await hold(connection, runner_id)
        await connection.execute(update(rows).where(others).values(runner_id=None))


def _held(lease: DeliveryLease) -> tuple[ColumnElement[bool], ...]:
    return (
        rows.c.tenant_id == lease.tenant_id,
        rows.c.webhook_id == lease.webhook_id,
        rows.c.id == lease.event_id,
        rows.c.runner_id == lease.runner_id,
        rows.c.attempt == lease.attempt,
    )


def _webhook(lease: DeliveryLease) -> tuple[ColumnElement[bool], ...]:
    return webhooks.c.tenant_id == lease.tenant_id, webhooks.c.id == lease.webhook_id


async def begin(db: Database, lease: DeliveryLease) -> Message | None:
    """Return what is to be sent. None if the lease is lost, or the webhook was deleted or switched off: then the delivery has ended."""
    previous = case((webhooks.c.previous_until > func.now(), webhooks.c.previous_secret))
    query = select(
        *(webhooks.c.url, webhooks.c.secret, previous.label("previous"), webhooks.c.disabled_at, rows.c.type, rows.c.body, rows.c.failures)
    ).join_from(rows, webhooks, and_(rows.c.tenant_id == webhooks.c.tenant_id, rows.c.webhook_id == webhooks.c.id))
    async with db.begin(lease.tenant_id) as connection:
        row = (await connection.execute(query.where(*_held(lease)))).one_or_none()
        if row is None:
            return None
        if row.disabled_at is not None:
            await connection.execute(update(rows).where(*_held(lease)).values(runner_id=None))
            await fail_waiting(connection, lease.tenant_id, lease.webhook_id)
            return None
    keys = (row.secret,) if row.previous is None else (row.secret, row.previous)
    return Message(row.url, keys, row.type, row.body, row.failures)


async def finish(db: Database, lease: DeliveryLease, outcome: Outcome, off_after: timedelta) -> bool:
    """Record what came of an attempt, and give up its lease. Returns whether that switched the webhook off.

    After a success, what waits for a webhook that failed before is due at once. A webhook that has failed for `off_after`, or whose target
    is gone, is switched off. Nothing is recorded if the lease is lost.
    """
    failed = outcome.error is not None
    async with db.begin(lease.tenant_id) as connection:
        webhook = (
            await connection.execute(
                select(
                    *(webhooks.c.failing_since, webhooks.c.disabled_at),
                    (webhooks.c.failing_since <= func.now() - off_after).label("for_too_long"),
                )
                .where(*_webhook(lease))
                .with_for_update(key_share=True)
            )
        ).one_or_none()
        if webhook is None or not await _record(connection, lease, outcome):
            return False
        if not failed:
            if webhook.failing_since is not None:
                await connection.execute(update(webhooks).where(*_webhook(lease)).values(failing_since=null()))
                waiting = (
                    rows.c.tenant_id == lease.tenant_id,
                    rows.c.webhook_id == lease.webhook_id,
                    rows.c.state == DeliveryState.PENDING,
                )
                await connection.execute(update(rows).where(*waiting, rows.c.due_at > func.now()).values(due_at=func.now()))
            return False
        if webhook.failing_since is None:
            await connection.execute(update(webhooks).where(*_webhook(lease)).values(failing_since=func.now()))
        if webhook.disabled_at is not None or not (outcome.is_gone or webhook.for_too_long):
            return False
        await _switch_off(connection, lease, outcome, off_after)
        return True


async def _record(connection: AsyncConnection, lease: DeliveryLease, outcome: Outcome) -> bool:
    changes: dict[str, Any] = {"attempts": rows.c.attempts + 1, "attempted_at": func.now(), "runner_id": null()}
    changes |= {"status_code": outcome.status_code, "duration_ms": outcome.duration_ms, "error": outcome.error}
    if outcome.error is None:
        changes |= {"state": DeliveryState.DELIVERED.value, "ended_at": func.now()}
    elif outcome.retry_in_s is None:
        changes |= {"state": DeliveryState.FAILED.value, "ended_at": func.now(), "failures": rows.c.failures + 1}
    else:
        changes |= {"failures": rows.c.failures + 1, "due_at": func.now() + timedelta(seconds=outcome.retry_in_s)}
    return (await connection.execute(update(rows).where(*_held(lease)).values(changes).returning(rows.c.id))).first() is not None


async def _switch_off(connection: AsyncConnection, lease: DeliveryLease, outcome: Outcome, off_after: timedelta) -> None:
    if outcome.is_gone:
        reason = "The target answered 410 Gone: it wants no more events."
    else:
        days = off_after / timedelta(days=1)
        reason = f"Every attempt failed for {days:g} days. The last error: {outcome.error}"
    changes = {"disabled_at": func.now(), "disabled_reason": reason}
    await connection.execute(update(webhooks).where(*_webhook(lease)).values(changes))
    await fail_waiting(connection, lease.tenant_id, lease.webhook_id)
    await record(connection, Audit(Action.WEBHOOK_DISABLE), lease.tenant_id, lease.webhook_id)


async def trim(db: Database, tenant_id: str, webhook_id: str) -> None:
    """Delete the oldest deliveries of a webhook that have ended, except for MAX_ENDED."""
    own = (rows.c.tenant_id == tenant_id, rows.c.webhook_id == webhook_id)
    oldest = select(rows.c.created_at).where(*own).order_by(rows.c.created_at.desc()).offset(MAX_ENDED).limit(1)
    old = (rows.c.state != DeliveryState.PENDING, rows.c.created_at <= oldest.scalar_subquery())
    async with db.begin(tenant_id) as connection:
        await connection.execute(delete(rows).where(*own, *old))


async def overdue_s(db: Database) -> float:
    """Return for how long the oldest delivery has been due that no runner has leased, for a controller; 0 if there is none."""
    waiting = (rows.c.state == DeliveryState.PENDING, rows.c.runner_id.is_(None), rows.c.due_at <= func.now())
    query = select(func.coalesce(func.extract("epoch", func.now() - func.min(rows.c.due_at)), 0)).where(*waiting)
    async with db.begin(SYSTEM) as connection:
        return float((await connection.execute(query)).scalar_one())


async def delete_old_deliveries(db: Database) -> int:
    """Delete some deliveries of all tenants that ended KEPT ago, for a controller. Returns their number."""
    key = (rows.c.tenant_id, rows.c.webhook_id, rows.c.id)
    ended = (rows.c.ended_at < func.now() - KEPT, rows.c.state != DeliveryState.PENDING)
    some = select(*key).where(*ended).limit(ROWS_AT_ONCE)
    async with db.begin(SYSTEM) as connection:
        gone = await connection.execute(delete(rows).where(tuple_(*key).in_(some), *ended))
    return gone.rowcount
