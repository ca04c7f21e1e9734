"""A controller and background work: lines of batches in Postgres start, keep and stop engines."""

from dataclasses import replace

import pytest
from msgspec import structs

from lmaas.control.background import QUIET_S
from lmaas.control.controller import Controller
from lmaas.scheduling.client import Bounds
from lmaas.states import Desired
from lmaas.store.pools import pool_states_by_id
from lmaas.store.scopes import SYSTEM
from lmaas.store.tables import batch_pools, batches, pool_states
from lmaas.store.tenants import Tenant
from tests.integration.control.test_controller import Stack, stack
from tests.integration.store.build import tenant, waiting_batch

__all__ = ["stack"]  # a fixture
DAY_S = 86_400.0


@pytest.fixture
async def acme(stack: Stack) -> Tenant:
    return await tenant(stack.db, "acme")


async def batch(stack: Stack, acme: Tenant, lines: int, tokens: int, due_s: float = DAY_S, *, has_runner: bool = True) -> None:
    pools = {stack.model.id: (lines, tokens)}
    await waiting_batch(stack.db, acme, due_s=due_s, pools=pools, runner_seen_s_ago=0 if has_runner else None)


async def end_batches(stack: Stack) -> None:
    async with stack.db.begin(SYSTEM) as connection:
        await connection.execute(batch_pools.update().values(pending=0, pending_tokens=0))
        await connection.execute(batches.update().values(status="finalizing"))


async def reason(stack: Stack) -> str:
    await stack.controller.tick()
    return stack.controller.decisions[stack.model.id].reason


async def test_a_few_lines_start_nothing(stack: Stack, acme: Tenant) -> None:
    await batch(stack, acme, 5, 500)
    assert "5 lines of background work may run when an engine is warm" in await reason(stack)
    assert await stack.rows() == []


async def test_enough_lines_start_one_replica_which_stops_after_them(stack: Stack, acme: Tenant) -> None:
    await batch(stack, acme, 500, 50_000)
    assert "500 lines of background work would keep an engine busy for 8 min, which pays for its start" in await reason(stack)
    await stack.ready(await stack.row())
    assert "kept for 500 lines of background work" in await reason(stack)
    await end_batches(stack)
    await stack.controller.tick()
    assert (await stack.row()).desired == Desired.RUNNING
    stack.clock.ahead_s += QUIET_S
    assert "no request yet" in await reason(stack)
    assert (await stack.row()).desired == Desired.STOPPED


async def test_a_deadline_starts_one(stack: Stack, acme: Tenant) -> None:
    await batch(stack, acme, 1, 100, due_s=1000)
    assert "a deadline requires 1 replica now" in await reason(stack)
    assert len(await stack.rows()) == 1
    figures = stack.controller.decisions[stack.model.id].background
    assert (figures.lines, figures.tokens, figures.replicas) == (1, 100, 1)
    assert figures.due_s is not None
    assert 900 < figures.due_s <= 1000
    assert stack.controller.statuses[stack.model.id].background == figures


async def test_background_tickets_are_no_demand(stack: Stack, acme: Tenant) -> None:
    await batch(stack, acme, 500, 50_000)
    await stack.controller.tick()
    replica = await stack.row()
    await stack.ready(replica)
    for number in range(20):
        line = structs.replace(stack.ticket(f"l{number}"), background=True)
        await stack.scheduler.submit(line, Bounds(100, 10_000))
    assert "kept for 520 lines of background work" in await reason(stack)
    assert len(await stack.rows()) == 1
    pool = stack.controller.statuses[stack.model.id]
    assert (pool.queued, pool.load, pool.background.queued, pool.background.running, pool.background.reserve) == (0, 0, 18, 2, 0)
    # An interactive request runs beside them, and is the only demand.
    await stack.submit("r1")
    assert "0.5 requests at once" in await reason(stack)
    pool = stack.controller.statuses[stack.model.id]
    assert (pool.queued, pool.load, pool.background.running, pool.background.put_back, pool.background.reserve) == (0, 1, 2, 0, 0)
    assert stack.controller.decisions[stack.model.id].background.replicas == 0


async def test_without_a_runner_nothing_starts(stack: Stack, acme: Tenant) -> None:
    await batch(stack, acme, 500, 50_000, has_runner=False)
    assert "500 lines of background work wait for a job runner" in await reason(stack)
    assert await stack.rows() == []


async def test_an_operator_may_start_an_engine_for_any_line(stack: Stack, acme: Tenant) -> None:
    settings = replace(stack.settings, background_worth_starts=0.0)
    stack.controller = Controller(settings, stack.controller_db, stack.scheduler, stack.names, stack.clock)
    await batch(stack, acme, 1, 1)
    assert "1 line of background work would keep an engine busy for 0 s" in await reason(stack)
    assert len(await stack.rows()) == 1


async def test_the_next_controller_knows_the_throughput(stack: Stack, acme: Tenant) -> None:
    await batch(stack, acme, 5, 500)
    await stack.controller.tick()
    [state] = (await pool_states_by_id(stack.db)).values()
    decision = state.decision | {"background": state.decision["background"] | {"tokens_per_s": 250.0}}
    async with stack.db.begin(SYSTEM) as connection:
        await connection.execute(pool_states.update().values(decision=decision))
    stack.controller = stack.new_controller()
    await stack.controller.tick()
    assert stack.controller.decisions[stack.model.id].background.tokens_per_s == 250.0
