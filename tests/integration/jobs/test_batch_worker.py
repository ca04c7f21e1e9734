"""A job runner validates and finalizes whole batches, and settles those that stop early."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
from sqlalchemy import text

from lmaas.errors import Unavailable
from lmaas.jobs import batches
from lmaas.jobs.batches import AT_ONCE, BatchWorker
from lmaas.jobs.metrics import JobMetrics
from lmaas.jobs.runner import Runner
from lmaas.store.database import Database
from lmaas.store.line_leases import claim_batch
from lmaas.store.runners import BatchLease, LeaseLost, free_lost, register
from lmaas.store.scopes import SYSTEM
from tests.support.batches import batch_row, make_batch, some_lines
from tests.support.conditions import until

Step = Callable[[BatchLease], Awaitable[None]]


class Steps:
    """Steps that record their calls. `do` is the action of each of them."""

    def __init__(self, db: Database, do: Step | None = None) -> None:
        self._db, self._do = db, do
        self.calls: list[tuple[str, str]] = []
        self.running = self.most = 0

    async def validate(self, lease: BatchLease) -> None:
        await self._step("validate", lease, "in_progress")

    async def finalize(self, lease: BatchLease) -> None:
        await self._step("finalize", lease, "completed")

    async def fail(self, lease: BatchLease, code: str, message: str) -> None:
        assert "Report its id" in message
        self.calls.append((code, lease.batch_id))
        await set_status(self._db, lease.batch_id, "failed")

    async def _step(self, name: str, lease: BatchLease, status: str) -> None:
        self.calls.append((name, lease.batch_id))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if self._do is not None:
                await self._do(lease)
        finally:
            self.running -= 1
        await set_status(self._db, lease.batch_id, status)


async def set_status(db: Database, batch_id: str, status: str) -> None:
    async with db.begin(SYSTEM) as connection:
        await connection.execute(text("UPDATE batches SET status = :status WHERE id = :id"), {"id": batch_id, "status": status})


async def is_free(db: Database, batch_id: str, status: str) -> bool:
    row = await batch_row(db, batch_id)
    return bool(row.status == status and row.runner_id is None)


@asynccontextmanager
async def working(jobs_db: Database, steps: Steps) -> AsyncIterator[asyncio.Event]:
    """Run a runner until the end of the block, or until the event is set."""
    metrics, stopping = JobMetrics(), asyncio.Event()
    task = asyncio.create_task(Runner(jobs_db, [BatchWorker(jobs_db, steps, metrics)], metrics.lost).run(stopping))
    yield stopping
    stopping.set()
    async with asyncio.timeout(10):
        await task


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the pauses."""
    monkeypatch.setattr(batches, "LOOK_S", 0.02)
    monkeypatch.setattr(batches, "PAUSE_S", 0.01)


async def test_each_batch_has_its_step(db: Database, jobs_db: Database, tenant_id: str) -> None:
    new = await make_batch(db, tenant_id, [], status="validating")
    done = await make_batch(db, tenant_id, [], status="finalizing")
    runs = await make_batch(db, tenant_id, some_lines(1, "mod_1"))
    steps = Steps(db)
    async with working(jobs_db, steps):
        await until(partial(is_free, db, new, "in_progress"))
        await until(partial(is_free, db, done, "completed"))
    assert sorted(steps.calls) == sorted([("validate", new), ("finalize", done)])
    assert await is_free(db, runs, "in_progress")


async def test_few_at_a_time_and_broken_off_at_the_end(db: Database, jobs_db: Database, tenant_id: str) -> None:
    for _ in range(5):
        await make_batch(db, tenant_id, [], status="validating")

    async def forever(_: BatchLease) -> None:
        await asyncio.Event().wait()

    steps = Steps(db, forever)
    async with working(jobs_db, steps) as stopping:
        await until(lambda: steps.running == AT_ONCE)
        stopping.set()
    assert (steps.most, steps.running, len(steps.calls)) == (AT_ONCE, 0, AT_ONCE)
    async with db.begin(SYSTEM) as connection:
        assert (await connection.execute(text("SELECT count(*) FROM batches WHERE runner_id IS NOT NULL"))).scalar_one() == 0


