"""What a supervisor writes down, also when it could not at once."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from lmaas.errors import Unavailable
from lmaas.replica import supervisor
from lmaas.scheduling.client import Beat, Scheduler
from lmaas.states import Observed
from lmaas.store.database import Database
from lmaas.store.replicas import list_replicas, observe
from tests.integration.gateway.stack import running
from tests.support.conditions import until


async def test_the_usual_start_is_told_while_it_matters(
    postgres_url: str, valkey_url: str, tmp_path: Path, may_start: asyncio.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_start.set()
    told: list[tuple[str, int | None]] = []
    real = Scheduler.heartbeat

    async def heartbeat(scheduler: Scheduler, pool: str, replica: str, beat: Beat) -> Any:
        told.append((beat.state, beat.start_ms))
        return await real(scheduler, pool, replica, beat)

    monkeypatch.setattr(Scheduler, "heartbeat", heartbeat)
    monkeypatch.setattr(supervisor, "BEAT_S", 0.05)
    async with running(postgres_url, valkey_url, tmp_path) as stack:
        model = await stack.model("base")
        await stack.replica(model)

        def several_without() -> bool:
            ready = [start_ms for state, start_ms in told if state == Observed.READY]
            return any(ready) and ready[-5:] == [None] * 5

        await until(several_without)
        may_start.clear()
        second = asyncio.create_task(stack.replica(model))
        await until(lambda: len([ms for state, ms in told if state == Observed.STARTING and ms is not None]) >= 3)
        may_start.set()
        await second


async def test_ready_is_written_once_postgres_is_back(
    postgres_url: str, valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[Observed] = []

    async def away_once(db: Database, replica_id: str, state: Observed, **facts: Any) -> bool:
        if not refused:
            refused.append(state)
            raise Unavailable("Postgres is away")
        return await observe(db, replica_id, state, **facts)

    monkeypatch.setattr(supervisor, "observe", away_once)
    async with running(postgres_url, valkey_url, tmp_path) as stack:
        model = await stack.model("base")
        await stack.replica(model)
        assert refused == [Observed.READY]
        (row,) = await list_replicas(stack.db, base_model_id=model.id)
        assert (row.observed, row.url is not None, row.ready_at is not None) == (Observed.READY, True, True)
