"""Batches that are cancelled, expire or lose something that they need, at every stage: each line still has exactly one result and no wrong
charge."""

import asyncio
import contextlib
from collections import Counter

import httpx
import pytest
from openai import ConflictError, NotFoundError, OpenAIError
from openai.types import Batch
from sqlalchemy import text

from lmaas.keys import hash_key, new_key, shown_prefix
from lmaas.states import UsageStatus
from lmaas.store.scopes import SYSTEM
from lmaas.store.tenants import create_key
from lmaas.types import Role
from tests.integration.faults.test_disk import small_disk
from tests.integration.gateway.stack import CHAT, Stack, Tenant
from tests.integration.hostile.conftest import ENDED, TOKENS, Batches, jsonl, line, many
from tests.support.conditions import until

#: The number of lines of a batch that is disturbed while it runs: 1.5 s at 100 ms for a line and 8 slots.
LINES = 120
#: The stages at which a batch can be disturbed.
STAGES = ("at once", "in progress", "nearly done")


async def _reached(batches: Batches, batch: Batch, stage: str) -> None:
    match stage:
        case "in progress":
            await batches.progressed(batch)
        case "nearly done":
            await batches.progressed(batch, LINES - 10)


async def _charged(batches: Batches, answered: int) -> None:
    """Assert that exactly the completed lines are charged, that everything else is waste without a charge, and that both together equal the
    tokens that the engine has generated in this test."""

    async def settled() -> bool:
        stats = await batches.stack.scheduler.stats(batches.base.id)
        return not any(replica["running"] for replica in stats["replicas"].values())

    await until(settled)
    ledger = await batches.stack.ledger(batches.base, batches.tenant)
    made = await batches.made()
    assert sum(event.completion_tokens for event in ledger) == made
    found = Counter(event.status for event in ledger)
    assert found[UsageStatus.COMPLETED] == answered, found
    assert set(found) <= {UsageStatus.COMPLETED, UsageStatus.WASTED}
    assert not any(event.charge_picousd for event in ledger if event.status is UsageStatus.WASTED)
    assert all(event.completion_tokens == TOKENS for event in ledger if event.status is UsageStatus.COMPLETED)


async def _admin(batches: Batches) -> httpx.AsyncClient:
    key = new_key()
    await create_key(batches.stack.db, batches.tenant.id, Role.TENANT_ADMIN, "admin", hash_key(key), shown_prefix(key))
    return httpx.AsyncClient(base_url=batches.stack.url, headers={"authorization": f"Bearer {key}"}, timeout=60)


@pytest.mark.parametrize("stage", STAGES)
async def test_cancelled_twice_at(batches: Batches, stage: str) -> None:
    batch = await batches.create(many(LINES))
    await _reached(batches, batch, stage)
    cancelled = await asyncio.gather(*(batches.client.batches.cancel(batch.id) for _ in range(2)), return_exceptions=True)
    assert all(isinstance(one, ConflictError | Batch) for one in cancelled)
    assert {one.status for one in cancelled if isinstance(one, Batch)} <= {"cancelling", "cancelled"}
    batch = await batches.end(batch)
    output, errors = await batches.results(batch)
    assert batch.status == "cancelled"
    assert batch.cancelled_at is not None
    assert set(errors.values()) <= {"batch_cancelled"}
    assert len(output) + len(errors) in ((0, LINES) if stage == "at once" else (LINES,))
    await _charged(batches, len(output))


async def test_a_batch_that_has_ended_cannot_be_cancelled(batches: Batches) -> None:
    batch = await batches.end(await batches.create(many(3)))
    try:
        after = await batches.client.batches.cancel(batch.id)
    except OpenAIError as error:
        assert getattr(error, "status_code", None) in (400, 409)  # noqa: PT017 (either may win the race)
        after = await batches.client.batches.retrieve(batch.id)
    assert (after.status, after.output_file_id, after.cancelled_at) == ("completed", batch.output_file_id, None)


@pytest.mark.parametrize("stage", STAGES)
async def test_expired_at(batches: Batches, stage: str) -> None:
    batch = await batches.create(many(LINES))
    await _reached(batches, batch, stage)
    async with batches.stack.db.begin(SYSTEM) as connection:
        await connection.execute(text("UPDATE batches SET expires_at = now() WHERE id = :id"), {"id": batch.id})
    batch = await batches.end(batch)
    output, errors = await batches.results(batch)
    assert batch.status == "expired" or not errors
    assert set(errors.values()) <= {"batch_expired"}
    assert len(output) + len(errors) in ((0, LINES) if stage == "at once" else (LINES,))
    await _charged(batches, len(output))


@pytest.mark.parametrize("stage", STAGES)
async def test_its_file_is_deleted(batches: Batches, stage: str) -> None:
    batch = await batches.create(many(LINES))
    await _reached(batches, batch, stage)
    with contextlib.suppress(ConflictError):  # a file that is in use may be kept
        await batches.client.files.delete(batch.input_file_id)
    batch = await batches.end(batch)
    output, errors = await batches.results(batch)
    assert batch.status in ("completed", "failed")
    assert batch.status == "completed" or (stage == "at once" and batch.errors is not None)
    assert len(output) + len(errors) == (LINES if batch.status == "completed" else 0)
    assert len(set(errors.values())) <= 1
    await _charged(batches, len(output))


