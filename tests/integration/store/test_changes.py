"""The number that shows gateways that their cached reads may be stale."""

from contextlib import AsyncExitStack

from sqlalchemy import delete, insert, update

from lmaas.store import tenants
from lmaas.store.changes import change_number
from lmaas.store.database import Database
from lmaas.store.models import change_base_model
from lmaas.store.scopes import SYSTEM
from lmaas.store.tables import adapter_versions, adapters, changes
from lmaas.store.tables import tenants as tenants_table
from lmaas.types import Role
from tests.integration.store.build import base_model, tenant, upload


async def test_every_change_of_what_gateways_know_is_noted(db: Database) -> None:
    seen = [await change_number(db)]

    async def grown() -> bool:
        seen.append(await change_number(db))
        return seen[-1] > seen[-2]

    acme = await tenant(db, "acme")
    assert await grown()
    assert not await grown()
    key = await tenants.create_key(db, acme.id, Role.INFERENCE, "k", "hash", "prefix")
    assert await grown()
    model = await base_model(db)
    assert await grown()
    await change_base_model(db, model.name, {"max_replicas": 3})
    assert await grown()
    await upload(db, acme.id, "bot", model)
    assert await grown()
    async with db.begin(SYSTEM) as connection:  # also by hand
        await connection.execute(update(adapters).values(live_version=None))
    assert await grown()
    async with db.begin(SYSTEM) as connection:
        await connection.execute(delete(adapter_versions))
    assert await grown()
    await tenants.update_tenant(db, acme.id, {"max_queued": 5})
    assert await grown()
    await tenants.revoke_key(db, acme.id, key.id)
    assert await grown()
    await tenants.delete_tenant(db, acme.id)
    assert await grown()


async def test_changes_do_not_wait_for_each_other_and_none_is_lost(db: Database) -> None:
    # Fewer rows to count in than transactions at once.
    async with db.begin(SYSTEM) as connection:
        await connection.execute(delete(changes).where(changes.c.slot > 2))
    before = await change_number(db)
    async with AsyncExitStack() as transactions:
        for number in range(4):
            connection = await transactions.enter_async_context(db.begin(SYSTEM))
            values = {"id": f"t{number}", "name": f"n{number}", "tier": "free", "max_queued": 1, "max_adapters": 1}
            await connection.execute(insert(tenants_table).values(values))
        assert await change_number(db) == before
        await tenant(db, "quick")
        assert await change_number(db) == before + 1
    assert await change_number(db) == before + 5
