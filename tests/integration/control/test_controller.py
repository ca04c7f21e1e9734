"""The controller on a real Postgres and Valkey, with replicas that have no processes; and the metering writer."""

import asyncio
import json
import time
from dataclasses import replace
from typing import Any

import pytest
from redis.asyncio import Redis
from sqlalchemy import text

from lmaas.config import Settings
from lmaas.control import controller
from lmaas.control.controller import Controller
from lmaas.metering.usage import UsageRecord
from lmaas.metering.writer import EVENTS_AT_ONCE, write_events
from lmaas.scheduling.client import Beat, Bounds, Scheduler, Ticket
from lmaas.states import Desired, Observed, UsageStatus
from lmaas.store.database import Database
from lmaas.store.models import BaseModel, change_base_model
from lmaas.store.replicas import Replica, get_replica, list_replicas, observe, recent_failures
from lmaas.store.scopes import OPERATOR, SYSTEM
from lmaas.store.tenants import Tenant
from lmaas.store.usage import list_events
from lmaas.types import Resources
from tests.integration.store.build import base_model, tenant
from tests.support.conditions import until
from tests.support.figures import add_to_figure


class Names:
    """A provisioner whose processes are entries of a dictionary."""

    def __init__(self) -> None:
        self.processes: dict[str, str] = {}
        self.killed: list[str] = []
        self.error: OSError | None = None
        self.room: Resources | None = None
        self.needs: list[Resources] = []
        self.words: dict[str, str] = {}

    async def start(self, replica_id: str, pool_id: str, needs: Resources) -> None:
        if self.error is not None:
            raise self.error
        self.needs.append(needs)
        self.processes[replica_id] = pool_id

    async def kill(self, replica_id: str) -> None:
        self.killed.append(replica_id)
        self.processes.pop(replica_id, None)

    async def list(self) -> dict[str, str]:
        return dict(self.processes)

    async def last_words(self, replica_id: str) -> str:
        return self.words.pop(replica_id, "")

    def start_delay_s(self) -> float:
        return 0.0

    def first_start_s(self) -> float:
        return 20.0

    async def capacity(self) -> Resources | None:
        return self.room


