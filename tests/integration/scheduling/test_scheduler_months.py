"""The month's figures of the limits, in a real Valkey, and the times at which they are requested from the ledger."""

from msgspec.structs import replace

from lmaas.scheduling.client import Bounds, LimitedScope, Scheduler, Seed, Ticket
from lmaas.types import TokenCounts
from tests.integration.scheduling.build import ticket

BOUNDS = Bounds(10, 100)


def limited(number: int, tokens: int, *limits: LimitedScope) -> Ticket:
    return replace(ticket(number), prompt_tokens=tokens, limits=limits)


async def test_who_is_over_the_months_limit_costs_the_ledger_one_question(scheduler: Scheduler) -> None:
    over = limited(1, 10, LimitedScope("t", "tenant", tokens_per_month=100))
    reply = await scheduler.submit(over, BOUNDS)
    assert reply["state"] == "unseeded"
    assert (await scheduler.submit(over, BOUNDS, seeds={"t": Seed(reply["month"], 95, 0)}))["limit"] == "month_tokens"
    assert (await scheduler.submit(over, BOUNDS))["limit"] == "month_tokens"  # the figures are not requested again


async def test_a_limit_of_the_month_that_comes_later_counts_nothing_twice(scheduler: Scheduler) -> None:
    tenant, key = LimitedScope("t", "tenant", max_concurrent=9), LimitedScope("k", "key", tokens_per_month=1000)
    reply = await scheduler.submit(limited(1, 60, tenant, key), BOUNDS)
    month = reply["month"]
    assert (await scheduler.submit(limited(1, 60, tenant, key), BOUNDS, seeds={"k": Seed(month, 0, 0)}))["state"] == "queued"
    await scheduler.release(limited(1, 60, tenant, key), "", None, TokenCounts(60, 0, 0))
    # Now the tenant gets one too. The ledger has the 60 tokens.
    tenant = LimitedScope("t", "tenant", tokens_per_month=100)
    assert (await scheduler.submit(limited(2, 10, tenant, key), BOUNDS))["scopes"] == ["t"]
    reply = await scheduler.submit(limited(2, 10, tenant, key), BOUNDS, seeds={"t": Seed(month, 60, 0)})
    assert reply["state"] == "queued"
    assert (await scheduler.submit(limited(3, 31, tenant, key), BOUNDS))["used"] == 70
