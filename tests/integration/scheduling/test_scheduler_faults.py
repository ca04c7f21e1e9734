"""The scheduler's functions when gateways, engines, supervisors or Valkey itself fail."""

import asyncio
import json
from typing import Any

import pytest
from msgspec.structs import replace
from redis.asyncio import Redis

from lmaas.errors import Unavailable
from lmaas.scheduling.client import Bounds, Scheduler, gateway_channel
from lmaas.scheduling.states import RetryReason
from lmaas.types import TokenCounts
from tests.integration.scheduling.build import KEY, Pool, quick, ticket
from tests.support.conditions import until


@pytest.fixture
def pool(scheduler: Scheduler) -> Pool:
    return Pool(scheduler)


async def news(pool: Pool, count: int, act: Any, gateway: str = "g") -> list[dict[str, Any]]:
    """Return the messages to a gateway while `act` is awaited; wait for exactly `count` of them."""
    async with pool.redis.pubsub() as heard:
        await heard.subscribe(gateway_channel(gateway))
        while await heard.get_message(timeout=5) is None:
            pass  # the confirmation of the subscription
        await act
        found: list[dict[str, Any]] = []
        while len(found) < count:
            message = await heard.get_message(ignore_subscribe_messages=True, timeout=5)
            if message is not None:
                found.append(json.loads(message["data"]))
        return found


async def test_a_suspect_replica_gets_nothing_until_it_is_cleared(pool: Pool) -> None:
    await pool.beat(slots=4)
    await pool.submit(ticket(1))
    assert (await pool.retry(1))["state"] == "queued"
    assert (await pool.beat(slots=4))["suspect"] is True
    assert await pool.submit(ticket(2, "b")) == ["queued"]
    assert (await pool.beat(slots=4, cleared=True))["suspect"] is False
    assert await pool.states() == {"r1": "granted", "r2": "granted"}
    await pool.check()


async def test_a_retry_goes_elsewhere_at_once(pool: Pool) -> None:
    await pool.beat("x")
    await pool.submit(ticket(1))
    await pool.beat("y")
    reply = await pool.retry(1, "x")
    assert (reply["state"], reply["replica"], reply["attempts"]) == ("granted", "y", 1)
    await pool.check()


async def test_the_second_lost_engine_is_the_last(pool: Pool) -> None:
    await pool.beat("x")
    await pool.submit(ticket(1))
    await pool.beat("y")
    await pool.retry(1, "x")
    assert (await pool.retry(1, "y"))["state"] == "failed"
    # It is known until its gateway settles it, but holds nothing.
    assert (await pool.scheduler.renew("p", [("r1", None)]))["tickets"] == [{"state": "failed", "attempts": 2}]
    await pool.check()
    assert await pool.release(1) == [True]
    assert await pool.tickets() == {}
    assert (await pool.retry(1, "y"))["state"] == "unknown"


async def test_what_comes_back_goes_to_the_front_in_the_order_it_came_back(pool: Pool) -> None:
    await pool.beat(slots=2)
    await pool.submit(*(ticket(number) for number in range(1, 5)))
    for number in (2, 1):
        await pool.retry(number)
    assert await pool.redis.zrange(f"{KEY}:queue", 0, -1) == ["r2", "r1", "r3", "r4"]
    assert (await pool.retry(2))["position"] == 1  # nothing to give back
    await pool.beat(slots=1, cleared=True)
    assert await pool.placed() == {"r2"}


async def test_a_replica_that_lacks_the_adapter_loads_it_again(pool: Pool) -> None:
    await pool.beat(resident=("A",))
    await pool.submit(ticket(1, adapter="A"))
    assert (await pool.retry(1, reason=RetryReason.ADAPTER))["state"] == "loading"
    reply = await pool.beat()
    assert (reply["loads"], reply["suspect"]) == ({"A": "src/A"}, False)
    await pool.check()


async def test_an_expired_lease_is_charged_once_at_its_last_checkpoint(scheduler: Scheduler, pool: Pool) -> None:
    await pool.beat(slots=1, resident=("A",))
    async with quick(scheduler, LEASE_MS=300):
        await pool.submit(ticket(1, adapter="A"), ticket(2, "b", gateway="h"))
        await scheduler.renew("p", [("r1", TokenCounts(7, 2, 3))])
        await scheduler.renew("p", [("r1", TokenCounts(7, 2, 5))])

        async def others_turn() -> bool:
            reply = await scheduler.renew("p", [("r2", None)])  # its own gateway lives
            return bool(reply["tickets"][0]["state"] == "granted")

        await until(others_turn, every_s=0.02)
    for _ in range(3):
        await scheduler.stats("p")
    [event] = await pool.events()
    assert event["request_id"] == "r1"
    assert (event["status"], event["code"], event["replica_id"]) == ("lost", "gateway_lost", "x")
    assert (event["prompt_tokens"], event["cached_tokens"], event["completion_tokens"]) == (7, 2, 5)
    assert event["run_ms"] >= 250
    assert event["load_ms"] == 0
    assert await pool.states() == {"r2": "granted"}
    await pool.check()
    # The gateway was only slow: its own event comes later, and the ledger takes that one.
    assert await scheduler.release(ticket(1), '{"request_id": "r1"}', 5) is False
    assert len(await pool.events()) == 2