class Clock:
    """The clock of a controller: real time, plus the time that a test adds."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


class Stack:
    """One pool and its controller; the test plays the part of the replicas."""

    def __init__(self, settings: Settings, db: Database, controller_db: Database, scheduler: Scheduler, model: BaseModel) -> None:
        self.settings, self.db, self.scheduler, self.model = settings, db, scheduler, model
        self.controller_db = controller_db
        self.names, self.clock = Names(), Clock()
        self.controller = self.new_controller()

    def new_controller(self) -> Controller:
        return Controller(self.settings, self.controller_db, self.scheduler, self.names, self.clock)

    async def submit(self, name: str) -> dict[str, Any]:
        return await self.scheduler.submit(self.ticket(name), Bounds(100, 10_000))

    def ticket(self, name: str) -> Ticket:
        return Ticket(name, self.model.id, "t", "g", "", "", 1, json.dumps({"request_id": name}))

    async def rows(self, ended: bool = False) -> list[Replica]:
        return await list_replicas(self.db, base_model_id=self.model.id, ended=ended)

    async def row(self) -> Replica:
        [row] = await self.rows()
        return row

    async def ready(self, replica: Replica) -> None:
        """Report the engine as ready, as its supervisor would."""
        assert await observe(self.db, replica.id, Observed.READY, url="http://e")
        await self.beat(replica.id)

    async def beat(self, replica_id: str) -> None:
        await self.scheduler.heartbeat(self.model.id, replica_id, Beat("http://e", 2, 2, Observed.READY, []))

    async def bounds(self, **changes: Any) -> None:
        self.model = await change_base_model(self.db, self.model.name, changes)


@pytest.fixture
async def stack(settings: Settings, db: Database, controller_db: Database, scheduler: Scheduler) -> Stack:
    return Stack(settings, db, controller_db, scheduler, await base_model(db))


async def test_nothing_is_started_without_demand(stack: Stack) -> None:
    await stack.controller.tick()
    assert await stack.rows() == []
    assert stack.names.processes == {}


async def test_from_zero_to_one_and_the_ticket_is_granted(stack: Stack) -> None:
    await stack.submit("r1")
    for _ in range(3):
        await stack.controller.tick()
    row = await stack.row()
    assert (row.desired, row.observed) == (Desired.RUNNING, Observed.STARTING)
    assert stack.names.processes == {row.id: stack.model.id}
    await stack.ready(row)
    await stack.controller.tick()
    assert (await stack.submit("r1"))["state"] == "granted"


async def test_more_demand_more_replicas_within_the_bounds(stack: Stack) -> None:
    await stack.bounds(max_replicas=2)
    for number in range(9):
        await stack.submit(f"r{number}")
    await stack.controller.tick()
    assert len(await stack.rows()) == len(stack.names.processes) == 2


async def test_a_minimum_is_kept(stack: Stack) -> None:
    await stack.bounds(min_replicas=2, max_replicas=1)
    await stack.controller.tick()
    assert len(stack.names.processes) == 2


async def test_replicas_know_of_a_controller_whose_provisioner_is_away(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "PRESENT_S", 0.1)
    monkeypatch.setattr(controller, "TICK_S", 0.05)
    beat = Beat("http://e", 2, 2, Observed.READY, [])
    assert not (await stack.scheduler.heartbeat(stack.model.id, "rep_1", beat))["controller"]

    async def hangs() -> dict[str, str]:
        await asyncio.Event().wait()
        return {}

    monkeypatch.setattr(stack.names, "list", hangs)
    running = asyncio.create_task(stack.controller.run())

    async def known() -> bool:
        return bool((await stack.scheduler.heartbeat(stack.model.id, "rep_1", beat))["controller"])

    await until(known)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_one_that_no_machine_has_room_for_fails_with_a_reason(stack: Stack) -> None:
    stack.controller = Controller(replace(stack.settings, start_timeout_s=0.2), stack.controller_db, stack.scheduler, stack.names)
    await stack.submit("r1")
    await stack.controller.tick()
    waiting = await stack.row()

    async def failed() -> bool:
        await stack.controller.tick()
        row = await get_replica(stack.db, waiting.id)
        return row is not None and row.observed == Observed.FAILED

    await until(failed)
    row = await get_replica(stack.db, waiting.id)
    assert row is not None
    assert row.reason == "its supervisor has not begun within 0.2 s: no machine had room for it, or could run it"
    assert stack.names.killed == [waiting.id]
    # The next attempt comes after a pause, as after any failed start.
    await stack.controller.tick()
    assert await stack.rows() == []
    assert (await recent_failures(stack.db, stack.model.id))[0] == 1


async def test_a_lost_supervisor_is_written_off_and_replaced(stack: Stack) -> None:
    await stack.submit("r1")
    await stack.controller.tick()
    lost = await stack.row()
    await stack.ready(lost)
    stack.names.processes.clear()
    await stack.controller.tick()
    gone = await get_replica(stack.db, lost.id)
    assert gone is not None
    assert (gone.observed, gone.reason) == (Observed.LOST, "its supervisor is gone")
    assert gone.ended_at is not None
    assert lost.id not in (await stack.scheduler.stats(stack.model.id))["replicas"]
    new = await stack.row()
    assert new.id != lost.id
    assert stack.names.processes == {new.id: stack.model.id}
    # It was ready before, so its loss is not a failed start.
    assert (await recent_failures(stack.db, stack.model.id, 1800))[0] == 0


async def test_a_supervisor_that_could_not_begin_leaves_its_words_as_the_reason(stack: Stack) -> None:
    await stack.submit("r1")
    await stack.controller.tick()
    row = await stack.row()
    stack.names.processes.clear()
    stack.names.words[row.id] = "OSError: [Errno 30] Read-only file system: '/data'"
    await stack.controller.tick()
    gone = await get_replica(stack.db, row.id)
    assert gone is not None
    assert gone.reason == "its supervisor is gone: OSError: [Errno 30] Read-only file system: '/data'"
    assert (await recent_failures(stack.db, stack.model.id))[0] == 1


async def test_after_failed_starts_it_waits_longer_and_longer(stack: Stack) -> None:
    await stack.submit("r1")
    await stack.controller.tick()
    row = await stack.row()
    await observe(stack.db, row.id, Observed.FAILED, reason="out of memory")
    stack.names.processes.clear()

    async def ended(seconds_ago: float) -> None:
        async with stack.db.begin(SYSTEM) as connection:
            await connection.execute(text("UPDATE replicas SET ended_at = now() - make_interval(secs => :s)"), {"s": seconds_ago})

    await stack.controller.tick()
    assert await stack.rows() == []
    await ended(4.5)
    await stack.controller.tick()
    assert await stack.rows() == []
    await ended(5.5)
    await stack.controller.tick()
    second = await stack.row()
    await observe(stack.db, second.id, Observed.FAILED, reason="out of memory")
    stack.names.processes.clear()
    await ended(9.5)
    await stack.controller.tick()
    assert await stack.rows() == []
    await ended(10.5)
    await stack.controller.tick()
    assert len(await stack.rows()) == 1


async def test_a_supervisor_that_cannot_be_started_is_a_failure(stack: Stack) -> None:
    stack.names.error = OSError("no such file")
    await stack.submit("r1")
    await stack.controller.tick()
    [row] = await stack.rows(ended=True)
    assert row.observed == Observed.FAILED
    assert "no such file" in str(row.reason)
    stack.names.error = None
    await stack.controller.tick()
    assert stack.names.processes == {}  # not at once


async def idle_for(stack: Stack, seconds: int) -> None:
    """Move the pool's last request this far into the past."""
    await add_to_figure(stack.scheduler.redis, stack.model.id, "active", -seconds * 1000)


