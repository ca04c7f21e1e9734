"""A gateway's open tickets, with a real Valkey."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from lmaas.errors import AdapterUnavailable, EngineFailed, LmaasError, OverLimit, Unavailable
from lmaas.scheduling import leases as leases_module
from lmaas.scheduling.client import Bounds, LimitedScope, Scheduler, Seed, gateway_channel
from lmaas.scheduling.leases import Leases, OpenTicket
from lmaas.scheduling.states import RetryReason
from tests.integration.scheduling.build import Pool, Room, Used, ids, opened, quick, ticket
from tests.support.conditions import until


@pytest.fixture
def pool(scheduler: Scheduler) -> Pool:
    return Pool(scheduler)


@pytest.fixture
def leases(scheduler: Scheduler) -> Leases:
    return Leases(scheduler, "g")


@asynccontextmanager
async def running(leases: Leases) -> AsyncIterator[None]:
    """The leases, with their listener subscribed."""
    task = asyncio.create_task(leases.run())

    async def subscribed() -> bool:
        [(_, count)] = await leases.scheduler.redis.pubsub_numsub(gateway_channel(leases.gateway))
        return bool(count == 1)

    await until(subscribed, every_s=0.01)
    yield
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_lease_and_its_end(leases: Leases, pool: Pool) -> None:
    await pool.beat()
    used = Used()
    async with opened(leases, used=used) as one:
        lease = await one.wait(0)
        assert lease is not None
        assert (lease.replica, lease.url, lease.load_ms) == ("x", "http://engine", 0)
        assert leases.open_count == 1
        used.tokens = 7
    assert leases.open_count == 0
    assert await pool.events() == [{"request_id": "r1", "completion_tokens": 7}]
    assert await pool.tickets() == {}
    await pool.check()


@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError])
async def test_an_error_in_the_block_still_settles_once(leases: Leases, pool: Pool, error: type[BaseException]) -> None:
    await pool.beat()
    with pytest.raises(error):
        async with opened(leases):
            raise error
    assert await ids(pool) == ["r1"]
    assert await pool.tickets() == {}


async def test_a_request_cancelled_while_it_waits(leases: Leases, pool: Pool) -> None:
    entered = asyncio.Event()

    async def request() -> None:
        async with opened(leases) as one:
            entered.set()
            await one.wait(10)

    task = asyncio.create_task(request())
    await entered.wait()
    assert await pool.states() == {"r1": "queued"}
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await pool.tickets() == {}
    assert await ids(pool) == ["r1"]


async def test_past_the_deadline_there_was_no_capacity(leases: Leases, pool: Pool) -> None:
    with pytest.raises(Unavailable) as caught:  # noqa: PT012 (the block is what is tested)
        async with opened(leases, deadline_s=0.05) as one:
            assert (one.standing.phase, one.standing.position) == ("asked", 1)
            assert one.standing.wait_ms > 19_000
            assert await one.wait(0.01) is None
            await one.wait(10)
    assert caught.value.error_code == "no_capacity"
    assert caught.value.retry_after_s is not None
    assert 19 < caught.value.retry_after_s <= 120
    assert await pool.tickets() == {}
    assert await ids(pool) == ["r1"]


async def test_a_grant_is_pushed(leases: Leases, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases_module, "RENEW_EVERY_S", 1000.0)
    async with running(leases), opened(leases) as one:
        waiting = asyncio.create_task(one.wait(100))
        assert await pool.beat()
        lease = await asyncio.wait_for(waiting, 60)
        assert lease is not None
        assert lease.replica == "x"


async def test_a_grant_whose_push_was_lost_is_seen_at_the_next_renewal(leases: Leases, pool: Pool) -> None:
    async with opened(leases) as one:
        await pool.beat()
        assert await one.wait(0) is None
        await leases.renew()
        assert (await one.wait(0)) is not None


async def test_renewal_keeps_tickets_alive_and_tells_progress(scheduler: Scheduler, leases: Leases, pool: Pool) -> None:
    await pool.beat()
    used = Used()
    async with quick(scheduler, LEASE_MS=400), opened(leases, used=used):
        await scheduler.submit(ticket(2, gateway="dead"), Bounds(10, 10_000))

        async def other_is_gone() -> bool:
            used.tokens += 1
            await leases.renew()
            return "r2" not in await pool.states()

        await until(other_is_gone, every_s=0.02)
        assert (await pool.states())["r1"] == "granted"
        assert await pool.redis.hget("lmaas:{p}:progress", "r1") == f"[5,0,{used.tokens}]"


async def test_a_woken_wait_returns(leases: Leases) -> None:
    async with opened(leases) as one:
        waiting = asyncio.create_task(one.wait(10))
        one.wake()
        assert await asyncio.wait_for(waiting, 60) is None


async def test_a_lost_engine_is_replaced_once(leases: Leases, pool: Pool) -> None:
    await pool.beat("x")
    with pytest.raises(EngineFailed):  # noqa: PT012 (the block is what is tested)
        async with opened(leases) as one:
            lease = await one.wait(0)
            assert lease is not None
            await one.retry(lease, RetryReason.ENGINE)
            assert one.lease is None
            await pool.beat("y")
            await leases.renew()
            second = await one.wait(1)
            assert second is not None
            assert second.replica == "y"
            await one.retry(second, RetryReason.ENGINE)
            await one.wait(1)
    assert await ids(pool) == ["r1"]
    await pool.check()


async def test_late_news_of_an_earlier_delivery_is_ignored(leases: Leases, pool: Pool) -> None:
    await pool.beat("x")
    async with opened(leases) as one:
        lease = await one.wait(0)
        assert lease is not None
        await one.retry(lease, RetryReason.ENGINE)
        revoked: list[int] = []
        one.on_revoked(lambda: revoked.append(1))
        late = {"state": "granted", "attempts": 0, "replica": "x", "url": "http://old", "queue_ms": 0, "load_ms": 0}
        assert one.apply(late)
        assert one.apply({"state": "revoked", "attempts": 0})
        assert await one.wait(0) is None
        assert revoked == []
        assert one.apply(late | {"attempts": 1, "url": "http://new"})
        assert one.apply({"state": "revoked", "attempts": 1})
        again = await one.wait(0)
        assert again is not None
        assert again.url == "http://new"
        assert revoked == [1]


async def test_a_revoked_lease_is_told(leases: Leases, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases_module, "RENEW_EVERY_S", 1000.0)
    await pool.beat("x")
    async with running(leases), opened(leases) as one:
        await one.wait(0)
        revoked = asyncio.Event()
        one.on_revoked(revoked.set)
        await pool.scheduler.deregister("p", "x")
        await asyncio.wait_for(revoked.wait(), 60)


async def test_an_adapter_that_does_not_load(leases: Leases, pool: Pool) -> None:
    await pool.beat()
    async with running(leases):
        with pytest.raises(AdapterUnavailable, match="its files are missing"):  # noqa: PT012 (the block is what is tested)
            async with opened(leases, ticket(1, adapter="A")) as one:
                waiting = asyncio.create_task(one.wait(10))
                await pool.scheduler.load_failed("p", "x", "A", "its files are missing")
                await waiting
    assert await ids(pool) == ["r1"]
    await pool.check()


async def test_a_failed_load_whose_push_was_lost(leases: Leases, pool: Pool) -> None:
    await pool.beat()
    with pytest.raises(AdapterUnavailable):  # noqa: PT012 (the block is what is tested)
        async with opened(leases, ticket(1, adapter="A")) as one:
            await pool.scheduler.load_failed("p", "x", "A", "broken")
            await leases.renew()
            await one.wait(1)


async def test_a_full_queue_refuses_and_nothing_was_accepted(leases: Leases, pool: Pool) -> None:
    async with opened(leases, max_queued=1):
        with pytest.raises(OverLimit) as caught:
            async with opened(leases, ticket(2), max_queued=1):
                pytest.fail("it was refused")
        assert caught.value.error_code == "refused"
        assert leases.open_count == 1
    assert await ids(pool) == ["r1"]


async def test_a_cancelled_submit_leaves_nothing_behind(scheduler: Scheduler, leases: Leases, pool: Pool) -> None:
    await pool.beat()
    submit = scheduler.submit

    async def slow(*args: Any, **more: Any) -> dict[str, Any]:
        await submit(*args, **more)
        await asyncio.sleep(10)
        return {}

    scheduler.submit = slow  # type: ignore[method-assign]
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1), opened(leases):
            pytest.fail("it was not accepted")
    assert await pool.tickets() == {}
    assert await ids(pool) == []
    assert leases.open_count == 0


async def test_a_ticket_that_is_not_accepted_yet_is_not_put_back_past_its_limits(leases: Leases, pool: Pool) -> None:
    """While the month's figures are read, the scheduler does not know the ticket. A renewal must not mistake that for lost memory."""
    asked, answered = asyncio.Event(), asyncio.Event()

    class Slow(Room):
        async def seeds(self, scopes: Sequence[str], month: int) -> dict[str, Seed]:
            asked.set()
            await answered.wait()
            return {scope: Seed(month, 1_000, 0) for scope in scopes}

    await pool.beat()
    limited = msgspec.structs.replace(ticket(1), limits=(LimitedScope("a", "tenant", tokens_per_month=10),))

    async def request() -> None:
        async with leases.open(limited, Used(), Slow(Bounds(10, 10_000)), deadline_s=10):
            pytest.fail("it is over its month's tokens")

    task = asyncio.create_task(request())
    await asked.wait()
    await asyncio.sleep(0.01)  # an accepted ticket has waited for some time when it is put back
    await leases.renew()
    assert await pool.tickets() == {}
    answered.set()
    with pytest.raises(OverLimit, match="limited"):
        await task
    assert await pool.tickets() == {}
    assert leases.open_count == 0


