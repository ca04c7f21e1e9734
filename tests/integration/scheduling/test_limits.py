"""Limits inside the function library, on a clock that the test sets."""

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest
from msgspec.structs import replace

from lmaas.scheduling.client import Bounds, LimitedScope, Scheduler, Seed, library
from lmaas.types import TokenCounts
from tests.integration.scheduling.build import Pool, ticket

START = datetime(2026, 11, 22, 12, tzinfo=UTC).timestamp()


@dataclass
class Clocked:
    """A scheduler whose server uses the test's clock."""

    scheduler: Scheduler
    pool: Pool

    async def at(self, seconds: float) -> None:
        """Set the clock to this many seconds after the start; replicas send heartbeats."""
        await self.scheduler.redis.set("time", f"{START + seconds:.3f}")
        await self.pool.beat(slots=100)

    async def ask(
        self, number: int, *scopes: LimitedScope, prompt: int = 10, completion: int = 90, seeds: dict[str, Seed] | None = None
    ) -> dict[str, Any]:
        """Submit a ticket under these limits."""
        one = replace(ticket(number), limits=scopes, prompt_tokens=prompt, completion_tokens=completion, prices=(1_000_000, 0, 2_000_000))
        return await self.scheduler.submit(one, Bounds(100, 1000), seeds=seeds)

    async def end(self, number: int, used: TokenCounts | None = None) -> None:
        """Release a ticket with this usage."""
        assert await self.scheduler.release(ticket(number), "", None, used)


@pytest.fixture
async def clocked(scheduler: Scheduler) -> Clocked:
    text = library().replace("redis.call('TIME')", "{ string.match(redis.call('GET', 'time'), '(%d+)%.(%d+)') }")
    text = text.replace("math.floor(tonumber(time[2]) / 1000)", "tonumber(time[2])")
    own = Scheduler(scheduler.redis, text)
    made = Clocked(own, Pool(own))
    await made.at(0)
    return made


def tenant(**limits: int) -> LimitedScope:
    return LimitedScope("ten_a", "tenant", **limits)


async def test_requests_per_minute_hold_in_every_stretch_of_a_minute(clocked: Clocked) -> None:
    limit = tenant(requests_per_minute=3)
    await clocked.at(0.9)
    assert (await clocked.ask(1, limit))["left"] == {"requests": [3, 2, 60_100]}
    await clocked.at(30)
    assert [(await clocked.ask(number, limit))["state"] for number in (2, 3)] == ["granted", "granted"]
    refused = await clocked.ask(4, limit)
    assert (refused["state"], refused["limit"], refused["scope"], refused["retry_ms"]) == ("limited", "requests", "tenant", 31_000)
    assert refused["left"]["requests"][1] == 0
    # Retry-After is exact: the ticket is refused right before that time, and accepted at it.
    await clocked.at(60.999)
    assert (await clocked.ask(4, limit))["state"] == "limited"
    await clocked.at(61)
    assert (await clocked.ask(4, limit))["state"] == "granted"
    assert (await clocked.ask(5, limit))["retry_ms"] == 30_000


async def test_tokens_are_reserved_and_settled_to_the_truth(clocked: Clocked) -> None:
    limit = tenant(tokens_per_minute=250)
    assert [(await clocked.ask(number, limit))["state"] for number in (1, 2, 3)] == ["granted", "granted", "limited"]
    await clocked.end(1, TokenCounts(10, 0, 20))
    assert (await clocked.ask(3, limit))["left"] == {"tokens": [250, 20, 61_000]}
    await clocked.end(2, TokenCounts(10, 0, 200))  # usage beyond the estimate is counted as well
    refused = await clocked.ask(4, limit)
    assert (refused["limit"], refused["used"], refused["asked"]) == ("tokens", 340, 100)
    assert (await clocked.ask(5, limit, completion=500))["limit"] == "request_tokens"


async def test_what_was_refused_or_never_ran_burns_nothing(clocked: Clocked) -> None:
    limit = tenant(requests_per_minute=2, tokens_per_minute=1000)
    for number in range(1, 10):
        await clocked.ask(number, limit)
        await clocked.end(number)
    assert (await clocked.ask(20, limit, completion=2000))["limit"] == "request_tokens"
    reply = await clocked.ask(21, limit)
    assert reply["left"] == {"requests": [2, 1, 61_000], "tokens": [1000, 900, 61_000]}


async def test_concurrent_requests(clocked: Clocked) -> None:
    limit = tenant(max_concurrent=2)
    assert [(await clocked.ask(number, limit))["state"] for number in (1, 2, 3)] == ["granted", "granted", "limited"]
    await clocked.end(1, TokenCounts(1, 0, 1))
    assert [(await clocked.ask(number, limit))["state"] for number in (3, 4)] == ["granted", "limited"]