@pytest.mark.parametrize("adapter", ["", "A"])
async def test_an_expired_ticket_that_waits_or_loads_is_charged_nothing(scheduler: Scheduler, pool: Pool, adapter: str) -> None:
    if adapter:
        await pool.beat()
    async with quick(scheduler, LEASE_MS=50):
        await pool.submit(ticket(1, adapter=adapter))

        async def gone() -> bool:
            await scheduler.stats("p")
            return await pool.tickets() == {}

        await until(gone, every_s=0.02)
    [event] = await pool.events()
    assert (event["status"], event["completion_tokens"], event["run_ms"]) == ("lost", 0, 0)
    assert event["replica_id"] == ("x" if adapter else None)
    await pool.check()


async def test_a_quiet_replica_gets_no_new_work_and_then_loses_what_it_has(scheduler: Scheduler, pool: Pool) -> None:
    async with quick(scheduler, STALE_MS=300, GONE_MS=900):
        await pool.beat(slots=3, adapter_slots=2, resident=("A",))
        await pool.submit(ticket(1, adapter="A"), ticket(2, adapter="B"))

        async def stale() -> bool:
            return bool((await scheduler.stats("p"))["replicas"]["x"]["beat_ms"] > 300)

        await until(stale, every_s=0.01)
        assert await pool.submit(ticket(3, "b")) == ["queued"]

        async def gone() -> bool:
            return not (await scheduler.stats("p"))["replicas"]

        [message] = await news(pool, 1, until(gone, every_s=0.02))
        assert (message["id"], message["event"], message["attempts"]) == ("r1", "revoked", 0)
        assert (await pool.states())["r2"] == "queued"
        assert (await scheduler.renew("p", [("r1", None)]))["tickets"] == [{"state": "revoked", "attempts": 0}]
    await pool.beat("y", slots=3, adapter_slots=3)
    assert (await pool.retry(1, "x"))["state"] == "loading"
    assert await pool.states() == {"r1": "loading", "r2": "loading", "r3": "granted"}
    await pool.check()


async def test_deregister_requeues_what_loads_and_revokes_what_runs(pool: Pool) -> None:
    await pool.beat(slots=3, adapter_slots=2, resident=("A",))
    await pool.submit(ticket(1, adapter="A"), ticket(2, adapter="B"), ticket(3, "b"), ticket(4, "c"))
    messages = await news(pool, 2, pool.scheduler.deregister("p", "x"))
    assert sorted((message["id"], message["event"]) for message in messages) == [("r1", "revoked"), ("r3", "revoked")]
    assert (await pool.states())["r2"] == "queued"
    assert await pool.redis.zrange(f"{KEY}:queue", 0, -1) == ["r2", "r4"]
    await pool.scheduler.deregister("p", "x")
    await pool.beat("y", slots=4, adapter_slots=2)
    assert (await pool.tickets())["r2"]["attempts"] == 0  # it had not been delivered
    assert (await pool.retry(1, "x"))["attempts"] == 1
    await pool.check()


async def test_a_draining_replica_keeps_what_runs_and_nothing_else(pool: Pool) -> None:
    await pool.beat(slots=3, adapter_slots=2)
    await pool.submit(ticket(1), ticket(2, adapter="A"), ticket(3, adapter="A"))
    assert await pool.scheduler.drain("p", "x") == 1
    assert await pool.states() == {"r1": "granted", "r2": "queued", "r3": "queued"}
    reply = await pool.beat(state="ready", slots=3)  # was already on its way
    assert (reply["state"], reply["loads"]) == ("draining", {})
    assert await pool.submit(ticket(4, "b")) == ["queued"]
    assert await pool.scheduler.loaded("p", "x", "A") == 0
    await pool.check()
    await pool.release(1)
    assert await pool.scheduler.drain("p", "x") == 0
    assert await pool.scheduler.drain("p", "nobody") == -1


