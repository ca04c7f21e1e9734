"""The records of a supervisor, including those that it could not write at once."""

import asyncio
import re
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from lmaas.engine.client import EngineClient
from lmaas.engine.launch import EngineSpec
from lmaas.engine.launch import launched as really_launched
from lmaas.engine.zygote.progress import Sight
from lmaas.errors import Unavailable
from lmaas.replica import progress, supervisor
from lmaas.replica.supervisor import Ending, Supervisor
from lmaas.scheduling.client import Beat, Scheduler
from lmaas.states import Observed
from lmaas.store.database import Database, new_id
from lmaas.store.models import BaseModel
from lmaas.store.replicas import add_replica, desire_stop, list_replicas, observe
from lmaas.store.rights import DatabaseRole
from tests.integration.gateway.stack import Stack, running
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


@asynccontextmanager
async def starting(stack: Stack, model: BaseModel) -> AsyncIterator[tuple[str, "asyncio.Task[Ending]"]]:
    """Run a replica that starts; provide its id, and the task that ends with it."""
    replica_id = new_id("rep")
    await add_replica(stack.db, replica_id, model.id)
    async with EngineClient() as client:
        mine = Supervisor(
            stack.settings, stack.database(DatabaseRole.REPLICA), stack.scheduler, stack.services.adapter_files, client, model, replica_id
        )
        task = asyncio.create_task(mine.run())
        try:
            yield replica_id, task
        finally:
            mine.end(Observed.STOPPED, "the test has ended")
            await task
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().remove_signal_handler(number)  # those belong to pytest


async def test_a_replica_that_waits_for_the_zygote_beats_says_what_is_left_and_can_be_stopped(
    postgres_url: str, valkey_url: str, tmp_path: Path, may_start: asyncio.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_start.set()
    imported = asyncio.Event()
    used = iter(range(1, 1000))

    @asynccontextmanager
    async def launched(spec: EngineSpec, port: int, log: Path, home: Path | None, told: Callable[[Sight], None]) -> AsyncIterator[Any]:
        while not imported.is_set():
            # A twentieth of a CPU.
            told(Sight(pid=1, done=1, stages=20, used_s=(spent := next(used)) / 20, age_s=spent, usual_s=10.0))
            await asyncio.sleep(0.02)
        async with really_launched(spec, port, log, home) as engine:
            yield engine

    monkeypatch.setattr(supervisor, "launched", launched)
    monkeypatch.setattr(supervisor, "BEAT_S", 0.05)
    async with running(postgres_url, valkey_url, tmp_path) as stack:
        model = await stack.model("base")
        acme = await stack.tenant()
        body = {"model": "base", "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
        async with starting(stack, model) as (_, first):
            answering = asyncio.create_task(stack.stream(acme, "/v1/chat/completions", body))
            assert not first.done()
            await until(lambda: next(used) > 100)  # the first comment comes after a second
            imported.set()
            answer = await answering
            assert answer.error is None
            waits = [int(found[1]) for text in answer.comments if (found := re.search(r"estimated_wait_s=(\d+)", text))]
            assert waits
            assert 100 < waits[0] <= 260  # the rest of ten seconds of CPU time at a twentieth of a CPU, and the start
        imported.clear()
        async with starting(stack, model) as (second_id, second):
            await until(lambda: next(used) > 200)
            await desire_stop(stack.db, second_id)
            ending = await asyncio.wait_for(asyncio.shield(second), 30)
            assert ending.state is Observed.STOPPED


async def test_an_engine_that_stands_still_while_it_starts_has_failed(
    postgres_url: str, valkey_url: str, tmp_path: Path, may_start: asyncio.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "STILL_S", 2.0)
    monkeypatch.setattr(progress, "EVERY_S", 0.1)
    async with running(postgres_url, valkey_url, tmp_path) as stack:
        model = await stack.model("base")
        async with starting(stack, model) as (_, task):

            def engines() -> list[psutil.Process]:
                return [one for one in psutil.Process().children(recursive=True) if "fake_engine" in " ".join(one.cmdline())]

            await until(engines)
            engines()[-1].suspend()
            ending = await asyncio.wait_for(asyncio.shield(task), 60)
            assert ending.state is Observed.FAILED
            assert ending.reason.startswith("the engine stood still for ")
