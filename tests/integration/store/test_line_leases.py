"""Leases of batch lines and batches, and batches that stop early, with the rights of a job runner."""

import asyncio
from collections import Counter
from datetime import timedelta

import pytest
from sqlalchemy import text

from lmaas.store.batch_lines import (
    end_lines,
)
from lmaas.store.database import Database
from lmaas.store.line_leases import (
    LARGE_BYTES,
    SUSPECT_LOSSES,
    backlog,
    claim_batch,
    claim_lines,
    give_back_batch,
    give_back_lines,
    settle,
    stop_batch,
    stopped,
    unsettled,
)
from lmaas.store.runners import BatchLease, LeaseLost, end, free_lost, hold, register, seen
from lmaas.store.scopes import LEASES, SYSTEM
from lmaas.store.tenants import create_tenant
from tests.support.batches import batch_row, ended, line_rows, make_batch, pending, some_lines

POOL = "mod_1"
DAY = timedelta(days=1)


async def test_lines_are_leased_in_their_order_and_once(db: Database, jobs_db: Database, tenant_id: str) -> None:
    batch_id = await make_batch(db, tenant_id, [*some_lines(5, POOL), *some_lines(2, "mod_2")])
    one, two = await register(jobs_db), await register(jobs_db)
    [offer] = [each for each in await backlog(jobs_db) if each.pool_id == POOL]
    assert (offer.tenant_id, offer.batch_id, offer.pending, offer.endpoint) == (tenant_id, batch_id, 5, "/v1/chat/completions")
    assert 86_000 < offer.left_s <= 86_400
    first = await claim_lines(jobs_db, one, POOL, {(tenant_id, batch_id): 3})
    assert [(line.position, line.attempt, line.byte_offset, line.byte_length) for line in first] == [
        (0, 1, 0, 99),
        (1, 1, 100, 99),
        (2, 1, 200, 99),
    ]
    rest = await claim_lines(jobs_db, two, POOL, {(tenant_id, batch_id): 100})
    assert [line.position for line in rest] == [3, 4]
    assert await pending(db, batch_id) == {POOL: (0, 0), "mod_2": (2, 20)}
    assert await claim_lines(jobs_db, two, POOL, {(tenant_id, batch_id): 100}) == []


async def test_concurrent_leases_never_overlap(db: Database, jobs_db: Database, tenant_id: str) -> None:
    batches = [await make_batch(db, tenant_id, some_lines(60, POOL)) for _ in range(3)]
    runners = [await register(jobs_db) for _ in range(4)]

    async def take(runner_id: str) -> list[tuple[str, int]]:
        found: list[tuple[str, int]] = []
        while leases := await claim_lines(jobs_db, runner_id, POOL, {(tenant_id, batch_id): 7 for batch_id in batches}):
            found += [(lease.batch_id, lease.position) for lease in leases]
            await end_lines(jobs_db, runner_id, [ended(lease) for lease in leases[::2]])
            await give_back_lines(jobs_db, runner_id, leases[1::2][:1])
        return found

    taken = Counter([line for found in await asyncio.gather(*(take(runner) for runner in runners)) for line in found])
    assert set(taken) == {(batch_id, position) for batch_id in batches for position in range(60)}
    for batch_id in batches:
        states = Counter(row.state for row in await line_rows(db, batch_id))
        row = await batch_row(db, batch_id)
        assert row.completed == states["done"]
        assert await pending(db, batch_id) == {POOL: (0, 0)}


async def test_what_a_lost_runner_leased_is_free(db: Database, jobs_db: Database, tenant_id: str) -> None:
    batch_id = await make_batch(db, tenant_id, some_lines(4, POOL))
    validating = await make_batch(db, tenant_id, [], status="validating")
    lost, other = await register(jobs_db), await register(jobs_db)
    leases = await claim_lines(jobs_db, lost, POOL, {(tenant_id, batch_id): 3})
    claimed = await claim_batch(jobs_db, lost)
    assert claimed is not None
    assert claimed[0] == BatchLease(tenant_id, validating, lost, 1)
    await end_lines(jobs_db, lost, [ended(leases[0])])
    assert await free_lost(jobs_db) is None
    async with db.begin(SYSTEM) as connection:
        await connection.execute(text("UPDATE job_runners SET seen_at = now() - interval '20 s' WHERE id = :id"), {"id": lost})
    assert await free_lost(jobs_db) == lost
    assert await free_lost(jobs_db) is None
    assert await pending(db, batch_id) == {POOL: (3, 30)}
    # It can no longer write or lease.
    await end_lines(jobs_db, lost, [ended(lease) for lease in leases])
    assert (await batch_row(db, batch_id)).completed == 1
    with pytest.raises(LeaseLost):
        await claim_lines(jobs_db, lost, POOL, {(tenant_id, batch_id): 3})
    assert await claim_batch(jobs_db, lost) is None
    with pytest.raises(LeaseLost):
        await seen(jobs_db, lost)
    async with jobs_db.begin(LEASES) as connection:
        with pytest.raises(LeaseLost):
            await hold(connection, lost)
    again = await claim_lines(jobs_db, other, POOL, {(tenant_id, batch_id): 9})
    assert [(line.position, line.attempt) for line in again] == [(1, 2), (2, 2), (3, 1)]
    claimed = await claim_batch(jobs_db, other)
    assert claimed is not None
    assert claimed[0] == BatchLease(tenant_id, validating, other, 2)


