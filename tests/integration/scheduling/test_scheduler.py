"""The scheduler's functions inside a real Valkey: turns, slots, adapters."""

import asyncio

import pytest

from lmaas.scheduling.client import Bounds, Scheduler
from tests.integration.scheduling.build import KEY, Pool, beat, ticket


@pytest.fixture
def pool(scheduler: Scheduler) -> Pool:
    return Pool(scheduler)


async def order_of_grants(pool: Pool) -> list[str]:
    """Release running tickets until none is left; return the tickets in the order of their grants."""
    order: list[str] = []
    while placed := await pool.placed():
        assert len(placed) == 1
        name = placed.pop()
        order.append(name)
        assert await pool.release(int(name[1:])) == [True]
        await pool.check()
    return order


async def test_a_free_slot_is_granted_in_the_reply(scheduler: Scheduler) -> None:
    await scheduler.heartbeat("p", "x", beat())
    reply = await scheduler.submit(ticket(1), Bounds(10, 10_000))
    assert (reply["state"], reply["replica"], reply["url"]) == ("granted", "x", "http://engine")
    assert reply["queue_ms"] < 1000
    assert reply["load_ms"] == 0


async def test_without_a_replica_it_queues_and_is_granted_when_one_is_ready(scheduler: Scheduler) -> None:
    assert (await scheduler.submit(ticket(1), Bounds(10, 10_000)))["state"] == "queued"
    assert (await scheduler.submit(ticket(2), Bounds(10, 10_000)))["position"] == 2
    await scheduler.heartbeat("p", "x", beat("starting"))
    assert (await scheduler.renew("p", [("r1", None)]))["tickets"][0]["state"] == "queued"
    await scheduler.heartbeat("p", "x", beat())
    assert [report["state"] for report in (await scheduler.renew("p", [("r1", None), ("r2", None)]))["tickets"]] == ["granted", "granted"]


async def test_the_first_ticket_of_an_empty_pool_signals_demand(pool: Pool) -> None:
    async with pool.redis.pubsub() as heard:
        await heard.subscribe("lmaas:control")
        await pool.submit(ticket(1))
        message = None
        while message is None:
            message = await heard.get_message(ignore_subscribe_messages=True, timeout=5)
        assert message["data"] == "demand"


async def test_tenants_take_turns_and_each_is_served_in_its_own_order(pool: Pool) -> None:
    await pool.beat(slots=1)
    await pool.submit(ticket(0, "first"))
    await pool.submit(*(ticket(number, "busy") for number in range(1, 11)))
    await pool.submit(ticket(21, "quiet"), ticket(22, "quiet"))
    assert await order_of_grants(pool) == ["r0", "r1", "r21", "r2", "r22", *(f"r{number}" for number in range(3, 11))]


async def test_a_tenant_that_comes_back_does_not_jump_the_queue_twice(pool: Pool) -> None:
    await pool.beat(slots=1)
    await pool.submit(ticket(1, "busy"), ticket(2, "busy"), ticket(3, "busy"))
    await pool.submit(ticket(11, "other"))
    await pool.release(1)
    assert await pool.placed() == {"r11"}
    await pool.submit(ticket(12, "other"))
    await pool.release(11)
    assert await pool.placed() == {"r2"}


@pytest.mark.parametrize(
    ("slots", "weights", "granted"),
    [
        (2, [1, 1, 1], {"r0", "r1"}),
        (4, [3, 2, 1], {"r0", "r2"}),
        (4, [4, 1], {"r0"}),
        (4, [9, 1], {"r0"}),  # more slots than a replica has: all of it
        (4, [1, 9], {"r0"}),
    ],
)
async def test_a_ticket_takes_as_many_slots_as_sequences(pool: Pool, slots: int, weights: list[int], granted: set[str]) -> None:
    await pool.beat(slots=slots)
    await pool.submit(*(ticket(number, f"t{number}", weight=weight) for number, weight in enumerate(weights)))
    assert await pool.placed() == granted
    await pool.check()


