"""Events of budgets, from the ledger."""

import json
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select

from lmaas.control.budgets import BudgetEvents
from lmaas.keys import hash_key, new_key
from lmaas.states import UsageStatus
from lmaas.store.database import Database
from lmaas.store.scopes import SYSTEM
from lmaas.store.tables import webhook_deliveries
from lmaas.store.tenants import create_key, delete_tenant, update_tenant
from lmaas.store.usage import record_events
from lmaas.types import Limits, Role
from tests.integration.store.build import tenant, usage_event
from tests.integration.webhooks.conftest import Events


async def bodies(db: Database) -> list[dict[str, Any]]:
    async with db.begin(SYSTEM) as connection:
        found = await connection.execute(select(webhook_deliveries.c.body).order_by(webhook_deliveries.c.created_at))
        return [json.loads(row.body) for row in found]


async def test_each_part_of_a_budget_is_reported_once_a_month(events: Events, controller_db: Database) -> None:
    now = [datetime(2026, 11, 30, 12, tzinfo=UTC)]
    budgets = BudgetEvents(controller_db, clock=lambda: now[0])
    key = await create_key(
        events.db, events.tenant_id, Role.INFERENCE, "", hash_key(new_key()), "sk", Limits(tokens_per_month=30, budget_per_month=None)
    )
    await update_tenant(events.db, events.tenant_id, {"budget_per_month": 100})
    await events.webhook(event_types=["budget.threshold"])
    await events.webhook(event_types=["batch.failed"])
    unlimited = await tenant(events.db, "globex")

    async def use(request_id: str, owner: str = events.tenant_id, **changes: Any) -> None:
        facts: dict[str, Any] = {"key_id": key.id, "created_at": now[0], "charge_picousd": 50_000_000}
        await record_events(events.db, [usage_event(request_id, owner, **facts | changes)])

    assert await budgets.check() == 0
    await use("r0", unlimited.id, key_id=None)
    await use("r1", charge_picousd=49_999_999)
    await use("r2", status=UsageStatus.WASTED)
    # The 15 tokens of the first request are half of the key's budget.
    assert await budgets.check() == 1
    await use("r3", charge_picousd=1, key_id=None)
    assert await budgets.check() == 1
    assert await budgets.check() == 0
    [of_key, of_tenant] = [event["data"] for event in await bodies(events.db)]
    expected = {"id": key.id, "object": "key", "month": "2026-11", "limit": "tokens_per_month", "threshold_percent": 50}
    assert of_key == expected | {"used": 15, "allowed": 30}
    expected = {"id": events.tenant_id, "object": "tenant", "month": "2026-11", "limit": "budget_per_month", "threshold_percent": 50}
    assert of_tenant == expected | {"used": 50, "allowed": 100}
    # Two parts at once, and two controllers.
    await use("r4", key_id=None)
    assert await BudgetEvents(controller_db, clock=lambda: now[0]).check() == 2
    assert await budgets.check() == 0
    assert [event["data"]["threshold_percent"] for event in await bodies(events.db)] == [50, 50, 80, 100]
    # A raised budget is not reported anew in this month, and a new month begins anew.
    await update_tenant(events.db, events.tenant_id, {"budget_per_month": 150})
    assert await budgets.check() == 0
    now[0] = datetime(2026, 12, 1, 2, tzinfo=UTC)
    assert await budgets.check() == 0
    await use("r5", key_id=None, charge_picousd=75_000_000)
    assert await budgets.check() == 1
    assert (await bodies(events.db))[-1]["data"]["month"] == "2026-12"
    # A deleted tenant has neither webhooks nor events.
    await delete_tenant(events.db, events.tenant_id)
    await use("r6", key_id=None, charge_picousd=75_000_000)
    assert await budgets.check() == 0
    assert await bodies(events.db) == []