async def test_few_lines_are_leased_with_which_runners_were_lost(db: Database, jobs_db: Database, tenant_id: str) -> None:
    """A runner that is lost for another reason must not make all of its leased lines fail."""
    batch_id = await make_batch(db, tenant_id, some_lines(40, POOL))

    async def losses(count: int) -> list[int]:
        """Lease lines with a runner that is lost, and return how many others were lost with each."""
        runner_id = await register(jobs_db)
        leases = await claim_lines(jobs_db, runner_id, POOL, {(tenant_id, batch_id): count}, suspects=4)
        async with db.begin(SYSTEM) as connection:
            await connection.execute(text("UPDATE job_runners SET seen_at = now() - interval '20 s'"))
        assert await free_lost(jobs_db) == runner_id
        return [lease.losses for lease in leases]

    for number in range(SUSPECT_LOSSES):
        assert await losses(30) == [number] * 30
    assert Counter(await losses(40)) == {SUSPECT_LOSSES: 4, 0: 10}
    # Chance decides which of them are leased, so that the same few do not seem to be the reason every time.
    for _ in range(8):
        assert sum(number >= SUSPECT_LOSSES for number in await losses(40)) == 4
    rows = await line_rows(db, batch_id)
    assert sum(row.attempt > SUSPECT_LOSSES for row in rows) > 4
    assert await pending(db, batch_id) == {POOL: (40, 400)}


async def test_large_lines_are_leased_by_bytes(db: Database, jobs_db: Database, tenant_id: str) -> None:
    sizes = [LARGE_BYTES + 1, 10, LARGE_BYTES + 1, 10, LARGE_BYTES + 1, LARGE_BYTES]
    rows = [line._replace(byte_length=size) for line, size in zip(some_lines(6, POOL), sizes, strict=True)]
    batch_id = await make_batch(db, tenant_id, rows)
    other = await make_batch(db, tenant_id, rows)
    runner_id = await register(jobs_db)
    wanted = {(tenant_id, batch_id): 9, (tenant_id, other): 1}

    async def claim(large_bytes: int) -> list[tuple[str, int]]:
        leases = await claim_lines(jobs_db, runner_id, POOL, wanted, large_bytes)
        return sorted(((lease.batch_id, lease.position) for lease in leases), key=lambda each: (each[0] != batch_id, each[1]))

    assert await claim(1) == [*((batch_id, position) for position in (0, 1, 3, 5)), (other, 0)]
    assert await pending(db, batch_id) == {POOL: (2, 20)}
    assert await claim(LARGE_BYTES + 2) == [(batch_id, 2), (batch_id, 4), (other, 1)]


async def test_a_runner_that_ends_frees_what_it_has(db: Database, jobs_db: Database, tenant_id: str) -> None:
    batch_id = await make_batch(db, tenant_id, some_lines(2, POOL))
    runner_id = await register(jobs_db)
    await claim_lines(jobs_db, runner_id, POOL, {(tenant_id, batch_id): 2})
    await end(jobs_db, runner_id)
    await end(jobs_db, runner_id)
    assert [line.state for line in await line_rows(db, batch_id)] == ["pending", "pending"]
    assert await pending(db, batch_id) == {POOL: (2, 20)}