async def test_a_grant_that_is_told_before_the_ticket_was_heard_to_be_queued_is_not_lost(
    scheduler: Scheduler, leases: Leases, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases_module, "RENEW_EVERY_S", 1000.0)
    submit, granted = scheduler.submit, asyncio.Event()

    async def slow(*args: Any, **more: Any) -> dict[str, Any]:
        report = await submit(*args, **more)
        assert report["state"] == "queued"
        await pool.beat()
        await granted.wait()
        return report

    scheduler.submit = slow  # type: ignore[method-assign]
    apply = OpenTicket.apply

    def heard(self: OpenTicket, report: dict[str, Any]) -> bool:
        granted.set()
        return apply(self, report)

    monkeypatch.setattr(OpenTicket, "apply", heard)
    async with running(leases), asyncio.timeout(10), opened(leases) as one:
        lease = await one.wait(0)
        assert lease is not None
        assert lease.replica == "x"


async def test_drained_waits_for_open_tickets(leases: Leases, pool: Pool) -> None:
    await pool.beat()
    await asyncio.wait_for(leases.drained(), 60)
    async with opened(leases):
        draining = asyncio.create_task(leases.drained())
        await asyncio.sleep(0.1)
        assert not draining.done()
    await asyncio.wait_for(draining, 60)


async def test_many_requests_each_end_once(scheduler: Scheduler, leases: Leases, pool: Pool) -> None:
    await pool.beat(slots=3, adapter_slots=2, resident=("A", "B", "C"))
    outcomes: list[str] = []

    async def request(number: int) -> None:
        one = ticket(number, f"t{number % 4}", ("", "A", "B", "C")[number % 4])
        try:
            async with opened(leases, one, max_queued=100, deadline_s=5 if number % 7 else 0.01) as waiting:
                lease = await waiting.wait(10)
                assert lease is not None
                outcomes.append("ran")
        except LmaasError as error:
            outcomes.append(error.error_code)

    async with running(leases):
        await asyncio.gather(*(request(number) for number in range(60)))
        await asyncio.wait_for(leases.drained(), 60)
    assert len(outcomes) == 60
    assert set(outcomes) <= {"ran", "no_capacity"}
    assert outcomes.count("ran") >= 51
    assert sorted(await ids(pool)) == sorted(f"r{number}" for number in range(60))
    assert await pool.tickets() == {}
    await pool.check()
