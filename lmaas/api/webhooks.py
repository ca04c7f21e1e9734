"""Handlers for webhooks."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from msgspec import UNSET

from lmaas.admission.tiers import tier
from lmaas.api.context import Api, ApiCall
from lmaas.api.operation import page_of
from lmaas.api.shapes.common import Page, Paging
from lmaas.api.shapes.webhooks import (
    DeletedWebhook,
    Delivery,
    DeliveryQuery,
    NewWebhook,
    SecretRotation,
    Webhook,
    WebhookChange,
    WebhookWithSecret,
)
from lmaas.errors import InvalidRequest
from lmaas.states import DeliveryState
from lmaas.store import webhooks as rows
from lmaas.store.paging import Part
from lmaas.webhooks.signing import hint_of, new_key, secret_of
from lmaas.webhooks.targets import TargetRefused, Targets, networks


def _values(row: rows.Webhook) -> dict[str, Any]:
    same = ("id", "name", "url", "event_types", "disabled_at", "disabled_reason", "failing_since", "dropped_events", "created_at")
    return {name: getattr(row, name) for name in same} | {
        "enabled": row.disabled_at is None,
        "signing_secret_hint": row.secret_hint,
        "previous_secret_until": row.previous_until,
    }


def _shown(row: rows.Delivery) -> Delivery:
    return Delivery(
        id=row.id,
        type=row.type,
        state=row.state,  # type: ignore[arg-type]  # the column has one of these
        attempts=row.attempts,
        last_attempt_at=row.attempted_at,
        status_code=row.status_code,
        duration_ms=row.duration_ms,
        error=row.error,
        next_attempt_at=row.due_at if row.state == DeliveryState.PENDING else None,
        ended_at=row.ended_at,
        created_at=row.created_at,
    )


def _check_url(api: Api, url: str) -> None:
    """Raise InvalidRequest for a URL that can never be called. Its name is looked up when an event is sent."""
    try:
        Targets(networks(api.settings.webhook_private_targets)).parse(url)
    except TargetRefused as refused:
        raise InvalidRequest(str(refused), code="invalid_webhook_url", param="url") from None


def _key(path: Mapping[str, str]) -> str:
    return path["webhook"]


async def list_webhooks(api: Api, call: ApiCall[None, Paging]) -> Page[Webhook]:
    """Return a page of the webhooks, oldest first."""
    found = await rows.list_webhooks(api.db, call.tenant_id, Part(call.query.limit, call.query.after))
    return page_of([Webhook(**_values(row)) for row in found], [row.id for row in found], call.query.limit)


async def create_webhook(api: Api, call: ApiCall[NewWebhook, None]) -> WebhookWithSecret:
    """Create a webhook. The answer has its secret."""
    asked, key = call.body, new_key()
    _check_url(api, asked.url)
    secret = rows.Secret(key, hint_of(key))
    given = (asked.name, asked.url, asked.event_types, secret)
    row = await rows.create_webhook(api.db, call.tenant_id, *given, most_of=lambda name: tier(name).max_webhooks, audit=call.audit)
    return WebhookWithSecret(signing_secret=secret_of(key), **_values(row))


async def get_webhook(api: Api, call: ApiCall[None, None]) -> Webhook:
    """Return a webhook."""
    return Webhook(**_values(await rows.get_webhook(api.db, call.tenant_id, _key(call.path))))


async def change_webhook(api: Api, call: ApiCall[WebhookChange, None]) -> Webhook:
    """Change a webhook, or switch it on or off."""
    given = {name: value for name in WebhookChange.__struct_fields__ if (value := getattr(call.body, name)) is not UNSET}
    if not given:
        fields = ", ".join(WebhookChange.__struct_fields__)
        raise InvalidRequest(f"Give at least one of these: {fields}.", code="missing_parameter")
    if "url" in given:
        _check_url(api, given["url"])
    return Webhook(**_values(await rows.change_webhook(api.db, call.tenant_id, _key(call.path), given, audit=call.audit)))


async def delete_webhook(api: Api, call: ApiCall[None, None]) -> DeletedWebhook:
    """Delete a webhook with its deliveries."""
    await rows.delete_webhook(api.db, call.tenant_id, _key(call.path), audit=call.audit)
    return DeletedWebhook(id=_key(call.path), deleted=True)


async def rotate_secret(api: Api, call: ApiCall[SecretRotation, None]) -> WebhookWithSecret:
    """Replace the secret of a webhook. The answer has the new one."""
    key, overlap = new_key(), timedelta(seconds=call.body.overlap_s)
    secret = rows.Secret(key, hint_of(key))
    row = await rows.rotate_secret(api.db, call.tenant_id, _key(call.path), secret, overlap, audit=call.audit)
    return WebhookWithSecret(signing_secret=secret_of(key), **_values(row))


async def send_test(api: Api, call: ApiCall[None, None]) -> Delivery:
    """Have a test event sent to a webhook, whatever its event types."""
    return _shown(await rows.send_test(api.db, call.tenant_id, _key(call.path), audit=call.audit))


async def list_deliveries(api: Api, call: ApiCall[None, DeliveryQuery]) -> Page[Delivery]:
    """Return a page of the deliveries of a webhook, newest first."""
    asked = call.query
    found = await rows.list_deliveries(api.db, call.tenant_id, _key(call.path), Part(asked.limit, asked.after), asked.state)
    return page_of([_shown(row) for row in found], [row.id for row in found], asked.limit)


async def get_delivery(api: Api, call: ApiCall[None, None]) -> Delivery:
    """Return the delivery of an event to a webhook."""
    return _shown(await rows.get_delivery(api.db, call.tenant_id, _key(call.path), call.path["event"]))


async def redeliver(api: Api, call: ApiCall[None, None]) -> Delivery:
    """Have an event sent to a webhook again, under the same id."""
    return _shown(await rows.redeliver(api.db, call.tenant_id, _key(call.path), call.path["event"], audit=call.audit))