async def test_the_limits_of_tenant_and_key_hold_together(clocked: Clocked) -> None:
    key, other = LimitedScope("key_1", "key", requests_per_minute=1), LimitedScope("key_2", "key", requests_per_minute=5)
    limit = tenant(requests_per_minute=2)
    assert (await clocked.ask(1, limit, key))["left"]["requests"][:2] == [1, 0]
    assert (await clocked.ask(2, limit, key))["scope"] == "key"
    assert (await clocked.ask(3, limit, other))["left"]["requests"][:2] == [2, 0]
    assert (await clocked.ask(4, limit, other))["scope"] == "tenant"
    # The refusals took nothing from the other limit.
    assert (await clocked.ask(5, other))["left"]["requests"][:2] == [5, 3]


async def test_the_months_figures_come_from_the_ledger_once(clocked: Clocked) -> None:
    limit = tenant(tokens_per_month=1000)
    asked = await clocked.ask(1, limit)
    assert asked == {"state": "unseeded", "scopes": ["ten_a"], "month": 202611}
    assert (await clocked.ask(1, limit, seeds={"ten_a": Seed(202610, 5, 0)}))["state"] == "unseeded"
    assert (await clocked.ask(1, limit, seeds={"ten_a": Seed(202611, 850, 0)}))["state"] == "granted"
    refused = await clocked.ask(2, limit, seeds={"ten_a": Seed(202611, 0, 0)})
    assert (refused["limit"], refused["used"]) == ("month_tokens", 950)
    await clocked.end(1, TokenCounts(10, 0, 40))
    assert (await clocked.ask(2, limit))["state"] == "granted"
    # A new month begins with nothing, and tickets of the old month that end in it do not count.
    await clocked.at(9 * 86_400)
    assert (await clocked.ask(3, limit))["state"] == "granted"
    await clocked.end(2, TokenCounts(900, 0, 100))
    assert [(await clocked.ask(number, limit, completion=790))["state"] for number in (4, 5)] == ["granted", "limited"]


async def test_a_limit_that_comes_later_counts_the_month_once(clocked: Clocked) -> None:
    minute, both = tenant(requests_per_minute=100), tenant(requests_per_minute=100, tokens_per_month=1000)
    await clocked.ask(1, minute)
    await clocked.end(1, TokenCounts(100, 0, 200))
    await clocked.ask(2, minute)  # runs while the limit is set
    assert (await clocked.ask(3, both))["state"] == "unseeded"
    assert (await clocked.ask(3, both, seeds={"ten_a": Seed(202611, 300, 0)}))["state"] == "granted"
    await clocked.end(2, TokenCounts(10, 0, 90))
    await clocked.end(3, TokenCounts(10, 0, 90))
    assert (await clocked.ask(4, both, completion=990))["used"] == 500


async def test_the_budget_counts_prices(clocked: Clocked) -> None:
    # 10 prompt tokens at $1 and 90 completion tokens at $2 a million: 190 micro-dollars.
    limit = tenant(budget_per_month=400)
    seeds = {"ten_a": Seed(202611, 0, 0)}
    assert [(await clocked.ask(number, limit, seeds=seeds))["state"] for number in (1, 1, 2, 3)] == [
        "unseeded",
        "granted",
        "granted",
        "limited",
    ]
    await clocked.end(1, TokenCounts(10, 10, 0))  # cached tokens are free here
    assert (await clocked.ask(3, limit))["state"] == "granted"


async def test_a_hundred_at_once_are_counted_exactly(clocked: Clocked) -> None:
    limit = tenant(requests_per_minute=40, tokens_per_minute=3050)
    states = [reply["state"] for reply in await asyncio.gather(*(clocked.ask(number, limit) for number in range(100)))]
    assert (states.count("granted"), states.count("limited")) == (30, 70)


async def test_a_gateway_that_dies_gives_its_reservations_back(clocked: Clocked) -> None:
    limit = tenant(max_concurrent=1, tokens_per_minute=1000)
    await clocked.ask(1, limit)
    await clocked.scheduler.renew("p", [("r1", TokenCounts(10, 0, 5))])
    for second in range(2, 30, 2):
        await clocked.at(second)
    [event] = await clocked.pool.events()
    assert (event["status"], event["completion_tokens"]) == ("lost", 5)
    assert (await clocked.ask(2, limit))["left"]["tokens"][:2] == [1000, 885]


async def test_the_lost_attempt_of_durable_work_counts_for_nothing(clocked: Clocked) -> None:
    limit, seeds = tenant(tokens_per_month=1000, budget_per_month=10_000), {"ten_a": Seed(202611, 700, 0)}
    one = replace(ticket(1), limits=(limit,), prompt_tokens=10, completion_tokens=90, prices=(1, 1, 1), background=True, durable=True)
    states = [(await clocked.scheduler.submit(one, Bounds(100, 1000), seeds=seeds))["state"] for _ in range(2)]
    assert states == ["unseeded", "granted"]
    await clocked.scheduler.renew("p", [("r1", TokenCounts(10, 0, 5))])
    for second in range(2, 30, 2):
        await clocked.at(second)
    [event] = await clocked.pool.events()
    assert (event["status"], event["code"], event["completion_tokens"]) == ("wasted", "runner_lost", 5)
    refused = await clocked.ask(2, limit, completion=990)
    assert (refused["limit"], refused["used"]) == ("month_tokens", 700)