async def test_a_service_that_is_away_is_waited_for(db: Database, jobs_db: Database, tenant_id: str) -> None:
    first, second = [await make_batch(db, tenant_id, [], status="finalizing") for _ in range(2)]
    tries = Counter[str]()

    async def away(lease: BatchLease) -> None:
        tries[lease.batch_id] += 1
        if lease.batch_id == first and tries[first] < 4:
            raise Unavailable("The object store is away.")

    async with working(jobs_db, Steps(db, away)):
        await until(partial(is_free, db, second, "completed"))
        await until(partial(is_free, db, first, "completed"))
    assert tries == {first: 4, second: 1}


async def test_a_batch_that_cannot_be_validated_fails(
    db: Database, jobs_db: Database, tenant_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    batch_id = await make_batch(db, tenant_id, [], status="validating")

    async def breaks(_: BatchLease) -> None:
        raise RuntimeError("a mistake")

    steps = Steps(db, breaks)
    async with working(jobs_db, steps):
        await until(partial(is_free, db, batch_id, "failed"))
    assert steps.calls == [("validate", batch_id)] * batches.MAX_ATTEMPTS + [("internal_error", batch_id)]
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == ["unexpected error"] * batches.MAX_ATTEMPTS


async def test_a_batch_that_ends_its_runners_fails(db: Database, jobs_db: Database, tenant_id: str) -> None:
    batch_id = await make_batch(db, tenant_id, [], status="validating")
    for losses in range(batches.MAX_ATTEMPTS):
        runner_id = await register(jobs_db)
        claimed = await claim_batch(jobs_db, runner_id)
        assert claimed is not None
        assert claimed[0].losses == losses
        assert await free_lost(jobs_db, 0) == runner_id
    steps = Steps(db)
    async with working(jobs_db, steps):
        await until(partial(is_free, db, batch_id, "failed"))
    assert steps.calls == [("internal_error", batch_id)]


async def test_tries_that_were_postponed_are_no_failures(db: Database, jobs_db: Database, tenant_id: str) -> None:
    batch_id = await make_batch(db, tenant_id, [], status="validating")
    tries = 0

    async def fragile(_: BatchLease) -> None:
        nonlocal tries
        tries += 1
        if tries <= batches.MAX_ATTEMPTS:
            raise Unavailable("The object store is away.")
        if tries <= batches.MAX_ATTEMPTS + 2:
            raise RuntimeError("a mistake")

    async with working(jobs_db, Steps(db, fragile)):
        await until(partial(is_free, db, batch_id, "in_progress"))
    assert tries == batches.MAX_ATTEMPTS + 3


async def test_a_step_whose_batch_is_another_runners_is_dropped(db: Database, jobs_db: Database, tenant_id: str) -> None:
    batch_id = await make_batch(db, tenant_id, [], status="validating")

    async def cancelled(_: BatchLease) -> None:
        await set_status(db, batch_id, "cancelling")
        raise LeaseLost

    steps = Steps(db, cancelled)
    async with working(jobs_db, steps):
        # It has no lines, so it is settled at once, and finalized.
        async def is_finalized() -> bool:
            return ("finalize", batch_id) in steps.calls

        await until(is_finalized)
    assert (await batch_row(db, batch_id)).finalizing_at is not None


async def test_a_batch_whose_lease_was_not_confirmed_is_worked_on(
    db: Database, jobs_db: Database, tenant_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = await make_batch(db, tenant_id, [], status="validating")
    lost: list[BatchLease] = []

    async def claim(*args: Any) -> tuple[BatchLease, str] | None:
        found = await claim_batch(*args)
        if found is not None and not lost:
            # The reply to the commit is lost.
            lost.append(found[0])
            raise Unavailable("The database connection was lost.")
        return found

    monkeypatch.setattr(batches, "claim_batch", claim)
    steps = Steps(db)
    async with working(jobs_db, steps):
        await until(partial(is_free, db, batch_id, "in_progress"))
    assert len(lost) == 1
    assert steps.calls == [("validate", batch_id)]
