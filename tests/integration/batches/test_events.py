"""Each end of a batch has one event, in the transaction of the end."""

import json
from typing import Any

import pytest
from sqlalchemy import select, text

from lmaas.store.runners import LeaseLost
from lmaas.store.scopes import SYSTEM
from lmaas.store.tables import webhook_deliveries
from lmaas.store.webhooks import Secret, create_webhook
from tests.integration.batches.conftest import Account, Steps, jsonl, line
from tests.integration.gateway.stack import Stack


async def subscribe(account: Account) -> str:
    secret = Secret(b"key", "")
    return (await create_webhook(account.stack.db, account.tenant.id, "", "https://example.com/", None, secret, most_of=lambda _: 1)).id


async def events(stack: Stack, webhook_id: str) -> list[tuple[str, Any]]:
    query = select(webhook_deliveries.c.body).where(webhook_deliveries.c.webhook_id == webhook_id).order_by(webhook_deliveries.c.created_at)
    async with stack.db.begin(SYSTEM) as connection:
        found = [json.loads(body) for body in (await connection.execute(query)).scalars()]
    return [(event["type"], event["data"]) for event in found]


@pytest.mark.usefixtures("base")
async def test_every_end_has_its_event(account: Account, stack: Stack, steps: Steps) -> None:
    webhook_id = await subscribe(account)
    failed = await account.create(b"?\n")
    await steps.validate()
    cancelled = await account.create(jsonl([line("a")]))
    await account.client.batches.cancel(cancelled.id)
    await steps.finalize()
    completed = await account.create(jsonl([line("a")]))
    await steps.validate()
    await steps.end(await steps.lease(1))
    await steps.finalize()
    expired = await account.create(jsonl([line("a")]))
    await steps.validate()
    async with stack.db.begin(SYSTEM) as connection:
        await connection.execute(text("UPDATE batches SET expires_at = now() WHERE id = :id"), {"id": expired.id})
    await steps.finalize()
    expected = [("failed", failed), ("cancelled", cancelled), ("completed", completed), ("expired", expired)]
    assert await events(stack, webhook_id) == [(f"batch.{status}", {"id": batch.id}) for status, batch in expected]
    assert [(await account.show(batch)).status for _, batch in expected] == [status for status, _ in expected]


@pytest.mark.usefixtures("base")
async def test_an_end_that_is_not_stored_has_no_event(account: Account, stack: Stack, steps: Steps) -> None:
    webhook_id = await subscribe(account)
    await account.create(b"?\n")
    lease = await steps.claim()
    async with stack.db.begin(SYSTEM) as connection:
        await connection.execute(text("UPDATE batches SET attempt = attempt + 1"))
    with pytest.raises(LeaseLost):
        await steps.work.fail(lease, "internal_error", "It failed.")
    assert await events(stack, webhook_id) == []
