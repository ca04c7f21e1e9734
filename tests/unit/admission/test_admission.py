"""The limits of admission, the estimates of requests, and the texts of refusals."""

import asyncio
import json
from typing import Any

import pytest

from lmaas.admission import months
from lmaas.admission.estimate import MESSAGE_TOKENS, USUAL_COMPLETION, estimate
from lmaas.admission.limits import PrincipalLimits, limited_scopes, rate_limit_headers
from lmaas.admission.months import Months
from lmaas.admission.tiers import SERVICE_TIERS, TIERS, effective
from lmaas.errors import OverQuota, Unavailable
from lmaas.scheduling.client import Bounds, Seed
from lmaas.store.database import Database
from lmaas.types import Limits, Principal, Role
from tests.support.conditions import until

PRINCIPAL = Principal("key_1", Role.INFERENCE, "ten_1", "acme", 10, "standard")


@pytest.mark.parametrize(
    ("parameters", "prompts", "expected"),
    [
        ({"messages": [{"role": "user", "content": "a" * 300}], "max_tokens": 7}, 1, (MESSAGE_TOKENS + 101, 7)),
        ({"messages": [{"role": "user", "content": "ä" * 300}], "max_completion_tokens": 7}, 1, (MESSAGE_TOKENS + 301, 7)),
        ({"messages": [{"role": "assistant", "content": None}]}, 1, (MESSAGE_TOKENS, USUAL_COMPLETION)),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "abc"}]}]}, 1, (MESSAGE_TOKENS + 2, USUAL_COMPLETION)),
        ({"prompt": "abc", "max_tokens": 5, "n": 4}, 1, (2, 20)),
        ({"prompt": [1, 2, 3], "max_tokens": 5}, 1, (3, 5)),
        ({"prompt": [[1, 2, 3], "abc"], "max_tokens": 5, "n": 2}, 2, (5, 20)),
        ({"prompt": "abc", "echo": True, "max_tokens": 0}, 1, (2, 1)),  # the engine generates a token all the same
        ({"prompt": "a" * 9000, "max_tokens": 5, "truncate_prompt_tokens": 10}, 1, (10, 5)),
        ({"prompt": "a" * 9000, "max_tokens": 5, "truncate_prompt_tokens": -1}, 1, (2048, 5)),
        ({"prompt": "a" * 90_000, "max_tokens": 900_000}, 1, (2048, 2048)),  # the engine accepts no more, whatever the request says
    ],
)
def test_estimates(parameters: dict[str, Any], prompts: int, expected: tuple[int, int]) -> None:
    assert estimate(parameters, prompts, 2048) == expected


def test_tools_and_their_calls_are_prompt_too() -> None:
    tools = [{"type": "function", "function": {"name": "f" * 300}}]
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "x" * 300}}]
    plain = {"messages": [{"role": "user", "content": "a"}]}
    assert estimate(plain | {"tools": tools}, 1, 2048)[0] - estimate(plain, 1, 2048)[0] == len(json.dumps(tools)) // 3 + 1
    assert estimate({"messages": [{"role": "assistant", "tool_calls": calls}]}, 1, 2048)[0] > 100


def test_a_tenants_own_limits_go_before_its_tiers() -> None:
    assert effective(Limits(), "free") == TIERS["free"].limits
    assert effective(Limits(max_concurrent=1000), "free").max_concurrent == 1000
    assert effective(Limits(max_concurrent=1000), "free").requests_per_minute == 60
    assert effective(Limits(), "a tier of yesterday") == TIERS["standard"].limits == Limits()


def test_only_what_is_limited_is_counted() -> None:
    assert limited_scopes(PRINCIPAL) == ()
    both = Principal("key_1", Role.INFERENCE, "ten_1", "acme", 10, "free", Limits(), Limits(tokens_per_month=5))
    assert [(scope.id, scope.scope, scope.requests_per_minute, scope.tokens_per_month) for scope in limited_scopes(both)] == [
        ("ten_1", "tenant", 60, 10_000_000),
        ("key_1", "key", None, 5),
    ]


def test_service_tiers_are_shares_and_order() -> None:
    assert SERVICE_TIERS["auto"] == SERVICE_TIERS["default"]
    priority, usual, flex = (SERVICE_TIERS[name] for name in ("priority", "default", "flex"))
    assert priority.share > usual.share > flex.share > 0
    assert priority.head_start > usual.head_start > flex.head_start
    # A larger share costs more: otherwise every tenant would choose it.
    assert priority.price_percent >= 100 * priority.share / usual.share


