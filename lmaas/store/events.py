"""Events for webhooks. Each is added in the transaction of what it reports, so that both are stored or neither is."""

import json
import time
from collections.abc import Mapping
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from lmaas.states import EventType
from lmaas.store.database import new_id

#: The deliveries that may wait for one webhook. Events beyond are dropped, and counted in its row.
MAX_PENDING = 10_000
EVENT_PREFIX = "evt"

#: Adds the event to each webhook of the tenant that reports its type, in one exchange with Postgres. Most tenants have none.
_ADD = text(
    """
    WITH target AS (
        SELECT tenant_id, id, (
            SELECT count(*) FROM (
                SELECT FROM webhook_deliveries AS waiting
                WHERE waiting.tenant_id = webhook.tenant_id AND waiting.webhook_id = webhook.id AND waiting.state = 'pending'
                LIMIT :most
            ) AS those
        ) < :most AS has_room
        FROM webhooks AS webhook
        WHERE tenant_id = :tenant AND disabled_at IS NULL AND (event_types IS NULL OR :type = ANY(event_types))
    ), dropped AS (
        UPDATE webhooks AS webhook SET dropped_events = dropped_events + 1
        FROM target WHERE webhook.tenant_id = target.tenant_id AND webhook.id = target.id AND NOT target.has_room
    )
    INSERT INTO webhook_deliveries (tenant_id, webhook_id, id, type, body)
    SELECT tenant_id, id, :event, :type, :body FROM target WHERE has_room
    """
)


def event_body(event_id: str, type_: EventType, data: Mapping[str, Any]) -> bytes:
    """Return an event as it is sent, in OpenAI's shape."""
    event = {"id": event_id, "object": "event", "created_at": int(time.time()), "type": type_.value, "data": data}
    return json.dumps(event, separators=(",", ":")).encode()


async def add_event(connection: AsyncConnection, tenant_id: str, type_: EventType, data: Mapping[str, Any]) -> None:
    """Add an event of a tenant in the transaction of what it reports. `data` names the object, and has no text of the tenant.

    A webhook for which MAX_PENDING deliveries wait does not get it.
    """
    event_id = new_id(EVENT_PREFIX)
    values = {"tenant": tenant_id, "event": event_id, "type": type_.value, "most": MAX_PENDING}
    await connection.execute(_ADD, values | {"body": event_body(event_id, type_, data)})