async def test_restore_after_the_server_has_lost_its_memory(scheduler: Scheduler, pool: Pool, redis: Redis) -> None:
    before = (await pool.beat(slots=2, adapter_slots=1))["epoch"]
    await pool.submit(ticket(1), ticket(2, adapter="A"))
    await redis.flushall()
    assert (await scheduler.renew("p", [("r1", TokenCounts(1, 1, 1))]))["tickets"] == [{"state": "unknown"}]
    assert await scheduler.restore(ticket(1), "x", waited_ms=5000, attempts=0) is False
    assert (await pool.beat(slots=2, adapter_slots=1, resident=("A",)))["epoch"] != before
    assert await scheduler.restore(ticket(1), "x", waited_ms=5000, attempts=0) is True
    assert await scheduler.restore(ticket(1), "x", waited_ms=5000, attempts=0) is True
    assert (await pool.replicas())["x"]["load"] == 1
    reply = await scheduler.submit(ticket(2, adapter="A"), Bounds(10, 10_000), waited_ms=5000)
    assert reply["state"] == "granted"
    assert 5000 <= reply["queue_ms"] < 7000
    await pool.check()
    assert await pool.release(1, 2) == [True, True]
    await pool.check()


@pytest.mark.parametrize("flush", [False, True], ids=["functions gone", "everything gone"])
async def test_the_library_is_installed_where_it_is_missing(scheduler: Scheduler, pool: Pool, redis: Redis, flush: bool) -> None:
    await redis.function_flush()
    if flush:
        await redis.flushall()
    replies = await asyncio.gather(*(pool.submit(ticket(number)) for number in range(5)))
    assert replies == [["queued"]] * 5
    await pool.check()


async def test_a_server_that_refuses_is_unavailable_and_somebody_hears_why(scheduler: Scheduler, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Unavailable):
        await scheduler.call("submit", "p", "nonsense")
    assert [record.levelname for record in caplog.records] == ["ERROR"]


async def test_an_older_library_is_not_called(scheduler: Scheduler, pool: Pool) -> None:
    await pool.submit(ticket(1))
    async with quick(scheduler, LEASE_MS=6001):
        await pool.submit(ticket(2))
    libraries: Any = await scheduler.redis.function_list()
    assert len({str(library) for library in libraries}) >= 2
    assert await pool.states() == {"r1": "queued", "r2": "queued"}


