"""The effect of a runner on others after an outage of Postgres."""

import asyncio

import pytest
from sqlalchemy import text

from lmaas.jobs import runner
from lmaas.jobs.metrics import JobMetrics
from lmaas.jobs.runner import Runner
from lmaas.store.database import Database
from lmaas.store.runners import RUNNER_LOST_S, register
from lmaas.store.scopes import SYSTEM
from tests.support.conditions import until


class Waits:
    """Work that waits for its end."""

    async def run(self, _: str, stopping: asyncio.Event) -> None:
        """Wait until `stopping` is set."""
        await stopping.wait()


async def test_a_runner_frees_nothing_of_others_after_an_outage(db: Database, jobs_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "BEAT_S", 0.01)
    now, beats = 0.0, 0

    def clock() -> float:
        nonlocal beats
        beats += 1
        return now

    other, stopping = await register(jobs_db), asyncio.Event()
    async with db.begin(SYSTEM) as connection:
        await connection.execute(text("UPDATE job_runners SET seen_at = now() - interval '20 s'"))
    first = Runner(jobs_db, [Waits()], JobMetrics().lost, clock)
    now = 20.0  # Postgres has been away since the process started

    async def others() -> list[str]:
        async with db.begin(SYSTEM) as connection:
            return [row.id for row in await connection.execute(text("SELECT id FROM job_runners")) if row.id != first.id]

    task = asyncio.create_task(first.run(stopping))
    await until(lambda: beats > 5)
    assert await others() == [other]
    now += RUNNER_LOST_S / 2
    known = beats
    await until(lambda: beats > known + 5)
    assert await others() == [other]
    now += RUNNER_LOST_S / 2

    async def is_gone() -> bool:
        return await others() == []

    await until(is_gone)
    stopping.set()
    await task
