"""The parts of limits per month that are reported."""

from datetime import UTC, date, datetime

import pytest

from lmaas.control.budgets import allowed_of, months, reached
from lmaas.store.budgets import Owner

MONTH = date(2026, 11, 1)


def owner(tier: str | None = "standard", tokens: int | None = None, budget: int | None = None) -> Owner:
    return Owner("ten_1", "ten_1" if tier else "key_1", tier, tokens, budget)


@pytest.mark.parametrize(
    ("of", "allowed"),
    [
        (owner(), {}),
        (owner(tokens=5, budget=7), {"tokens_per_month": 5, "budget_per_month": 7}),
        (owner("free"), {"tokens_per_month": 10_000_000}),
        (owner("free", tokens=5), {"tokens_per_month": 5}),
        (owner(None), {}),
        (owner(None, budget=7), {"budget_per_month": 7}),
    ],
)
def test_the_limits_that_hold(of: Owner, allowed: dict[str, int]) -> None:
    assert allowed_of(of) == allowed


@pytest.mark.parametrize(
    ("tokens", "picousd", "found"),
    [
        (0, 0, []),
        (499, 0, []),
        (500, 0, [("tokens_per_month", 50)]),
        (800, 0, [("tokens_per_month", 50), ("tokens_per_month", 80)]),
        (10**9, 0, [("tokens_per_month", 50), ("tokens_per_month", 80), ("tokens_per_month", 100)]),
        (0, 9_999_999, []),
        (0, 10_000_000, [("budget_per_month", 50)]),
        (999, 20_000_000, [("tokens_per_month", 50), ("tokens_per_month", 80)] + [("budget_per_month", part) for part in (50, 80, 100)]),
    ],
)
def test_the_parts_that_were_used(tokens: int, picousd: int, found: list[tuple[str, int]]) -> None:
    """The limits are 1,000 tokens and 20 micro-dollars."""
    notices = reached(owner(tokens=1000, budget=20), tokens, picousd, MONTH)
    assert [(notice.limit, notice.percent) for notice in notices] == found
    assert {notice.used for notice in notices if notice.limit == "budget_per_month"} <= {picousd // 10**6}


def test_a_month_is_checked_for_an_hour_after_its_end() -> None:
    assert months(datetime(2026, 11, 30, 23, 59, tzinfo=UTC)) == [MONTH]
    assert months(datetime(2026, 12, 1, 0, 59, tzinfo=UTC)) == [MONTH, date(2026, 12, 1)]
    assert months(datetime(2026, 12, 1, 1, 0, tzinfo=UTC)) == [date(2026, 12, 1)]
    assert months(datetime(2027, 1, 1, 0, 0, tzinfo=UTC)) == [date(2026, 12, 1), date(2027, 1, 1)]
