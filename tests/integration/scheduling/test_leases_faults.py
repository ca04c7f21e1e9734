"""A gateway's open tickets while Valkey is away or loses its memory."""

import asyncio
import time
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from lmaas.errors import Unavailable
from lmaas.scheduling import leases as module
from lmaas.scheduling.client import Scheduler
from lmaas.scheduling.leases import Leases
from lmaas.scheduling.states import RetryReason
from tests.integration.scheduling.build import Pool, ids, opened, ticket


class Away(Scheduler):
    """A scheduler whose server is away while `away` is true. `released_tickets` has the tickets whose end it received."""

    away = False

    def __init__(self, redis: Redis) -> None:
        super().__init__(redis)
        self.released_tickets: list[str] = []

    async def call(self, function: str, pool: str, *args: bytes | str | int) -> Any:
        if self.away:
            raise Unavailable("away", code="queue_unavailable")
        if function == "release":
            self.released_tickets.append(str(args[0]))
        return await super().call(function, pool, *args)

    def send_release(self, *args: Any) -> "asyncio.Future[Any]":
        if not self.away:
            return super().send_release(*args)
        told: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        told.set_exception(RedisError("away"))
        return told


class Deaf(Away):
    """A scheduler that takes a ticket, but fails before it returns."""

    async def call(self, function: str, pool: str, *args: bytes | str | int) -> Any:
        answer = await super().call(function, pool, *args)
        if function == "submit":
            self.away = True
            raise Unavailable("away", code="queue_unavailable")
        return answer


@pytest.fixture
def pool(scheduler: Scheduler) -> Pool:
    return Pool(scheduler)


@pytest.fixture
def leases(scheduler: Scheduler) -> Leases:
    return Leases(scheduler, "g")


async def test_without_a_server_nothing_is_accepted(redis: Redis, pool: Pool) -> None:
    scheduler = Away(redis)
    leases = Leases(scheduler, "g")
    scheduler.away = True
    with pytest.raises(Unavailable):
        async with opened(leases):
            pytest.fail("it was not accepted")
    assert leases.open_count == 0
    await asyncio.wait_for(leases.drained(), 60)
    assert await ids(pool) == []


async def test_who_is_refused_does_not_wait_until_that_is_settled(redis: Redis) -> None:
    class Stalled(Away):
        """A scheduler that takes nothing, and whose releases hang instead of failing."""

        away = True

        def send_release(self, *args: Any) -> "asyncio.Future[Any]":
            return never

    never: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    leases = Leases(Stalled(redis), "g")
    async with asyncio.timeout(60):
        with pytest.raises(Unavailable):
            async with opened(leases):
                pytest.fail("it was not accepted")
    never.cancel()


async def test_what_could_not_be_settled_is_settled_later(redis: Redis, pool: Pool) -> None:
    scheduler = Away(redis)
    leases = Leases(scheduler, "g")
    await pool.beat()
    async with opened(leases):
        scheduler.away = True
    await leases.renew()
    assert await ids(pool) == []
    draining = asyncio.create_task(leases.drained())
    await asyncio.sleep(0.1)
    assert not draining.done()
    scheduler.away = False
    await asyncio.wait_for(draining, 60)
    assert await ids(pool) == ["r1"]
    assert await pool.tickets() == {}
    await leases.renew()
    assert await ids(pool) == ["r1"]


async def test_a_pool_that_takes_nothing_holds_up_no_other(redis: Redis) -> None:
    scheduler = Away(redis)
    leases = Leases(scheduler, "g")
    async with (
        opened(leases, msgspec.structs.replace(ticket(2), pool="whole")),
        opened(leases, msgspec.structs.replace(ticket(1), pool="damaged")),
    ):
        scheduler.away = True
    scheduler.away = False
    await redis.set("lmaas:{damaged}:usage", "no stream")
    await leases.renew()
    assert await redis.xlen("lmaas:{whole}:usage") == 1
    await redis.delete("lmaas:{damaged}:usage")
    await asyncio.wait_for(leases.drained(), 60)
    assert await redis.xlen("lmaas:{damaged}:usage") == 1


