"""Webhooks of tenants, and the deliveries of events to them as tenants see and repeat them. Job runners send them: `deliveries.py`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, delete, func, insert, null, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from lmaas.audit import Audit
from lmaas.errors import Conflict, NotFound, OverLimit
from lmaas.states import DeliveryState, EventType
from lmaas.store.audit import record
from lmaas.store.database import Database, new_id
from lmaas.store.events import EVENT_PREFIX, MAX_PENDING, event_body
from lmaas.store.paging import Part, rows_of
from lmaas.store.tables import tenants, webhook_deliveries, webhooks

#: Of one tenant at a time, so that two creations cannot both find room for one.
_LOCK = text("SELECT pg_advisory_xact_lock(hashtextextended('webhooks of ' || :tenant, 0))")


@dataclass(frozen=True, slots=True)
class Webhook:
    """A webhook without its secret.

    `event_types` is None for events of all types. `failing_since` is when the first of the attempts failed that have failed in a row. A
    webhook that is switched off has a `disabled_at`.
    """

    id: str
    name: str
    url: str
    event_types: list[str] | None
    secret_hint: str
    previous_until: datetime | None
    failing_since: datetime | None
    disabled_at: datetime | None
    disabled_reason: str | None
    dropped_events: int
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Secret:
    """The key of a webhook's signatures, and the beginning of its text."""

    key: bytes
    hint: str


@dataclass(frozen=True, slots=True)
class Delivery:
    """The delivery of an event to a webhook. `id` is the event's. `status_code` and `error` are those of the last attempt."""

    id: str
    type: str
    state: str
    attempts: int
    attempted_at: datetime | None
    status_code: int | None
    duration_ms: int | None
    error: str | None
    due_at: datetime
    ended_at: datetime | None
    created_at: datetime


_COLUMNS = tuple(webhooks.c[name] for name in Webhook.__slots__)
_DELIVERY = tuple(webhook_deliveries.c[name] for name in Delivery.__slots__)


def _one(tenant_id: str, webhook_id: str) -> tuple[ColumnElement[bool], ...]:
    return webhooks.c.tenant_id == tenant_id, webhooks.c.id == webhook_id


def _of_webhook(tenant_id: str, webhook_id: str) -> tuple[ColumnElement[bool], ...]:
    return webhook_deliveries.c.tenant_id == tenant_id, webhook_deliveries.c.webhook_id == webhook_id


async def create_webhook(
    db: Database,
    tenant_id: str,
    name: str,
    url: str,
    event_types: Sequence[str] | None,
    secret: Secret,
    *,
    most_of: Callable[[str], int],
    audit: Audit | None = None,
) -> Webhook:
    """Add a webhook. `most_of` returns how many a tenant of a tier may have. Raises Conflict, and NotFound if the tenant was deleted."""
    values: dict[str, Any] = {
        "tenant_id": tenant_id,
        "id": new_id("wh"),
        "name": name,
        "url": url,
        "secret": secret.key,
        "secret_hint": secret.hint,
    }
    values["event_types"] = null() if event_types is None else list(event_types)
    async with db.begin(tenant_id) as connection:
        # A deletion of the tenant waits for this transaction and then deletes the webhook, or this one waits for the deletion.
        alive = select(tenants.c.tier).where(tenants.c.id == tenant_id, tenants.c.deleted_at.is_(None)).with_for_update(read=True)
        tier = (await connection.execute(alive)).scalar_one_or_none()
        if tier is None:
            raise NotFound("The tenant does not exist.", code="tenant_not_found")
        await connection.execute(_LOCK, {"tenant": tenant_id})
        counting = select(func.count()).select_from(webhooks).where(webhooks.c.tenant_id == tenant_id)
        if (count := (await connection.execute(counting)).scalar_one()) >= most_of(tier):
            message = f"This tenant has {count} webhooks, the maximum of its tier '{tier}'. Delete one first."
            raise Conflict(message, code="webhook_limit_exceeded")
        row = (await connection.execute(insert(webhooks).values(values).returning(*_COLUMNS))).one()
        await record(connection, audit, tenant_id, row.id)
    return Webhook(*row)


async def get_webhook(db: Database, tenant_id: str, webhook_id: str) -> Webhook:
    """Return a webhook. Raises NotFound."""
    async with db.begin(tenant_id) as connection:
        return await _get(connection, tenant_id, webhook_id)