async def test_an_idle_replica_is_asked_to_stop(stack: Stack) -> None:
    await stack.submit("r1")
    await stack.controller.tick()
    row = await stack.row()
    await stack.ready(row)
    await stack.scheduler.release(stack.ticket("r1"), "", 5)
    await stack.controller.tick()
    assert (await stack.row()).desired == Desired.RUNNING
    await idle_for(stack, 299)
    await stack.new_controller().tick()  # another controller remembers it as well
    assert (await stack.row()).desired == Desired.RUNNING
    await idle_for(stack, 2)
    await stack.controller.tick()
    assert (await stack.row()).desired == Desired.STOPPED
    assert row.id in stack.names.processes  # the replica drains by itself
    # A request arrives while the replica stops: the next replica waits for its memory.
    await stack.submit("r2")
    await stack.controller.tick()
    assert len(stack.names.processes) == 1
    await observe(stack.db, row.id, Observed.DRAINING)
    await observe(stack.db, row.id, Observed.STOPPED)
    stack.names.processes.clear()
    await stack.controller.tick()
    assert (await stack.row()).id != row.id
    assert row.id not in (await stack.scheduler.stats(stack.model.id))["replicas"]


async def test_what_does_not_stop_is_killed_and_written_off(stack: Stack) -> None:
    await stack.submit("r1")
    await stack.controller.tick()
    row = await stack.row()
    await stack.scheduler.release(stack.ticket("r1"), "", 5)
    await idle_for(stack, 1000)
    await stack.controller.tick()
    await stack.controller.tick()
    assert stack.names.killed == []
    stack.clock.ahead_s += 51  # drain and grace have passed
    await stack.controller.tick()
    assert stack.names.killed == [row.id]
    await stack.controller.tick()
    ended = await get_replica(stack.db, row.id)
    assert ended is not None
    assert ended.observed == Observed.LOST


async def test_processes_that_no_row_knows_are_killed(stack: Stack) -> None:
    stack.names.processes = {"rep_orphan": stack.model.id, "rep_stranger": "mod_gone"}
    await stack.controller.tick()
    assert stack.names.killed == ["rep_stranger"]
    stack.clock.ahead_s += 16  # the process does not end by itself
    await stack.controller.tick()
    assert stack.names.killed == ["rep_stranger", "rep_orphan"]
    assert stack.names.processes == {}


async def test_what_only_the_queue_still_knows_is_taken_out(stack: Stack) -> None:
    await stack.beat("rep_ghost")
    await stack.controller.tick()
    assert (await stack.scheduler.stats(stack.model.id))["replicas"] == {}


async def test_a_new_controller_adopts_what_runs(stack: Stack) -> None:
    await stack.submit("r1")
    await stack.controller.tick()
    row = await stack.row()
    await stack.ready(row)
    await stack.new_controller().tick()
    assert await stack.row() == await get_replica(stack.db, row.id)
    assert stack.names.killed == []
    assert list(stack.names.processes) == [row.id]


async def test_a_lost_queue_does_not_stop_replicas(stack: Stack, redis: Redis) -> None:
    await stack.submit("r1")
    await stack.controller.tick()
    row = await stack.row()
    await stack.ready(row)
    await redis.flushall()
    await stack.beat(row.id)
    await stack.controller.tick()
    assert (await stack.row()).desired == Desired.RUNNING


async def test_failed_starts_before_a_good_one_are_forgiven(stack: Stack) -> None:
    await stack.bounds(min_replicas=1)
    await stack.controller.tick()
    await observe(stack.db, (await stack.row()).id, Observed.FAILED)
    stack.names.processes.clear()
    async with stack.db.begin(SYSTEM) as connection:
        await connection.execute(text("UPDATE replicas SET ended_at = now() - interval '6 s'"))
    await stack.controller.tick()
    await stack.ready(await stack.row())
    assert (await recent_failures(stack.db, stack.model.id, 1800))[0] == 0


# The metering writer.


@pytest.fixture
async def acme(db: Database) -> Tenant:
    return await tenant(db, "acme")


def record(name: str, owner: Tenant | None, status: UsageStatus = UsageStatus.COMPLETED, tokens: int = 5) -> str:
    """The event of a request, as a gateway or the scheduler writes it."""
    found = UsageRecord(name, owner.id if owner else None, None, "base", "base", None, None, stream=True)
    found.start("rep_1", 1, 2)
    found.count({"prompt_tokens": 7, "completion_tokens": tokens, "prompt_tokens_details": {"cached_tokens": 3}})
    found.end(status)
    return found.event()