async def test_a_heavy_ticket_is_not_passed_over_for_ever(pool: Pool) -> None:
    await pool.beat(slots=2)
    await pool.submit(ticket(1, "light"), ticket(2, "light"))
    await pool.submit(ticket(0, "heavy", weight=2))
    numbers = iter(range(3, 500))
    running = {1, 2}
    passed = 0
    while True:
        number = next(numbers)
        await pool.submit(ticket(number, f"light{number}"))
        await pool.release(min(running))
        running.remove(min(running))
        placed = {int(name[1:]) for name in await pool.placed()}
        if not placed - running:
            break  # no ticket passes it any more
        running = placed
        passed += 1
        assert passed <= 68
    # Twice the turns of a fair order: one ticket of each of the two tenants that wait.
    assert passed == 64 + 2 * 2
    await pool.release(*running)
    assert await pool.placed() == {"r0"}
    await pool.check()


async def test_a_full_queue_refuses_only_its_own_tenant(pool: Pool) -> None:
    assert await pool.submit(ticket(1), ticket(2), ticket(3), max_queued=2) == ["queued", "queued", "refused"]
    assert await pool.submit(ticket(4, "b"), max_queued=2) == ["queued"]
    assert "r3" not in await pool.tickets()
    await pool.beat(slots=4)
    assert await pool.submit(ticket(3), max_queued=2) == ["granted"]


async def test_submit_is_idempotent(pool: Pool) -> None:
    assert await pool.submit(ticket(1), ticket(1), max_queued=1) == ["queued", "queued"]
    await pool.beat()
    assert await pool.submit(ticket(1)) == ["granted"]
    assert (await pool.replicas())["x"]["load"] == 1
    await pool.check()


async def test_many_submitters_at_once_share_one_slot(scheduler: Scheduler, pool: Pool) -> None:
    await pool.beat(slots=1)
    replies = await asyncio.gather(*(scheduler.submit(ticket(number, f"t{number % 3}"), Bounds(100, 10_000)) for number in range(30)))
    assert sorted(reply["state"] for reply in replies) == ["granted"] + ["queued"] * 29
    waiting = [(f"r{number}", None) for number, reply in enumerate(replies) if reply["state"] == "queued"]
    reports = (await scheduler.renew("p", waiting))["tickets"]
    assert sorted(report["position"] for report in reports) == list(range(1, 30))
    await pool.check()


async def test_a_ticket_waits_where_its_adapter_loads(scheduler: Scheduler, pool: Pool) -> None:
    await pool.beat()
    assert await pool.submit(ticket(1, adapter="A"), ticket(2, adapter="A")) == ["loading", "loading"]
    assert (await pool.beat())["loads"] == {"A": "src/A"}
    assert await pool.submit(ticket(3)) == ["queued"]  # the slots are taken
    assert await scheduler.loaded("p", "x", "A") == 2
    assert await scheduler.loaded("p", "x", "A") == 0
    assert await pool.states() == {"r1": "granted", "r2": "granted", "r3": "queued"}
    assert (await pool.beat())["loads"] == {}
    await pool.check()


async def test_an_adapter_that_does_not_load_fails_only_its_own(scheduler: Scheduler, pool: Pool) -> None:
    await pool.beat(slots=3, adapter_slots=2)
    await pool.submit(ticket(1, adapter="A"), ticket(2, adapter="B"), ticket(3, "b", adapter="A"), ticket(4, "c"))
    assert await pool.states() == {"r1": "loading", "r2": "loading", "r3": "loading", "r4": "queued"}
    assert await scheduler.load_failed("p", "x", "A", "its files are missing") == 2
    assert await pool.states() == {"r1": "load_failed", "r2": "loading", "r3": "load_failed", "r4": "granted"}
    await pool.check()
    assert await pool.release(1, 3) == [True, True]
    await pool.check()
    assert (await pool.beat(slots=3, adapter_slots=2))["loads"] == {"B": "src/B"}


async def test_a_ticket_released_while_it_loads_is_not_granted(scheduler: Scheduler, pool: Pool) -> None:
    await pool.beat()
    await pool.submit(ticket(1, adapter="A"))
    await pool.release(1)
    await pool.check()
    assert await scheduler.loaded("p", "x", "A") == 0
    assert await pool.submit(ticket(2, adapter="A")) == ["granted"]


