"""Each end of a response in the background has one event, in the transaction of the end."""

import json
from typing import Any

import pytest
from openai import AsyncOpenAI
from sqlalchemy import select

from lmaas.store.scopes import SYSTEM
from lmaas.store.tables import webhook_deliveries
from lmaas.store.tenants import revoke_key
from lmaas.store.webhooks import Secret, create_webhook
from tests.integration.background.runners import runner
from tests.integration.background.service import Service, create, ended
from tests.integration.gateway.stack import Tenant
from tests.support.conditions import until


@pytest.fixture
async def webhook_id(service: Service, tenant: Tenant) -> str:
    secret = Secret(b"key", "")
    return (await create_webhook(service.stack.db, tenant.id, "", "https://example.com/", None, secret, most_of=lambda _: 1)).id


async def events(service: Service, webhook_id: str) -> dict[str, str]:
    """Return the types of the events by the ids of their responses."""
    query = select(webhook_deliveries.c.body).where(webhook_deliveries.c.webhook_id == webhook_id)
    async with service.stack.db.begin(SYSTEM) as connection:
        found: list[dict[str, Any]] = [json.loads(body) for body in (await connection.execute(query)).scalars()]
    types = {event["data"]["id"]: event["type"] for event in found}
    assert len(types) == len(found)
    return types


async def test_every_end_has_its_event(service: Service, tenant: Tenant, client: AsyncOpenAI, webhook_id: str) -> None:
    # Before a runner takes them: one is cancelled, and one is deleted, which needs no event.
    cancelled, deleted = await create(client), await create(client)
    assert (await client.responses.cancel(cancelled.id)).status == "cancelled"
    await client.responses.cancel(cancelled.id)
    await client.responses.delete(deleted.id)
    expected = {cancelled.id: "response.cancelled"}
    assert await events(service, webhook_id) == expected
    async with runner(service.stack):
        for words in ("Say hi.", "Say ho."):
            response = await ended(client, (await create(client, words)).id)
            expected[response.id] = f"response.{response.status}"
        assert await events(service, webhook_id) == expected
    failed = await create(client)
    await revoke_key(service.stack.db, tenant.id, tenant.key_id)
    async with runner(service.stack):

        async def all_ended() -> bool:
            return len(await events(service, webhook_id)) == len(expected) + 1

        await until(all_ended, timeout_s=20)
    assert await events(service, webhook_id) == expected | {failed.id: "response.failed"}
