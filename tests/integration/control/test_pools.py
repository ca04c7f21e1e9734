"""Several pools under one controller, on a real Postgres and Valkey: sharing a full machine, idle times that outlive a controller, and a
controller that is not the active one any more."""

import asyncio
import json
from contextlib import AsyncExitStack
from typing import Any

import pytest

from lmaas.config import Settings
from lmaas.control.controller import Controller
from lmaas.control.idleness import IdleTimes
from lmaas.scheduling.client import Beat, Bounds, Scheduler, Ticket
from lmaas.states import Desired, Observed
from lmaas.store.database import Database
from lmaas.store.leadership import LostLead, leading
from lmaas.store.models import BaseModel, change_base_model, delete_base_model
from lmaas.store.pools import is_blocked, pool_states_by_id, save_pool_state
from lmaas.store.replicas import add_replica, list_replicas, observe
from lmaas.store.rights import DatabaseRole
from lmaas.types import Resources
from tests.integration.control.test_controller import Clock, Names
from tests.integration.store.build import base_model
from tests.support.databases import login_url
from tests.support.figures import add_to_figure


class World:
    """Two pools, `a` and `b`, on a machine with one CPU. The test plays the part of the replicas."""

    def __init__(self, settings: Settings, db: Database, controller_db: Database, scheduler: Scheduler, models: list[BaseModel]) -> None:
        self.settings, self.db, self.controller_db, self.scheduler = settings, db, controller_db, scheduler
        self.models = {model.name: model for model in models}
        self.names, self.clock = Names(), Clock()
        self.names.room = Resources(1, 0)
        self.controller = self.new_controller()

    def new_controller(self) -> Controller:
        return Controller(self.settings, self.controller_db, self.scheduler, self.names, self.clock)

    def ticket(self, name: str, pool: str) -> Ticket:
        return Ticket(name, self.models[pool].id, "t", "g", "", "", 1, json.dumps({"request_id": name}))

    async def submit(self, name: str, pool: str) -> str:
        return str((await self.scheduler.submit(self.ticket(name, pool), Bounds(100, 100)))["state"])

    async def finish(self, name: str, pool: str) -> None:
        await self.scheduler.release(self.ticket(name, pool), "", 5)

    async def rows(self) -> dict[str, list[tuple[str, str]]]:
        """Return the desired and observed states of the replicas that have not ended, by pool."""
        names = {model.id: name for name, model in self.models.items()}
        found: dict[str, list[tuple[str, str]]] = {}
        for row in await list_replicas(self.db):
            found.setdefault(names[row.base_model_id], []).append((row.desired, row.observed))
        return found

    async def ready(self) -> None:
        """Make every starting replica ready, and send a heartbeat for each ready one."""
        for row in await list_replicas(self.db):
            await observe(self.db, row.id, Observed.READY, url="http://e")
            if row.desired == Desired.RUNNING:
                await self.scheduler.heartbeat(row.base_model_id, row.id, Beat("http://e", 2, 2, Observed.READY, []))

    async def drained(self) -> None:
        """Stop every replica that is to stop."""
        for row in await list_replicas(self.db):
            if row.desired == Desired.STOPPED:
                await observe(self.db, row.id, Observed.DRAINING)
                await observe(self.db, row.id, Observed.STOPPED)
                await self.scheduler.deregister(row.base_model_id, row.id)
                self.names.processes.pop(row.id)

    async def idle_times(self, pool: str) -> IdleTimes:
        """Return the pool's idle times as the active controller has saved them."""
        return IdleTimes.of((await pool_states_by_id(self.db))[self.models[pool].id].idle_times)


@pytest.fixture
async def world(settings: Settings, db: Database, controller_db: Database, scheduler: Scheduler) -> World:
    return World(settings, db, controller_db, scheduler, [await base_model(db, "a"), await base_model(db, "b")])


STARTING, READY, STOPPING = ("running", "starting"), ("running", "ready"), ("stopped", "ready")


async def test_an_idle_pool_gives_way_to_one_that_waits(world: World) -> None:
    await world.submit("r1", "a")
    await world.controller.tick()
    assert world.names.needs == [Resources(1, 0)]
    await world.ready()
    await world.submit("r2", "b")
    await world.controller.tick()
    assert await world.rows() == {"a": [READY]}, "one at a time"
    assert await is_blocked(world.db, world.models["b"].id)
    assert not await is_blocked(world.db, world.models["a"].id)
    decision = world.controller.decisions[world.models["b"].id]
    assert (decision.wanted, decision.replicas, decision.blocked) == (1, 0, True)
    assert decision.reason == "1 requests wait and there is no replica; the machines are full"
    await world.finish("r1", "a")
    await world.controller.tick()
    assert await world.rows() == {"a": [READY]}, "it is idle, but has only just become ready"
    world.clock.ahead_s += 15
    await world.controller.tick()
    assert await world.rows() == {"a": [STOPPING]}
    assert world.controller.decisions[world.models["a"].id].reason.endswith("gives way to b")
    await world.controller.tick()
    assert len(world.names.processes) == 1, "it drains, and still has its memory"
    await world.drained()
    await world.controller.tick()
    assert await world.rows() == {"b": [STARTING]}
    assert not await is_blocked(world.db, world.models["b"].id)
    await world.ready()
    assert await world.submit("r2", "b") == "granted"