async def _get(connection: AsyncConnection, tenant_id: str, webhook_id: str, *, lock: bool = False) -> Webhook:
    query = select(*_COLUMNS).where(*_one(tenant_id, webhook_id))
    # The key stays as it is, so events can be added meanwhile.
    row = (await connection.execute(query.with_for_update(key_share=True) if lock else query)).one_or_none()
    if row is None:
        raise NotFound("The webhook does not exist.", code="webhook_not_found")
    return Webhook(*row)


async def list_webhooks(db: Database, tenant_id: str, part: Part | None = None) -> list[Webhook]:
    """Return a tenant's webhooks, or a part of them, oldest first. Raises InvalidRequest for a part after an unknown one."""
    owned = webhooks.c.tenant_id == tenant_id
    async with db.begin(tenant_id) as connection:
        found = await rows_of(connection, select(*_COLUMNS).where(owned), part, webhooks.c.created_at, webhooks.c.id, owned)
    return [Webhook(*row) for row in found]


async def change_webhook(
    db: Database, tenant_id: str, webhook_id: str, changes: Mapping[str, Any], *, audit: Audit | None = None
) -> Webhook:
    """Change the `name`, `url`, `event_types` or `enabled` of a webhook, and return it. Raises NotFound.

    A new URL has not failed yet. One that is switched off by request leaves what waits for it failed, as one that keeps failing does.
    """
    values = {name: value for name, value in changes.items() if name != "enabled"}
    async with db.begin(tenant_id) as connection:
        before = await _get(connection, tenant_id, webhook_id, lock=True)
        values = {name: value for name, value in values.items() if getattr(before, name) != value}
        if "url" in values:
            values["failing_since"] = None
        enabled = changes.get("enabled")
        if enabled is True and before.disabled_at is not None:
            values |= {"disabled_at": None, "disabled_reason": None, "failing_since": None}
        elif enabled is False and before.disabled_at is None:
            values |= {"disabled_at": func.now(), "disabled_reason": "It was switched off by request."}
        if not values:
            return before
        values = {name: null() if value is None else value for name, value in values.items()}
        changing = update(webhooks).where(*_one(tenant_id, webhook_id)).values(values).returning(*_COLUMNS)
        row = (await connection.execute(changing)).one()
        if enabled is False:
            await fail_waiting(connection, tenant_id, webhook_id)
        await record(connection, audit, tenant_id, webhook_id)
    return Webhook(*row)


async def fail_waiting(connection: AsyncConnection, tenant_id: str, webhook_id: str) -> None:
    """End the deliveries that wait for a webhook which is switched off. Those that are being sent end with what comes of that."""
    waiting = (webhook_deliveries.c.state == DeliveryState.PENDING, webhook_deliveries.c.runner_id.is_(None))
    ended = {"state": DeliveryState.FAILED.value, "ended_at": func.now(), "error": "The webhook was switched off before it was sent."}
    await connection.execute(update(webhook_deliveries).where(*_of_webhook(tenant_id, webhook_id), *waiting).values(ended))


async def rotate_secret(
    db: Database, tenant_id: str, webhook_id: str, secret: Secret, overlap: timedelta, *, audit: Audit | None = None
) -> Webhook:
    """Replace the secret of a webhook. Events are signed with the earlier one too for this time. Raises NotFound."""
    # A trigger keeps the earlier secret.
    until = func.now() + overlap if overlap else null()
    new = {"secret": secret.key, "secret_hint": secret.hint, "previous_until": until}
    changing = update(webhooks).where(*_one(tenant_id, webhook_id)).values(new).returning(*_COLUMNS)
    async with db.begin(tenant_id) as connection:
        row = (await connection.execute(changing)).one_or_none()
        if row is None:
            raise NotFound("The webhook does not exist.", code="webhook_not_found")
        await record(connection, audit, tenant_id, webhook_id)
    return Webhook(*row)


async def delete_webhook(db: Database, tenant_id: str, webhook_id: str, *, audit: Audit | None = None) -> None:
    """Delete a webhook with its deliveries. Raises NotFound."""
    async with db.begin(tenant_id) as connection:
        if (await connection.execute(delete(webhooks).where(*_one(tenant_id, webhook_id)).returning(webhooks.c.id))).first() is None:
            raise NotFound("The webhook does not exist.", code="webhook_not_found")
        await record(connection, audit, tenant_id, webhook_id)