async def test_what_was_refused_while_the_server_is_away_is_kept_for_a_lease_at_most(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEASE_S", 0.05)
    scheduler = Away(redis)
    leases = Leases(scheduler, "g")
    scheduler.away = True
    refused: list[tuple[float, float]] = []
    until_s = time.monotonic() + 4 * module.LEASE_S
    while time.monotonic() < until_s:
        began = time.monotonic()
        with pytest.raises(Unavailable):
            async with opened(leases, ticket(len(refused))):
                pytest.fail("it was not accepted")
        await asyncio.sleep(0)  # the release is sent, and fails
        refused.append((began, time.monotonic()))
    scheduler.away = False
    monkeypatch.setattr(module, "LEASE_S", 60.0)  # however long the releases take now
    await leases.renew()
    kept = {f"r{number}" for number, (_, ended) in enumerate(refused) if ended >= refused[-1][0] - 0.05}
    assert 0 < len(scheduler.released_tickets) <= len(kept) < len(refused)
    assert set(scheduler.released_tickets) <= kept


async def test_at_the_end_a_ticket_is_taken_back_whose_acceptance_was_not_heard(redis: Redis, pool: Pool) -> None:
    scheduler = Deaf(redis)
    leases = Leases(scheduler, "g")
    await pool.beat()
    with pytest.raises(Unavailable):
        async with opened(leases):
            pytest.fail("it was not accepted")
    scheduler.away = False
    await asyncio.wait_for(leases.drained(), 60)
    assert await pool.states() == {}, "else it would be recorded as lost"


async def test_what_the_server_forgot_is_put_back(leases: Leases, pool: Pool, redis: Redis) -> None:
    await pool.beat(slots=1)
    async with opened(leases) as runs, opened(leases, ticket(2)) as waits:
        assert await runs.wait(0) is not None
        await redis.flushall()
        await leases.renew()
        assert await pool.states() == {"r2": "queued"}  # the replica is not back: running tickets continue
        await pool.beat("x", state="starting", slots=1)
        await leases.renew()
        assert await pool.states() == {"r1": "granted", "r2": "queued"}
        await pool.beat("x", slots=1)
        assert await waits.wait(0) is None
        await pool.check()
    await pool.check()
    assert sorted(await ids(pool)) == ["r1", "r2"]


async def test_recent_events_are_told_again_to_a_server_without_memory(leases: Leases, pool: Pool, redis: Redis) -> None:
    await pool.beat()
    async with opened(leases):
        pass
    await redis.flushall()
    async with opened(leases, ticket(2)):
        await leases.renew()
        assert await ids(pool) == ["r1"]
    await leases.renew()
    assert sorted(set(await ids(pool))) == ["r1", "r2"]


async def test_a_ticket_that_was_delivered_before_is_granted_after_the_memory_was_lost(leases: Leases, pool: Pool, redis: Redis) -> None:
    await pool.beat("x")
    async with opened(leases) as one:
        lease = await one.wait(0)
        assert lease is not None
        await one.retry(lease, RetryReason.ENGINE)
        await redis.flushall()
        await leases.renew()
        await pool.beat("y")
        await leases.renew()
        assert (await pool.states()) == {"r1": "granted"}
        assert await one.wait(0.1) is not None


async def test_drained_waits_for_what_a_renewal_is_settling(redis: Redis, pool: Pool) -> None:
    scheduler = Away(redis)
    leases = Leases(scheduler, "g")
    async with opened(leases):
        scheduler.away = True
    gate = asyncio.Event()
    release = scheduler.release

    async def slow(*args: Any) -> bool:
        await gate.wait()
        return await release(*args)

    scheduler.release = slow  # type: ignore[assignment,method-assign]
    scheduler.away = False
    renewing = asyncio.create_task(leases.renew())
    await asyncio.sleep(0.01)
    draining = asyncio.create_task(leases.drained())
    await asyncio.sleep(0.1)
    done = draining.done()
    gate.set()
    await asyncio.gather(renewing, draining)
    assert set(await ids(pool)) == {"r1"}
    assert not done


async def test_recent_events_are_told_again_although_no_ticket_is_open(leases: Leases, pool: Pool, redis: Redis) -> None:
    await pool.beat()
    async with opened(leases):
        pass
    await redis.flushall()
    await pool.beat()
    await leases.renew()
    await leases.renew()
    assert await ids(pool) == ["r1"]


async def test_events_are_not_forgotten_while_the_server_is_away(redis: Redis, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server may be away for longer than events are remembered, and come back without memory."""
    monkeypatch.setattr(module, "REMEMBER_S", 0.0)
    scheduler = Away(redis)
    leases = Leases(scheduler, "g")
    await pool.beat()
    await leases.renew()
    async with opened(leases):
        pass
    scheduler.away = True
    await leases.renew()
    await leases.renew()
    await redis.flushall()
    await pool.beat()
    scheduler.away = False
    await leases.renew()
    assert await ids(pool) == ["r1"]
    await leases.renew()
    await leases.renew()
    assert await ids(pool) == ["r1"]


async def test_an_engine_lost_while_the_server_is_away_is_told_when_it_is_back(redis: Redis, pool: Pool) -> None:
    scheduler = Away(redis)
    leases = Leases(scheduler, "g")
    await pool.beat("x")
    async with opened(leases) as one:
        lease = await one.wait(0)
        assert lease is not None
        scheduler.away = True
        await one.retry(lease, RetryReason.ENGINE)
        await leases.renew()
        assert await one.wait(0) is None
        scheduler.away = False
        await pool.beat("y")
        await leases.renew()
        again = await one.wait(0.1)
        assert again is not None
        assert again.replica == "y"
        assert (await pool.tickets())["r1"]["attempts"] == 1
    assert await ids(pool) == ["r1"]


async def test_a_ticket_whose_acceptance_was_not_heard_is_taken_back(redis: Redis, pool: Pool) -> None:
    scheduler = Deaf(redis)
    leases = Leases(scheduler, "g")
    await pool.beat()
    with pytest.raises(Unavailable):
        async with opened(leases):
            pytest.fail("it was not accepted")
    assert await pool.states() == {"r1": "granted"}
    scheduler.away = False
    await leases.renew()
    assert await pool.states() == {}
    assert await ids(pool) == []
    await pool.check()
