"""The time sheet covers an engine's whole life, to the millisecond of the supervisor's clock, whatever happens meanwhile."""

import asyncio
import dataclasses
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from lmaas.adapters.objects import AdapterFiles
from lmaas.engine.client import EngineClient
from lmaas.errors import Unavailable
from lmaas.replica import timesheet
from lmaas.replica.supervisor import Supervisor
from lmaas.scheduling.client import Bounds, Ticket
from lmaas.states import EnginePhase, Observed
from lmaas.store import engine_time
from lmaas.store.database import new_id
from lmaas.store.engine_time import list_engine_time
from lmaas.store.models import BaseModel, change_base_model
from lmaas.store.replicas import add_replica, desire_stop
from tests.integration.gateway.stack import CHAT, Replica, Stack, running
from tests.support.clocks import Clock
from tests.support.conditions import until

STARTING, LOADING, BUSY, BACKGROUND, IDLE = EnginePhase
ASK = {"model": "base", "messages": [{"role": "user", "content": "go on"}], "max_tokens": 1500, "ignore_eos": True}


@pytest.fixture
async def stack(postgres_url: str, valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stack]:
    monkeypatch.setattr(timesheet, "WRITE_EVERY_S", 0.02)
    monkeypatch.setattr(timesheet, "RETRY_S", 0.02)
    async with running(postgres_url, valkey_url, tmp_path) as stack:
        yield stack


async def phases(stack: Stack) -> Counter[EnginePhase]:
    """Return the milliseconds of each phase in Postgres."""
    counted: Counter[EnginePhase] = Counter()
    for row in await list_engine_time(stack.db):
        counted[row.phase] += row.ms
    return counted


async def spend(stack: Stack, clock: Clock, phase: EnginePhase, seconds: float) -> None:
    """Wait until the engine is seen in the phase, then advance the clock by this time."""
    before = (await phases(stack))[phase]

    async def seen() -> bool:
        clock.now += 0.001
        return (await phases(stack))[phase] > before + 2

    await until(seen)
    clock.now += seconds


async def ended(replica: Replica) -> Any:
    async with asyncio.timeout(30):
        return await asyncio.shield(replica.task)


def about(seconds: float) -> Any:
    """Expect this many seconds of the test's clock, plus the few steps that it took to see the phase."""
    return pytest.approx(seconds * 1000 + 500, abs=500)