async def test_without_an_adapter_slot_others_pass_until_one_is_emptied(pool: Pool) -> None:
    await pool.beat(slots=2, adapter_slots=1, resident=("A", "B"))
    await pool.submit(ticket(0, "a", adapter="A"))
    assert await pool.submit(ticket(1, "b", adapter="B")) == ["queued"]  # a slot is free, but no adapter slot
    passed = 0
    for number in range(2, 200):
        [state] = await pool.submit(ticket(number, f"t{number}", adapter="A"))
        if state == "queued":
            break
        passed += 1
        await pool.release(number)
    assert passed == 32 + 2 * 2
    # Tickets that do not delay it continue for as long as the slot takes to be empty.
    for number in range(300, 400):
        assert await pool.submit(ticket(number, f"t{number}")) == ["granted"]
        await pool.release(number)
    await pool.release(0)
    assert await pool.placed() == {"r1"}
    await pool.check()


async def test_one_that_needs_a_whole_replica_does_not_stop_the_others(pool: Pool) -> None:
    for name in ("x", "y"):
        await pool.beat(name, slots=2)
    await pool.submit(ticket(1, "a"), ticket(2, "a"))
    await pool.submit(ticket(0, "heavy", weight=2))
    for number in range(10, 110):
        assert await pool.submit(ticket(number, f"t{number}")) == ["granted"]
        await pool.release(number)
    # One replica takes no more tickets until it is empty.
    assert await pool.submit(ticket(200, "b"), ticket(201, "c")) == ["granted", "queued"]
    free = next(name for name, each in (await pool.replicas()).items() if each["load"] == 1)
    [last] = [name for name, each in (await pool.tickets()).items() if each.get("replica") == free]
    await pool.release(int(last[1:]))
    assert {name for name, each in (await pool.tickets()).items() if each.get("replica") == free} == {"r0"}
    await pool.check()


async def test_a_request_of_the_base_model_that_waits_keeps_no_adapter_slot(pool: Pool) -> None:
    await pool.beat(slots=3, adapter_slots=1, resident=("A",))
    await pool.submit(ticket(0, "a", adapter="A"))
    assert await pool.submit(ticket(1, "a", weight=3)) == ["queued"]
    for number in range(2, 2 + 63):  # nearly as often as it may be passed over
        assert await pool.submit(ticket(number, f"t{number}", adapter="A")) == ["granted"]
        await pool.release(number)


async def test_the_replica_where_the_adapter_runs_is_preferred_then_where_it_is_resident(scheduler: Scheduler, pool: Pool) -> None:
    await pool.beat("none", slots=4, adapter_slots=2)
    await pool.beat("resident", slots=4, adapter_slots=2, resident=("A",))
    first = await scheduler.submit(ticket(1, adapter="A"), Bounds(10, 10_000))
    assert (first["state"], first["replica"]) == ("granted", "resident")
    # Busier than the others, but it already runs the adapter.
    await pool.beat("also", slots=4, adapter_slots=2, resident=("A",))
    second = await scheduler.submit(ticket(2, adapter="A"), Bounds(10, 10_000))
    assert second["replica"] == "resident"
    # The base model goes to the least loaded.
    assert (await scheduler.submit(ticket(3), Bounds(10, 10_000)))["replica"] != "resident"
    # A full replica is not preferred.
    await scheduler.submit(ticket(4, adapter="A"), Bounds(10, 10_000))
    await scheduler.submit(ticket(5, adapter="A"), Bounds(10, 10_000))
    assert (await scheduler.submit(ticket(6, adapter="A"), Bounds(10, 10_000)))["replica"] == "also"
    await pool.check()


async def test_the_least_loaded_of_equals(scheduler: Scheduler, pool: Pool) -> None:
    for name in ("x", "y", "z"):
        await pool.beat(name, slots=2)
    replicas = [(await scheduler.submit(ticket(number), Bounds(10, 10_000)))["replica"] for number in range(6)]
    assert sorted(replicas[:3]) == sorted(replicas[3:]) == ["x", "y", "z"]


