"""Batches are deleted with their tenant, and some time after their end. Running batches stay."""

from sqlalchemy import text

from lmaas.store.batches import delete_old_batches, open_batches
from lmaas.store.models import BaseModel
from lmaas.store.rights import DatabaseRole
from lmaas.store.scopes import SYSTEM
from lmaas.store.tenants import delete_tenant
from tests.integration.batches.conftest import Account, Steps, jsonl, line
from tests.integration.gateway.stack import Stack
from tests.support.batches import batch_row, make_batch


async def left(stack: Stack) -> set[str]:
    async with stack.db.begin(SYSTEM) as connection:
        return set((await connection.execute(text("SELECT id FROM batches"))).scalars())


async def test_batches_of_a_deleted_tenant_go_with_their_lines(account: Account, steps: Steps, base: BaseModel, stack: Stack) -> None:
    await account.create(jsonl([line("a"), line("b")]))
    await steps.validate()
    running = await steps.lease(1)
    other = await stack.tenant()
    theirs = await make_batch(stack.db, other.id, [])
    await delete_tenant(stack.database(DatabaseRole.GATEWAY), account.tenant.id)
    assert await left(stack) == {theirs}
    # A runner that has not learned of the deletion writes nothing.
    await steps.end(running)
    async with stack.db.begin(SYSTEM) as connection:
        for table in ("batch_lines", "batch_pools", "usage_events"):
            query = text(f"SELECT count(*) FROM {table} WHERE tenant_id = :tenant")  # noqa: S608 (names of ours)
            assert (await connection.execute(query, {"tenant": account.tenant.id})).scalar_one() == 0


async def test_a_batch_that_outlives_its_tenant_ends_without_files(account: Account, steps: Steps, base: BaseModel, stack: Stack) -> None:
    """A batch whose tenant was deleted ends without files, as after a deletion that was interrupted before it reached the batches."""
    batch = await account.create(jsonl([line("a")]))
    await steps.validate()
    await steps.end(await steps.lease(1))
    async with stack.db.begin(SYSTEM) as connection:
        await connection.execute(text("UPDATE tenants SET deleted_at = now() WHERE id = :id"), {"id": account.tenant.id})
    await steps.finalize()
    row = await batch_row(stack.db, batch.id)
    assert (row.status, row.output_file_id) == ("completed", None)
    assert await account.kept() == ["lines.jsonl"]


async def test_batches_that_ended_long_ago_go(account: Account, stack: Stack) -> None:
    made = {
        (status, days): await make_batch(stack.db, account.tenant.id, [], status=status)
        for status in ("validating", "in_progress", "finalizing", "cancelling", "completed", "failed", "expired", "cancelled")
        for days in (89, 91)
    }
    async with stack.db.begin(SYSTEM) as connection:
        for (_, days), batch_id in made.items():
            older = text("UPDATE batches SET created_at = now() - make_interval(days => :days) WHERE id = :id")
            await connection.execute(older, {"days": days, "id": batch_id})
    controller = stack.database(DatabaseRole.CONTROLLER)
    assert await open_batches(controller) == {"validating": 2, "in_progress": 2, "finalizing": 2, "cancelling": 2}
    assert await delete_old_batches(controller) == 4
    assert await delete_old_batches(controller) == 0
    gone = {(status, 91) for status in ("completed", "failed", "expired", "cancelled")}
    assert await left(stack) == {batch_id for facts, batch_id in made.items() if facts not in gone}