async def test_a_whole_life(stack: Stack, may_start: asyncio.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch, may_load = AdapterFiles.fetch, asyncio.Event()

    async def gated(self: AdapterFiles, source: str, folder: Path) -> None:
        await may_load.wait()
        await fetch(self, source, folder)

    monkeypatch.setattr(AdapterFiles, "fetch", gated)
    model, clock = await stack.model("base"), Clock()
    acme = await stack.tenant()
    await stack.adapter(acme, "bot", model)
    coming = asyncio.create_task(stack.replica(model, "--fake-token-ms 20", clock))
    await spend(stack, clock, STARTING, 20)
    may_start.set()
    replica = await coming
    await spend(stack, clock, IDLE, 70)
    asking = asyncio.create_task(stack.stream(acme, CHAT, ASK | {"model": "bot"}))
    await spend(stack, clock, LOADING, 3)
    may_load.set()
    await spend(stack, clock, BUSY, 40)
    assert not asking.done()
    asking.cancel()
    await spend(stack, clock, IDLE, 100)
    last = asyncio.create_task(stack.stream(acme, CHAT, ASK))
    await spend(stack, clock, BUSY, 5)
    # Drained: requests may run for another second, and are then cut.
    await desire_stop(stack.db, replica.id)
    assert (await ended(replica)).state is Observed.STOPPED
    await last
    found = await phases(stack)
    assert found == {STARTING: about(20), LOADING: about(3), BUSY: about(45), IDLE: about(170)}
    assert found.total() == clock.passed_ms


async def test_time_in_which_only_background_work_runs_is_neither_busy_nor_idle(stack: Stack, may_start: asyncio.Event) -> None:
    may_start.set()
    model, clock = await stack.model("base"), Clock()
    acme = await stack.tenant()
    replica = await stack.replica(model, "--fake-token-ms 20", clock)
    await spend(stack, clock, IDLE, 10)
    line = Ticket("line", model.id, acme.id, "gw", "", "", 1, "{}", background=True)
    assert (await stack.scheduler.submit(line, Bounds(10, 10)))["state"] == "granted"
    await spend(stack, clock, BACKGROUND, 30)
    request = Ticket("request", model.id, acme.id, "gw", "", "", 1, "{}")
    assert (await stack.scheduler.submit(request, Bounds(10, 10)))["state"] == "granted"
    await spend(stack, clock, BUSY, 5)
    await stack.scheduler.release(request, "", None)
    await spend(stack, clock, BACKGROUND, 20)
    await desire_stop(stack.db, replica.id)
    await stack.scheduler.release(line, "", None)
    assert (await ended(replica)).state is Observed.STOPPED
    found = await phases(stack)
    assert (found[BUSY], found[BACKGROUND]) == (about(5), about(50))
    assert found.total() == clock.passed_ms


async def test_on_the_real_clock_the_phases_are_the_engines_life(stack: Stack) -> None:
    model = await stack.model("base")
    before = time.monotonic()
    replica = await stack.replica(model)
    ready = time.monotonic()
    await stack.stream(await stack.tenant(), CHAT, ASK | {"max_tokens": 300})
    await desire_stop(stack.db, replica.id)
    await ended(replica)
    life_ms = (time.monotonic() - before) * 1000
    found = await phases(stack)
    assert 0 < found[STARTING] <= (ready - before) * 1000
    assert found[BUSY] > 0
    assert life_ms - 1000 < found.total() <= life_ms


async def test_nothing_is_lost_while_postgres_is_away_also_at_the_end(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    write, away, refused = engine_time.record_engine_time, [False], [0]

    async def sometimes(*args: Any) -> None:
        if away[0]:
            refused[0] += 1
            raise Unavailable("Postgres is away")
        await write(*args)

    monkeypatch.setattr(timesheet, "record_engine_time", sometimes)
    clock = Clock()
    replica = await stack.replica(await stack.model("base"), clock=clock)
    await spend(stack, clock, IDLE, 10)
    await spend(stack, clock, IDLE, 10)
    away[0] = True
    clock.now += 50
    await until(lambda: refused[0] > 2)
    replica.kill()
    count = refused[0]
    await until(lambda: refused[0] > count + 20)
    assert not replica.task.done()
    assert (await phases(stack)).total() < 50_000
    away[0] = False
    assert (await ended(replica)).state is Observed.FAILED
    found = await phases(stack)
    assert found == {IDLE: about(70)}
    assert found.total() == clock.passed_ms


async def test_the_last_word_is_waited_for_with_an_end(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def away(*_: Any) -> None:
        raise Unavailable("Postgres is away")

    replica = await stack.replica(await stack.model("base"))
    monkeypatch.setattr(timesheet, "record_engine_time", away)
    monkeypatch.setattr(timesheet, "LAST_WORD_S", 0.1)
    replica.kill()
    assert (await ended(replica)).state is Observed.FAILED
    assert "the last of the engine's time was not written" in caplog.text


async def test_a_new_price_holds_from_then_on(stack: Stack) -> None:
    model, clock = await stack.model("base"), Clock()
    replica = await stack.replica(model, clock=clock)
    await spend(stack, clock, IDLE, 10)
    await spend(stack, clock, IDLE, 0)
    await change_base_model(stack.db, "base", {"engine_price": 360_000})

    async def charged() -> bool:
        clock.now += 0.001
        return any(row.price == 360_000 for row in await list_engine_time(stack.db))

    await until(charged)
    clock.now += 100
    await desire_stop(stack.db, replica.id)
    await ended(replica)
    by_price: Counter[int] = Counter()
    for row in await list_engine_time(stack.db):
        by_price[row.price] += row.ms
    assert by_price == {0: about(10), 360_000: about(100)}
    assert by_price.total() == clock.passed_ms


async def supervise(stack: Stack, model: BaseModel, clock: Clock, **changes: Any) -> Any:
    """Run the whole life of a replica for which no request waits."""
    replica_id = new_id("rep")
    await add_replica(stack.db, replica_id, model.id)
    async with EngineClient() as client:
        settings = dataclasses.replace(stack.settings, **changes)
        supervisor = Supervisor(settings, stack.db, stack.scheduler, stack.services.adapter_files, client, model, replica_id, clock)
        try:
            return await supervisor.run()
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().remove_signal_handler(number)  # those belong to pytest


async def test_an_engine_that_never_starts_has_cost_its_time(stack: Stack) -> None:
    model, clock = await stack.model("base"), Clock()
    life = asyncio.create_task(supervise(stack, model, clock, engine_module="lmaas.no_such_engine"))

    async def launched() -> bool:
        return clock.first > 0

    await until(launched, every_s=0.001)
    clock.now += 8
    assert (await life).state is Observed.FAILED
    assert await phases(stack) == {STARTING: 8000}


async def test_a_supervisor_that_fails_has_written_first(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    may_fail = asyncio.Event()

    async def fail(_: str) -> AsyncIterator[str]:
        await may_fail.wait()
        raise RuntimeError("unexpected")
        yield ""

    monkeypatch.setattr(stack.scheduler, "listen", fail)
    model, clock = await stack.model("base"), Clock()
    life = asyncio.create_task(supervise(stack, model, clock))
    await until(lambda: clock.first > 0)
    clock.now += 8
    may_fail.set()
    with pytest.raises(RuntimeError, match="unexpected"):
        await life
    assert (await phases(stack)).total() == 8000