@pytest.mark.parametrize(
    ("report", "status", "code", "retry_after", "should_retry"),
    [
        ({"state": "refused"}, 429, "queue_full", "5", "true"),
        ({"state": "refused_by_pool", "wait_ms": 20_400}, 503, "pool_queue_full", "21", "true"),
        ({"limit": "concurrency", "allowed": 3, "retry_ms": 1000}, 429, "concurrency_limit_exceeded", "1", "true"),
        ({"limit": "requests", "allowed": 3, "used": 3, "asked": 1, "retry_ms": 1001}, 429, "rate_limit_exceeded", "2", "true"),
        ({"limit": "tokens", "allowed": 30, "used": 30, "asked": 10, "retry_ms": 60_000}, 429, "rate_limit_exceeded", "60", "true"),
        ({"limit": "request_tokens", "allowed": 30, "asked": 31, "retry_ms": 0}, 429, "rate_limit_exceeded", None, "false"),
        ({"limit": "month_tokens", "allowed": 30, "used": 1, "asked": 31, "retry_ms": 0}, 429, "insufficient_quota", "month", "false"),
        ({"limit": "budget", "allowed": 30, "retry_ms": 0}, 429, "insufficient_quota", "month", "false"),
    ],
)
def test_refusals(
    no_database: Database, report: dict[str, Any], status: int, code: str, retry_after: str | None, should_retry: str
) -> None:
    limited = {"state": "limited", "scope": "key", "left": {"requests": [3, 0, 12_500]}} | report
    error = PrincipalLimits(Months(no_database), PRINCIPAL, Bounds(1, 1)).refusal(limited)
    headers = error.headers()
    assert (error.status, error.error_code, headers["x-should-retry"]) == (status, code, should_retry)
    if retry_after == "month":
        assert isinstance(error, OverQuota)
        assert 0 < int(headers["retry-after"]) <= 31 * 86_400
    else:
        assert headers.get("retry-after") == retry_after
    if limited["state"] == "limited":
        assert headers["x-ratelimit-remaining-requests"] == "0"
        assert "API key" in error.message


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ({"state": "refused"}, "You have 64 queued requests, the maximum for this tenant. Retry after 5 s, or raise max_queued."),
        ({"state": "refused_by_pool", "wait_ms": 20_400}, "The queue of this model is full: 900 requests wait. Retry after 21 s."),
        (
            {"limit": "concurrency", "allowed": 3, "retry_ms": 1200},
            "This API key has 3 open requests, the maximum. Retry after 2 s, or raise max_concurrent.",
        ),
        (
            {"limit": "tokens", "allowed": 30, "used": 25, "asked": 10, "retry_ms": 900},
            "This API key may use 30 tokens per minute: 25 are used or reserved, and this request may use 10. Retry after 0.9 s, or raise "
            "tokens_per_minute.",
        ),
        (
            {"limit": "budget", "allowed": 2_500_000, "retry_ms": 0},
            "This API key has a budget of $2.5 per month, which this request could exceed. Wait for the next month, or raise "
            "budget_per_month.",
        ),
    ],
)
def test_a_refusal_says_what_is_wrong_and_what_to_do(no_database: Database, report: dict[str, Any], message: str) -> None:
    refused = {"state": "limited", "scope": "key"} | report
    assert PrincipalLimits(Months(no_database), PRINCIPAL, Bounds(64, 900)).refusal(refused).message == message


def test_a_month_that_nobody_knows_is_unavailable(no_database: Database) -> None:
    assert isinstance(PrincipalLimits(Months(no_database), PRINCIPAL, Bounds(1, 1)).refusal({"state": "unseeded"}), Unavailable)


def test_headers() -> None:
    assert rate_limit_headers({"tokens": [100, 40, 61_000]}) == {
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "40",
        "x-ratelimit-reset-tokens": "61s",
    }


async def test_the_ledger_is_asked_once_for_all_that_wait(no_database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []
    gate = asyncio.Event()

    async def total(_: Database, tenant_id: str, year: int, month: int, *, key_id: str | None = None) -> tuple[int, int]:
        asked.append(key_id)
        await gate.wait()
        return (7 if key_id else 9), 1

    monkeypatch.setattr(months, "month_total", total)
    asking = Months(no_database)
    waiting = [asyncio.create_task(asking.seeds("t", ["t", "k"], 202611)) for _ in range(20)]
    await until(lambda: asked)
    waiting[0].cancel()  # one of the requests leaves
    gate.set()
    answers = await asyncio.gather(*waiting[1:])
    assert answers == [{"t": Seed(202611, 9, 1), "k": Seed(202611, 7, 1)}] * 19
    assert asked == [None, "k"]