async def test_its_key_is_revoked(batches: Batches, stack: Stack) -> None:
    admin = await _admin(batches)
    batch = await batches.create(many(LINES))
    await batches.progressed(batch)
    async with admin:
        assert (await admin.delete(f"/v1/keys/{batches.tenant.key_id}")).status_code in (200, 204)
        theirs = batches.of(str(admin.headers["authorization"]).removeprefix("Bearer "))
        batch = await theirs.end(batch)
        output, errors = await theirs.results(batch)
    assert batch.status == "completed"
    assert len(output) + len(errors) == LINES
    (code,) = set(errors.values())
    assert "key" in code
    await _charged(batches, len(output))


async def test_its_budget_is_spent(batches: Batches, stack: Stack) -> None:
    async with stack.db.begin(SYSTEM) as connection:
        await connection.execute(text("UPDATE tenants SET budget_per_month = 500 WHERE id = :id"), {"id": batches.tenant.id})
    batch = await batches.end(await batches.create(many(LINES)))
    output, errors = await batches.results(batch)
    assert batch.status == "completed"
    assert len(output) + len(errors) == LINES
    assert set(errors.values()) == {"insufficient_quota"}
    assert len(output) >= 1
    await _charged(batches, len(output))


async def test_its_adapter_gets_a_new_version(batches: Batches, stack: Stack) -> None:
    await stack.adapter(batches.tenant, "bot", batches.base)
    batch = await batches.create(many(LINES, model="bot"))
    await batches.progressed(batch)
    await stack.adapter(batches.tenant, "bot", batches.base)
    batch = await batches.end(batch)
    output, errors = await batches.results(batch)
    assert (batch.status, len(output), errors) == ("completed", LINES, {})
    ledger = await stack.ledger(batches.base, batches.tenant)
    assert {event.adapter_version for event in ledger} == {1, 2}


async def test_its_adapter_is_deleted(batches: Batches, stack: Stack) -> None:
    await stack.adapter(batches.tenant, "bot", batches.base)
    lines = [line(f"{number}", model="bot" if number % 2 else "base", words=f"Number {number}.") for number in range(LINES)]
    batch = await batches.create(jsonl(lines))
    await batches.progressed(batch)
    async with await _admin(batches) as admin:
        assert (await admin.delete("/v1/adapters/bot")).status_code in (200, 204)
    batch = await batches.end(batch)
    output, errors = await batches.results(batch)
    assert batch.status == "completed"
    assert len(output) + len(errors) == LINES
    assert set(errors.values()) <= {"model_not_found"}
    assert all(int(custom_id) % 2 for custom_id in errors)
    assert errors
    await _charged(batches, len(output))


async def test_its_tenant_is_deleted(batches: Batches, stack: Stack) -> None:
    batch = await batches.create(many(LINES))
    await batches.progressed(batch)
    key = new_key()
    await create_key(stack.db, None, Role.OPERATOR, "operator", hash_key(key), shown_prefix(key))
    async with httpx.AsyncClient(base_url=stack.url, headers={"authorization": f"Bearer {key}"}, timeout=60) as operator:
        assert (await operator.delete(f"/admin/v1/tenants/{batches.tenant.id}")).status_code in (200, 204)
    await _gone(stack, batches.tenant)
    other = await stack.tenant()
    others = batches.of(other.key)
    assert (await others.end(await others.create(many(10)))).status == "completed", "the runner continues"


async def _gone(stack: Stack, tenant: Tenant) -> None:
    """Wait until the tenant has no lines, batches or files any more."""

    async def gone() -> bool:
        async with stack.db.begin(SYSTEM) as connection:
            counts = [
                (await connection.execute(text(f"SELECT count(*) FROM {table} WHERE tenant_id = :id"), {"id": tenant.id})).scalar_one()  # noqa: S608
                for table in ("batches", "batch_lines", "batch_pools", "files")
            ]
        return not any(counts)

    await until(gone)


async def test_one_file_for_several_batches(batches: Batches) -> None:
    file = await batches.upload(many(30))
    created = await asyncio.gather(
        *(batches.client.batches.create(input_file_id=file, endpoint=CHAT, completion_window="24h") for _ in range(4))
    )
    ends = [await batches.end(batch) for batch in created]
    assert {batch.status for batch in ends} == {"completed"}
    assert len({batch.output_file_id for batch in ends}) == 4
    for batch in ends:
        assert len((await batches.results(batch))[0]) == 30
    # The bytes of all outputs differ by their ids, and deleting one leaves the others.
    await batches.client.files.delete(str(ends[0].output_file_id))
    assert len(await batches.lines(ends[1].output_file_id)) == 30


async def test_its_output_is_deleted_and_the_batch_remains(batches: Batches) -> None:
    batch = await batches.end(await batches.create(many(3)))
    await batches.client.files.delete(str(batch.output_file_id))
    assert (await batches.client.batches.retrieve(batch.id)).status == "completed"
    with pytest.raises(NotFoundError):
        await batches.client.files.content(str(batch.output_file_id))


async def test_the_disk_of_the_object_store_is_full_at_the_end(batches: Batches, stack: Stack) -> None:
    """The results wait in Postgres until there is room for the output file."""
    batch = await batches.create(many(100, metadata={"padding": "x" * 400}))
    await batches.progressed(batch)
    with small_disk(stack.settings.home / "objects" / "files" / batches.tenant.id, 4096) as enlarge:
        # The full disk hides the input file, too, so lines may fail because it is missing.
        async def waits() -> bool:
            return (await batches.client.batches.retrieve(batch.id)).status in ("finalizing", *ENDED)

        await until(waits)
        assert (await batches.client.batches.retrieve(batch.id)).status == "finalizing"
        enlarge()
        batch = await batches.end(batch)
        output, errors = await batches.results(batch)
        assert batch.status == "completed"
        assert len(output) + len(errors) == 100
    await _charged(batches, len(output))