async def test_what_runs_is_counted_again_after_the_memory_was_lost(clocked: Clocked) -> None:
    limit = tenant(max_concurrent=1)
    await clocked.ask(1, limit)
    await clocked.scheduler.redis.flushall()
    await clocked.at(1)
    one = replace(ticket(1), limits=(limit,))
    assert await clocked.scheduler.restore(one, "x", waited_ms=1000, attempts=0)
    assert (await clocked.ask(2, limit))["limit"] == "concurrency"


async def test_a_clock_that_is_set_back_does_not_lock_anybody_out(clocked: Clocked) -> None:
    limit = tenant(requests_per_minute=1)
    await clocked.ask(1, limit)
    await clocked.at(-3600)
    assert (await clocked.ask(2, limit))["state"] == "granted"
    assert (await clocked.ask(3, limit))["retry_ms"] == 61_000


async def test_what_ran_for_longer_than_a_minute_counts_when_it_ends(clocked: Clocked) -> None:
    limit = tenant(tokens_per_minute=1000)
    await clocked.ask(1, limit)
    for second in range(3, 90, 3):
        await clocked.at(second)
        await clocked.scheduler.renew("p", [("r1", None)])
    await clocked.end(1, TokenCounts(10, 0, 900))
    assert (await clocked.ask(2, limit))["left"]["tokens"] == [1000, 90, 61_000]


async def test_at_the_limit_of_what_runs_the_wait_is_how_long_the_tenants_requests_take(clocked: Clocked) -> None:
    limit = tenant(max_concurrent=2)
    for number in range(1, 60, 2):
        await clocked.at(20 * number)
        await clocked.ask(number, limit)
        await clocked.ask(number + 1, limit)
        await clocked.at(20 * number + 16)
        assert (await clocked.ask(100, limit))["limit"] == "concurrency"
        await clocked.end(number, TokenCounts(1, 0, 1))
        await clocked.end(number + 1)  # never ran, so it does not change the average
    await clocked.at(2000)
    await clocked.ask(98, limit)
    await clocked.ask(99, limit)
    refused = await clocked.ask(100, limit)
    assert 7000 <= refused["retry_ms"] <= 8000, "one of two that take 16 s"


@pytest.mark.parametrize("first", ["tenant", "key"])
async def test_of_several_limits_the_longest_wait_is_told(clocked: Clocked, first: str) -> None:
    scopes = [
        LimitedScope("ten_a", "tenant", max_concurrent=1),
        LimitedScope("key_a", "key", requests_per_minute=1, tokens_per_minute=1000),
    ]
    scopes = scopes if first == "tenant" else scopes[::-1]
    await clocked.ask(1, *scopes)
    refused = await clocked.ask(2, *scopes)
    assert (refused["limit"], refused["scope"], refused["retry_ms"]) == ("requests", "key", 61_000)
    assert refused["left"] == {"requests": [1, 0, 61_000], "tokens": [1000, 900, 61_000]}
    # A limit for which waiting does not help is reported before all of these.
    refused = await clocked.ask(3, *scopes, completion=2000)
    assert (refused["limit"], refused["retry_ms"]) == ("request_tokens", 0)


async def test_a_month_that_was_asked_for_in_vain_is_asked_for_anew(clocked: Clocked) -> None:
    await clocked.ask(1, tenant(max_concurrent=9))
    limit = tenant(tokens_per_month=1000)
    assert (await clocked.ask(2, limit))["state"] == "unseeded"  # and its gateway dies
    await clocked.end(1, TokenCounts(30, 0, 30))
    await clocked.at(20)
    reply = await clocked.ask(3, limit)
    # The ledger has the 60 tokens by now.
    await clocked.ask(3, limit, seeds={"ten_a": Seed(reply["month"], 60, 0)})
    assert (await clocked.ask(4, limit, completion=1000))["used"] == 60 + 100


async def test_what_the_ledger_says_is_taken_although_the_queue_is_full(clocked: Clocked) -> None:
    limit = tenant(tokens_per_month=1000)
    reply = await clocked.ask(1, limit)
    one = replace(ticket(1), limits=(limit,))
    seeds = {"ten_a": Seed(reply["month"], 60, 0)}
    assert (await clocked.scheduler.submit(one, Bounds(0, 1000), seeds=seeds))["state"] == "refused"
    assert (await clocked.ask(2, limit))["state"] == "granted"


async def test_nothing_waited_for_less_than_no_time_after_the_clock_was_set_back(clocked: Clocked) -> None:
    await clocked.at(3600)
    await clocked.pool.submit(replace(ticket(1, adapter="A"), prompt_tokens=5))
    await clocked.at(0)
    await clocked.scheduler.loaded("p", "x", "A")
    reply = (await clocked.scheduler.renew("p", [("r1", None)]))["tickets"][0]
    assert (reply["state"], reply["queue_ms"], reply["load_ms"]) == ("granted", 0, 0)