async def test_each_event_reaches_the_ledger_once(
    scheduler: Scheduler, redis: Redis, db: Database, controller_db: Database, acme: Tenant
) -> None:
    for name in ("r1", "r2", "r1"):
        await scheduler.record_event("p", record(name, acme))
    assert await write_events(redis, controller_db, "p") == 3
    assert await write_events(redis, controller_db, "p") == 0
    await scheduler.record_event("p", record("r1", acme, tokens=999))
    await write_events(redis, controller_db, "p")
    events = {event.request_id: event for event in await list_events(db, acme.id)}
    assert set(events) == {"r1", "r2"}
    one = events["r1"]
    assert (one.prompt_tokens, one.cached_tokens, one.completion_tokens, one.status) == (7, 3, 5, "completed")
    assert (one.queue_ms, one.load_ms, one.replica_id, one.stream) == (1, 2, "rep_1", True)


@pytest.mark.parametrize(
    ("words", "status", "tokens"),
    [
        ([(UsageStatus.LOST, 2), (UsageStatus.COMPLETED, 9)], "completed", 9),
        ([(UsageStatus.COMPLETED, 9), (UsageStatus.LOST, 2)], "completed", 9),
        ([(UsageStatus.LOST, 2), (UsageStatus.ABORTED, 4), (UsageStatus.LOST, 2)], "aborted", 4),
        ([(UsageStatus.COMPLETED, 9), (UsageStatus.FAILED, 1)], "completed", 9),
        ([(UsageStatus.LOST, 2)], "lost", 2),
    ],
)
@pytest.mark.parametrize("together", [True, False])
async def test_a_later_word_replaces_only_a_lost_one(
    scheduler: Scheduler,
    redis: Redis,
    db: Database,
    controller_db: Database,
    acme: Tenant,
    words: list[tuple[UsageStatus, int]],
    status: str,
    tokens: int,
    together: bool,
) -> None:
    for word, count in words:
        await scheduler.record_event("p", record("r1", acme, word, count))
        if not together:
            await write_events(redis, controller_db, "p")
    await write_events(redis, controller_db, "p")
    [event] = await list_events(db, acme.id)
    assert (event.status, event.completion_tokens) == (status, tokens)


async def test_what_cannot_be_read_is_kept_aside(
    scheduler: Scheduler, redis: Redis, db: Database, controller_db: Database, acme: Tenant
) -> None:
    bad = ["", "nonsense", "3", "{}", "[]", record("r9", acme).replace("completed", "finished")]
    for text_ in [bad[0], record("r1", acme), *bad[1:]]:
        await scheduler.record_event("p", text_)
    assert await write_events(redis, controller_db, "p") == len(bad) + 1
    assert [event.request_id for event in await list_events(db, acme.id)] == ["r1"]
    kept: Any = await redis.xrange("lmaas:{p}:usage:bad")
    assert [fields["event"] for _, fields in kept] == bad
    assert await redis.xlen("lmaas:{p}:usage") == 0


async def test_probes_belong_to_nobody(scheduler: Scheduler, redis: Redis, db: Database, controller_db: Database) -> None:
    await scheduler.record_event("p", record("probe_1", None, UsageStatus.PROBE))
    await write_events(redis, controller_db, "p")
    [event] = await list_events(db, OPERATOR)
    assert (event.tenant_id, event.status) == (None, "probe")


async def test_a_backlog_is_moved_in_portions(
    scheduler: Scheduler, redis: Redis, db: Database, controller_db: Database, acme: Tenant
) -> None:
    async with redis.pipeline() as pipeline:
        for number in range(EVENTS_AT_ONCE + 7):
            pipeline.xadd("lmaas:{p}:usage", {"event": record(f"r{number}", acme)})
        await pipeline.execute()
    assert [await write_events(redis, controller_db, "p") for _ in range(3)] == [EVENTS_AT_ONCE, 7, 0]
    assert len(await list_events(db, acme.id)) == EVENTS_AT_ONCE + 7


async def test_one_event_that_the_ledger_refuses_does_not_stop_the_others(
    scheduler: Scheduler, redis: Redis, db: Database, controller_db: Database, acme: Tenant
) -> None:
    await scheduler.record_event("p", record("r1", acme))
    await scheduler.record_event("p", record("r2", acme).replace(acme.id, "ten_nobody"))
    await scheduler.record_event("p", record("r3", acme))
    assert await write_events(redis, controller_db, "p") == 3
    assert {event.request_id for event in await list_events(db, acme.id)} == {"r1", "r3"}
    assert await redis.xlen("lmaas:{p}:usage:bad") == 1
