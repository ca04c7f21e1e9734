"""Bounds of webhooks, of waiting deliveries and of stored events."""

import pytest

from lmaas.errors import Conflict, NotFound, OverLimit
from lmaas.store import deliveries
from lmaas.store import webhooks as rows
from lmaas.store.database import Database
from lmaas.store.tenants import delete_tenant
from tests.integration.webhooks.conftest import Events
from tests.support.conditions import until

SECRET = rows.Secret(b"key", "")


async def test_a_webhook_gets_only_so_many_events_that_wait(events: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmaas.store.events.MAX_PENDING", 3)
    monkeypatch.setattr("lmaas.store.webhooks.MAX_PENDING", 3)
    full, other = await events.webhook(), await events.webhook(event_types=["batch.failed"])
    await events.add(5)
    assert len(await events.deliveries(full)) == 3
    assert (await events.shown(full)).dropped_events == 2
    assert (await events.shown(other)).dropped_events == 0
    with pytest.raises(OverLimit, match="3 deliveries wait"):
        await rows.send_test(events.db, events.tenant_id, full)
    async with events.runner():

        async def all_delivered() -> bool:
            return {each.state for each in await events.deliveries(full)} == {"delivered"}

        await until(all_delivered)
    await events.add()
    assert len(await events.deliveries(full)) == 4


async def test_a_tenant_has_only_so_many_webhooks(events: Events) -> None:
    asked: list[str] = []

    def most_of(tier: str) -> int:
        asked.append(tier)
        return 2

    given = (events.tenant_id, "", "https://example.com/", None, SECRET)
    for _ in range(2):
        await rows.create_webhook(events.db, *given, most_of=most_of)
    with pytest.raises(Conflict, match="2 webhooks, the maximum of its tier 'standard'"):
        await rows.create_webhook(events.db, *given, most_of=most_of)
    assert asked == ["standard"] * 3
    await delete_tenant(events.db, events.tenant_id)
    assert await rows.list_webhooks(events.db, events.tenant_id) == []
    with pytest.raises(NotFound):
        await rows.create_webhook(events.db, *given, most_of=most_of)


async def test_deliveries_are_kept_for_a_time_and_in_a_number(
    events: Events, controller_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    webhook_id = await events.webhook()
    await events.add(6)
    await events.execute(
        "UPDATE webhook_deliveries SET state = 'delivered', ended_at = now() WHERE id <> (SELECT max(id) FROM webhook_deliveries)"
    )
    monkeypatch.setattr(deliveries, "MAX_ENDED", 4)
    await deliveries.trim(events.jobs, events.tenant_id, webhook_id)
    left = await events.deliveries(webhook_id)
    assert len(left) in (4, 5), "waiting deliveries stay, however old they are"
    assert [each.state for each in left].count("pending") == 1
    assert await deliveries.delete_old_deliveries(controller_db) == 0
    assert await deliveries.overdue_s(controller_db) < 3600
    await events.pass_time(8)
    assert 0 <= await deliveries.overdue_s(controller_db) - 8 * 86400 < 3600
    assert await deliveries.delete_old_deliveries(controller_db) == len(left) - 1
    assert [each.state for each in await events.deliveries(webhook_id)] == ["pending"]