async def test_a_cancelled_batch_is_settled_when_nothing_runs(db: Database, jobs_db: Database, tenant_id: str) -> None:
    batch_id = await make_batch(db, tenant_id, some_lines(10, POOL))
    runner_id = await register(jobs_db)
    one, two, three = await claim_lines(jobs_db, runner_id, POOL, {(tenant_id, batch_id): 3})
    assert await stopped(jobs_db, [(tenant_id, batch_id), (tenant_id, "batch_gone")]) == {(tenant_id, "batch_gone"): False}
    async with db.begin(SYSTEM) as connection:
        await connection.execute(text("UPDATE batches SET status = 'cancelling', cancelling_at = now()"))
    assert await stopped(jobs_db, [(tenant_id, batch_id)]) == {(tenant_id, batch_id): False}
    assert await unsettled(jobs_db) == [], "some of its lines run"
    assert await backlog(jobs_db) == []
    assert not await settle(jobs_db, tenant_id, batch_id)
    assert await claim_lines(jobs_db, runner_id, POOL, {(tenant_id, batch_id): 3}) == []
    # A line that ends before it is put back is finished.
    await end_lines(jobs_db, runner_id, [ended(one), ended(two, state="failed")])
    assert not await settle(jobs_db, tenant_id, batch_id)
    await give_back_lines(jobs_db, runner_id, [three])
    assert await claim_batch(jobs_db, runner_id) is None
    assert await unsettled(jobs_db) == [(tenant_id, batch_id)]
    assert await settle(jobs_db, tenant_id, batch_id)
    assert not await settle(jobs_db, tenant_id, batch_id)
    row = await batch_row(db, batch_id)
    assert (row.status, row.completed, row.failed, row.cancelled, row.expired) == ("cancelling", 1, 1, 8, 0)
    assert await pending(db, batch_id) == {POOL: (0, 0)}
    claimed = await claim_batch(jobs_db, runner_id)
    assert claimed is not None
    assert claimed == (BatchLease(tenant_id, batch_id, runner_id, 1), "cancelling")


async def test_a_batch_past_its_deadline_expires(db: Database, jobs_db: Database, tenant_id: str) -> None:
    batch_id = await make_batch(db, tenant_id, some_lines(3, POOL), left_s=0)
    runner_id = await register(jobs_db)
    assert await claim_lines(jobs_db, runner_id, POOL, {(tenant_id, batch_id): 3}) == []
    assert await unsettled(jobs_db) == [(tenant_id, batch_id)]
    assert await settle(jobs_db, tenant_id, batch_id)
    row = await batch_row(db, batch_id)
    assert (row.status, row.expired, row.stop_code) == ("finalizing", 3, "batch_expired")


async def test_a_stopped_batch_fails_what_has_not_begun(db: Database, jobs_db: Database, tenant_id: str) -> None:
    batch_id = await make_batch(db, tenant_id, some_lines(3, POOL))
    runner_id = await register(jobs_db)
    [lease] = await claim_lines(jobs_db, runner_id, POOL, {(tenant_id, batch_id): 1})
    await stop_batch(jobs_db, tenant_id, batch_id, "insufficient_quota", "no budget " * 1000)
    await stop_batch(jobs_db, tenant_id, batch_id, "another", "later")
    assert await stopped(jobs_db, [(tenant_id, batch_id)]) == {(tenant_id, batch_id): True}  # running lines may end
    assert await claim_lines(jobs_db, runner_id, POOL, {(tenant_id, batch_id): 1}) == []
    await end_lines(jobs_db, runner_id, [ended(lease)])
    assert await settle(jobs_db, tenant_id, batch_id)
    row = await batch_row(db, batch_id)
    assert (row.status, row.completed, row.failed, row.stop_code) == ("finalizing", 1, 2, "insufficient_quota")
    assert len(row.stop_message) == 1000


async def test_batches_are_leased_fairly_and_given_back(db: Database, jobs_db: Database, tenant_id: str) -> None:
    other = (await create_tenant(db, "other", "standard", 64, 10)).id
    first, second = [await make_batch(db, tenant_id, [], status="validating") for _ in range(2)]
    of_other = await make_batch(db, other, [], status="finalizing")
    runner_id = await register(jobs_db)
    leases = []
    for _ in range(3):
        claimed = await claim_batch(jobs_db, runner_id, [])
        assert claimed is not None
        leases.append(claimed[0])
    assert [lease.batch_id for lease in leases] == [first, of_other, second]
    await give_back_batch(jobs_db, leases[0])
    assert await claim_batch(jobs_db, runner_id, [(tenant_id, first)]) is None
    claimed = await claim_batch(jobs_db, runner_id)
    assert claimed is not None
    assert (claimed[0].batch_id, claimed[0].attempt) == (first, 2)
    await give_back_batch(jobs_db, leases[0])  # an old lease
    assert await claim_batch(jobs_db, runner_id) is None