async def test_two_busy_pools_take_turns(world: World) -> None:
    for pool in ("a", "b"):
        await world.submit(f"{pool}-0", pool)
    await world.controller.tick()
    await world.ready()
    turns = []
    for number in range(4):
        [(serving, _)] = (await world.rows()).items()
        turns.append(serving)
        await world.controller.tick()
        world.clock.ahead_s += 59
        await world.controller.tick()
        assert await world.rows() == {serving: [READY]}
        world.clock.ahead_s += 1
        await world.controller.tick()
        assert await world.rows() == {serving: [STOPPING]}
        # The running request ends, and another one arrives for the same pool.
        await world.finish(f"{serving}-{max(0, number - 1)}", serving)
        await world.drained()
        await world.submit(f"{serving}-{number + 1}", serving)
        await world.controller.tick()
        await world.ready()
    assert turns in (["a", "b", "a", "b"], ["b", "a", "b", "a"])


async def test_a_pool_that_no_machine_can_hold_says_so(world: World) -> None:
    await change_base_model(world.db, "a", {"cpus": 8.0, "accelerators": 1})
    await world.submit("r1", "a")
    await world.submit("r2", "b")
    await world.controller.tick()
    assert await world.rows() == {"b": [STARTING]}
    states = await pool_states_by_id(world.db)
    assert "a replica needs 8 CPUs and 1 accelerators" in states[world.models["a"].id].decision["reason"]


async def test_one_accelerator_each_where_there_are_any(world: World) -> None:
    world.names.room = Resources(8, 1)
    await change_base_model(world.db, "b", {"accelerators": 0, "cpus": 0.5})
    await world.submit("r1", "a")
    await world.submit("r2", "b")
    await world.controller.tick()
    assert sorted(world.names.needs, key=lambda needs: needs.cpus) == [Resources(0.5, 0), Resources(1, 1)]


async def test_idle_times_outlive_a_controller(world: World) -> None:
    pool = world.models["a"].id

    async def active_ago(seconds: int) -> None:
        await add_to_figure(world.scheduler.redis, pool, "active", -seconds * 1000)

    await world.submit("r1", "a")
    await world.finish("r1", "a")
    await active_ago(100)
    await world.controller.tick()
    await world.submit("r2", "a")
    await world.controller.tick()
    assert await world.idle_times("a") == IdleTimes().with_gap(100)
    await world.new_controller().tick()
    assert await world.idle_times("a") == IdleTimes().with_gap(100)
    # Saved values that cannot be read do no harm.
    await save_pool_state(world.db, pool, {"blocked": False}, [(10**9, -1.0)])
    await world.new_controller().tick()
    assert (await pool_states_by_id(world.db))[pool].idle_times == []


async def test_a_decision_is_written_when_it_changes(world: World) -> None:
    await world.controller.tick()
    before = await pool_states_by_id(world.db)
    await world.controller.tick()
    assert await pool_states_by_id(world.db) == before
    await world.submit("r1", "a")
    await world.controller.tick()
    after = await pool_states_by_id(world.db)
    assert after[world.models["a"].id].decision["wanted"] == 1
    assert after[world.models["b"].id] == before[world.models["b"].id]
    assert after[world.models["a"].id].decision == json.loads(json.dumps(world.controller.decisions[world.models["a"].id].shown()))


async def test_a_deleted_pool_is_forgotten(world: World) -> None:
    await world.controller.tick()
    await delete_base_model(world.db, "a")
    assert not await add_replica(world.db, "rep_late", world.models["a"].id)
    world.names.processes["rep_left"] = world.models["a"].id
    await world.controller.tick()
    assert world.names.killed == ["rep_left"]
    assert list(world.controller.decisions) == [world.models["b"].id]


async def test_a_controller_that_is_deposed_starts_and_kills_nothing_more(world: World, database_url: str) -> None:
    other = Database(login_url(database_url, DatabaseRole.CONTROLLER), DatabaseRole.CONTROLLER)
    async with AsyncExitStack() as stack:
        # The controller leads as in `run`. Then its process is suspended, and another controller becomes active.
        world.controller.lead(await stack.enter_async_context(leading(world.controller_db)))
        await world.controller.tick()
        await stack.enter_async_context(leading(other, check_s=0.05, silent_s=0.3))
        # Nothing has changed that would be saved, so the kill is what fails.
        world.names.processes["rep_stranger"] = "mod_gone"
        with pytest.raises(LostLead):
            await world.controller.tick()
        await world.submit("r1", "a")
        with pytest.raises(LostLead):
            await world.controller.tick()
        assert await list_replicas(world.db) == []
        assert world.names.processes == {"rep_stranger": "mod_gone"}
        assert world.names.killed == []
    await other.close()


async def test_what_a_controller_starts_after_it_stood_still_is_desired_by_nobody(world: World, database_url: str) -> None:
    """The controller stops between writing the row and starting the process. The next controller ends the row, and the supervisor finds it
    ended."""
    other = Database(login_url(database_url, DatabaseRole.CONTROLLER), DatabaseRole.CONTROLLER)
    start = world.names.start
    stands_still, goes_on = asyncio.Event(), asyncio.Event()

    async def slow(*facts: Any) -> None:
        stands_still.set()
        await goes_on.wait()
        await start(*facts)

    world.names.start = slow  # type: ignore[method-assign,assignment]
    await world.submit("r1", "a")
    async with AsyncExitStack() as stack:
        world.controller.lead(await stack.enter_async_context(leading(world.controller_db)))
        old = asyncio.create_task(world.controller.tick())
        await stands_still.wait()
        active = await stack.enter_async_context(leading(other, check_s=0.05, silent_s=0.3))
        second = world.new_controller()
        second.lead(active)
        world.names.start = start  # type: ignore[method-assign]
        await second.tick()
        [lost] = [row for row in await list_replicas(world.db, ended=True) if row.observed == Observed.LOST]
        goes_on.set()
        with pytest.raises(LostLead):
            await old
        assert lost.id in world.names.processes, "its supervisor sees that its row has ended (app.run_replica)"
        await second.tick()
        world.clock.ahead_s += 16
        await second.tick()
        assert lost.id in world.names.killed
    await other.close()