async def test_listening_goes_on_after_the_connection_was_cut(scheduler: Scheduler, redis: Redis) -> None:
    heard: list[str] = []

    async def listen() -> None:
        async for message in scheduler.listen("c"):
            heard.append(message)

    task = asyncio.create_task(listen())
    await until(lambda: heard == [""], every_s=0.01)
    await redis.client_kill_filter(_type="pubsub")
    await until(lambda: heard == ["", ""], every_s=0.01)  # a message may have been missed
    await redis.publish("c", "hello")
    await until(lambda: heard == ["", "", "hello"], every_s=0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_replica_that_comes_back_counts_only_what_it_runs_now(pool: Pool) -> None:
    await pool.beat(slots=4, resident=("A",))
    await pool.submit(ticket(1, adapter="A"))
    await pool.scheduler.deregister("p", "x")  # or: no message for half a minute
    await pool.beat(slots=4, resident=("A",))
    await pool.submit(ticket(2, adapter="A"))
    await pool.release(1)
    await pool.check()
    assert not await pool.scheduler.evict("p", "x", "A")


async def test_a_retry_that_was_sent_twice_counts_once(pool: Pool) -> None:
    await pool.beat("x")
    await pool.submit(ticket(1))
    await pool.beat("y")
    await pool.retry(1, "x")
    # The client library sends a call again if the connection was lost before the reply.
    reply = await pool.retry(1, "x", attempt=0)
    assert (reply["state"], reply["replica"], reply["attempts"]) == ("granted", "y", 1)
    # Meanwhile its supervisor has checked the engine.
    await pool.beat("x", cleared=True)
    await pool.retry(1, "x", attempt=0)
    assert (await pool.beat("x"))["suspect"] is False


async def test_a_restored_ticket_takes_no_more_than_its_replica_has(pool: Pool) -> None:
    await pool.beat(slots=4)
    assert await pool.scheduler.restore(ticket(1, weight=9), "x", waited_ms=0, attempts=0)
    await pool.check()


async def test_a_pool_without_a_request_does_not_know_for_how_long_it_has_been_idle(pool: Pool) -> None:
    await pool.beat()
    assert (await pool.scheduler.stats("p"))["idle_ms"] is None
    await pool.submit(replace(ticket(1), background=True))
    assert (await pool.scheduler.stats("p"))["idle_ms"] is None
    await pool.submit(ticket(2))
    assert (await pool.scheduler.stats("p"))["idle_ms"] < 5000


async def test_what_comes_back_is_next_although_its_tenant_had_its_turn(pool: Pool) -> None:
    await pool.beat(slots=1)
    await pool.submit(ticket(1, "a"), ticket(2, "b"))
    await pool.retry(1)
    await pool.beat(slots=1, cleared=True)
    assert await pool.placed() == {"r1"}


async def test_an_accepted_ticket_is_put_back_although_its_tenants_queue_is_full(pool: Pool) -> None:
    await pool.submit(ticket(1), max_queued=1)
    reply = await pool.scheduler.submit(ticket(2), Bounds(1, 10_000), waited_ms=3000)
    assert reply["state"] == "queued"


async def test_a_server_without_memory_is_unavailable(pool: Pool, redis: Redis) -> None:
    await pool.submit(ticket(1))
    await redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(Unavailable):
            await pool.submit(ticket(2))
        # Running tickets continue and end, which frees memory.
        await pool.scheduler.renew("p", [("r1", None)])
        await pool.scheduler.stats("p")
        assert await pool.scheduler.release(ticket(1), '{"request_id": "r1"}', 5)
        assert await pool.events() == [{"request_id": "r1"}]
    finally:
        await redis.config_set("maxmemory", 0)


async def test_a_ticket_that_did_not_fit_a_small_replica_takes_all_that_it_needs_of_a_large_one(pool: Pool) -> None:
    await pool.beat("small", slots=2)
    await pool.submit(ticket(1, weight=4))
    await pool.beat("large", slots=8)
    assert (await pool.retry(1, "small"))["replica"] == "large"
    assert (await pool.replicas())["large"]["load"] == 4
    await pool.check()


async def test_late_word_of_an_earlier_delivery_is_not_charged(scheduler: Scheduler, pool: Pool) -> None:
    await pool.beat()
    await pool.submit(ticket(1))
    await pool.retry(1)
    await scheduler.renew("p", [("r1", TokenCounts(7, 0, 90))])  # was sent before
    assert await pool.redis.hgetall(f"{KEY}:progress") == {}
    await pool.beat(cleared=True)
    await pool.release(1)
    assert await pool.redis.zscore(f"{KEY}:counters", "a") == 3  # its usage in the end


async def test_a_lost_ticket_that_failed_before_has_not_run_since(scheduler: Scheduler, pool: Pool) -> None:
    await pool.beat("x")
    await pool.submit(ticket(1))
    await pool.beat("y")
    await pool.retry(1, "x")
    await pool.retry(1, "y")
    assert {name: each.get("granted") for name, each in (await pool.tickets()).items()} == {"r1": None}


async def test_what_came_back_and_does_not_fit_does_not_bring_its_tenant_forward(pool: Pool) -> None:
    await pool.beat("x", slots=2)
    await pool.submit(ticket(1, "a", weight=2))
    await pool.beat("y", slots=2)
    await pool.submit(ticket(8, "c"), ticket(9, "c"))
    await pool.retry(1, "x")
    await pool.submit(ticket(2, "a"), ticket(3, "b"))
    await pool.redis.zadd(f"{KEY}:waiting", {"a": 100, "b": 5})
    await pool.release(8)
    assert await pool.placed() == {"r9", "r3"}  # there is no room for r1 yet, and a's turn is not before b's


async def test_what_comes_back_is_served_in_that_order_whoevers_it_is(pool: Pool) -> None:
    await pool.beat(slots=2)
    await pool.submit(ticket(1, "a"), ticket(2, "b"))
    for number in (2, 1):
        await pool.retry(number)
    await pool.beat(slots=1, cleared=True)
    assert await pool.placed() == {"r2"}


@pytest.mark.parametrize("end", ["drain", "deregister"])
async def test_what_was_loading_goes_back_in_the_order_in_which_it_came(pool: Pool, end: str) -> None:
    await pool.beat(slots=20, adapter_slots=4)
    await pool.submit(*(ticket(number, adapter="ABCD"[number % 4]) for number in range(10, 30)))
    await getattr(pool.scheduler, end)("p", "x")
    assert await pool.redis.zrange(f"{KEY}:front", 0, -1) == [f"r{number}" for number in range(10, 30)]


async def test_a_slot_that_a_refused_ticket_finds_free_is_given_out(scheduler: Scheduler, pool: Pool) -> None:
    await pool.beat(slots=1)
    async with quick(scheduler, LEASE_MS=100):
        await pool.submit(ticket(1, gateway="dead"), ticket(2))

        async def others_turn() -> bool:
            await pool.redis.zadd(f"{KEY}:expiry", {"r2": 10**15})  # its own gateway lives
            assert await pool.submit(ticket(3), max_queued=0) == ["refused"]
            return await pool.states() == {"r2": "granted"}

        await until(others_turn, every_s=0.02)