@pytest.mark.parametrize("state", ["starting", "draining", "stopped"])
async def test_only_a_ready_replica_gets_work(pool: Pool, state: str) -> None:
    await pool.beat(state=state)
    assert await pool.submit(ticket(1)) == ["queued"]
    await pool.check()


async def test_an_adapter_is_evicted_only_when_nothing_runs_with_it(scheduler: Scheduler, pool: Pool) -> None:
    await pool.beat(resident=("A",))
    await pool.submit(ticket(1, adapter="A"))
    assert not await scheduler.evict("p", "x", "A")
    await pool.release(1)
    assert (await pool.beat())["used"] == {}, "no ticket has to make room"
    assert await pool.submit(ticket(3, adapter="B")) == ["loading"]
    assert "A" in (await pool.beat())["used"]
    await pool.release(3)
    assert await scheduler.evict("p", "x", "A")
    assert "A" not in (await pool.beat())["used"]
    assert await pool.submit(ticket(2, adapter="A")) == ["loading"]
    assert not await scheduler.evict("p", "x", "A")
    assert not await scheduler.evict("p", "nobody", "A")


async def test_release_of_an_unknown_ticket_still_records_its_event(scheduler: Scheduler, pool: Pool) -> None:
    assert await scheduler.release(ticket(1), '{"request_id": "r1"}', 5) is False
    assert await pool.events() == [{"request_id": "r1"}]
    await pool.check()


async def test_the_estimate_follows_run_times_and_the_start_of_engines(scheduler: Scheduler, pool: Pool) -> None:
    cold = (await scheduler.submit(ticket(1), Bounds(10, 10_000)))["wait_ms"]
    assert 20_000 <= cold <= 24_000
    await pool.beat("x", state="starting")
    assert 1_000 <= (await scheduler.renew("p", [("r1", None)]))["tickets"][0]["wait_ms"] <= cold
    await pool.beat("x", slots=1)
    busy = (await scheduler.submit(ticket(2), Bounds(10, 10_000)))["wait_ms"]
    assert 1_900 <= busy <= 2_000
    for number in range(10, 60):
        await scheduler.submit(ticket(number, f"t{number}"), Bounds(10, 10_000))
        await scheduler.release(ticket(number), "", 100)
    assert (await scheduler.submit(ticket(4), Bounds(10, 10_000)))["wait_ms"] < busy


async def test_stats_tell_demand(scheduler: Scheduler, pool: Pool) -> None:
    await pool.beat("x", slots=2, resident=("A",))
    await pool.submit(ticket(1, adapter="A"), ticket(2, adapter="B"), ticket(3, weight=2))
    stats = await scheduler.stats("p")
    assert (stats["queued"], stats["load"]) == (2, 1)
    assert stats["idle_ms"] < 5000
    facts = stats["replicas"]["x"]
    assert {name: facts[name] for name in ("state", "load", "slots", "resident", "running")} == {
        "state": "ready",
        "load": 1,
        "slots": 2,
        "resident": 1,
        "running": 1,
    }
    assert facts["beat_ms"] < 5000
    assert await pool.redis.exists(f"{KEY}:tickets")


async def test_a_long_queue_is_patient_and_a_short_one_beside_it_is_not(pool: Pool) -> None:
    await pool.beat(slots=2, adapter_slots=1, resident=("A", "B", "C"))
    await pool.submit(ticket(0, "a", adapter="A"))
    await pool.submit(*(ticket(number, "many", adapter="B") for number in range(1, 21)), ticket(30, "one", adapter="C"))
    passed = 0
    for number in range(100, 300):
        [state] = await pool.submit(ticket(number, "a", adapter="A"))
        if state == "queued":
            break
        passed += 1
        await pool.release(number)
    # The first had its turn. Then the one ticket, of three tenants that wait, is passed over no more; the twenty would have let ten times
    # as many go by.
    assert passed == 1 + 32 + 2 * 3
    # The empty slot goes to the first ticket in the order of service.
    await pool.release(0)
    assert await pool.placed() == {"r1"}
    await pool.check()