async def send_test(db: Database, tenant_id: str, webhook_id: str, *, audit: Audit | None = None) -> Delivery:
    """Add a test event for one webhook, and return its delivery. Raises NotFound, Conflict and OverLimit."""
    event_id = new_id(EVENT_PREFIX)
    body = event_body(event_id, EventType.WEBHOOK_TEST, {"id": webhook_id})
    values = {"tenant_id": tenant_id, "webhook_id": webhook_id, "id": event_id, "type": EventType.WEBHOOK_TEST.value, "body": body}
    async with db.begin(tenant_id) as connection:
        await _check_may_send(connection, tenant_id, webhook_id)
        row = (await connection.execute(insert(webhook_deliveries).values(values).returning(*_DELIVERY))).one()
        await record(connection, audit, tenant_id, webhook_id)
    return Delivery(*row)


async def redeliver(db: Database, tenant_id: str, webhook_id: str, event_id: str, *, audit: Audit | None = None) -> Delivery:
    """Have an event sent to a webhook again, now, under the same id. Raises NotFound, Conflict and OverLimit."""
    one = (*_of_webhook(tenant_id, webhook_id), webhook_deliveries.c.id == event_id)
    again = {"state": DeliveryState.PENDING.value, "failures": 0, "due_at": func.now(), "ended_at": null()}
    async with db.begin(tenant_id) as connection:
        await _check_may_send(connection, tenant_id, webhook_id)
        row = (await connection.execute(update(webhook_deliveries).where(*one).values(again).returning(*_DELIVERY))).one_or_none()
        if row is None:
            raise _delivery_not_found()
        await record(connection, audit, tenant_id, event_id)
    return Delivery(*row)


async def _check_may_send(connection: AsyncConnection, tenant_id: str, webhook_id: str) -> None:
    """Raise Conflict for a webhook that is switched off, and OverLimit for one with too many deliveries that wait."""
    webhook = await _get(connection, tenant_id, webhook_id, lock=True)
    if webhook.disabled_at is not None:
        raise Conflict("The webhook is switched off. Switch it on first: change `enabled` to true.", code="webhook_disabled")
    waiting = select(webhook_deliveries.c.id).where(
        *_of_webhook(tenant_id, webhook_id), webhook_deliveries.c.state == DeliveryState.PENDING
    )
    count = select(func.count()).select_from(waiting.limit(MAX_PENDING).subquery())
    if (await connection.execute(count)).scalar_one() >= MAX_PENDING:
        raise OverLimit(
            f"{MAX_PENDING:,} deliveries wait for this webhook, the maximum. Wait until some were sent.",
            code="webhook_limit_exceeded",
            retry_after_s=60,
        )


def _delivery_not_found() -> NotFound:
    return NotFound("The delivery does not exist.", code="delivery_not_found")


async def get_delivery(db: Database, tenant_id: str, webhook_id: str, event_id: str) -> Delivery:
    """Return the delivery of an event to a webhook. Raises NotFound."""
    query = select(*_DELIVERY).where(*_of_webhook(tenant_id, webhook_id), webhook_deliveries.c.id == event_id)
    async with db.begin(tenant_id) as connection:
        await _get(connection, tenant_id, webhook_id)
        row = (await connection.execute(query)).one_or_none()
    if row is None:
        raise _delivery_not_found()
    return Delivery(*row)


async def list_deliveries(db: Database, tenant_id: str, webhook_id: str, part: Part, state: str | None = None) -> list[Delivery]:
    """Return a part of the deliveries of a webhook, newest first, or only of those in a state.

    Raises NotFound, and InvalidRequest for a part after an unknown delivery.
    """
    owned = _of_webhook(tenant_id, webhook_id)
    query = select(*_DELIVERY).where(*owned)
    if state is not None:
        query = query.where(webhook_deliveries.c.state == state)
    order = (webhook_deliveries.c.created_at, webhook_deliveries.c.id)
    async with db.begin(tenant_id) as connection:
        await _get(connection, tenant_id, webhook_id)
        found = await rows_of(connection, query, part, *order, *owned, newest_first=True)
    return [Delivery(*row) for row in found]
