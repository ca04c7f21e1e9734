"""Amounts on the command line are dollars, and values that look like micro-dollars are refused."""

from typing import Any

import click
import pytest

from lmaas.cli.limits import limited
from lmaas.cli.money import BUDGET, PRICE
from lmaas.cli.tables import cell, heading, is_money


@pytest.mark.parametrize(
    ("given", "micro"),
    [
        ("0", 0), ("0.15", 150_000), ("1", 1_000_000), ("$2.50", 2_500_000), ("0.000001", 1),
        (" 3 ", 3_000_000), ("999.999999", 999_999_999),
        ("1e-3", 1000), ("0.1500000", 150_000), (0.4, 400_000), ("0.1", 100_000),
    ],
)  # fmt: skip
def test_dollars_become_micro_dollars(given: Any, micro: int) -> None:
    assert PRICE.convert(given, None, None) == micro


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("150000", "no longer in micro-dollars: write 0.15 for 150000 micro-dollars."),
        ("1000", "must be less than 1,000"),
        ("1e300", "must be less than 1,000"),
        ("0.0000001", "more than six decimals"),
        ("-1", "not an amount"),
        ("x", "not an amount"),
        ("", "not an amount"),
        ("nan", "not an amount"),
        ("inf", "not an amount"),
        ("0,15", "not an amount"),
        ("0.15 €", "not an amount"),
    ],
)
def test_what_is_no_price(given: str, why: str) -> None:
    with pytest.raises(click.BadParameter, match=why):
        PRICE.convert(given, None, None)


def test_a_budget_may_be_higher_than_a_price() -> None:
    assert BUDGET.convert("999999.5", None, None) == 999_999_500_000
    with pytest.raises(click.BadParameter, match="less than 1,000,000"):
        BUDGET.convert("5000000", None, None)


@pytest.mark.parametrize(
    ("column", "title"),
    [("prompt_price", "prompt $/M"), ("engine_price", "engine $/h"), ("charge_microusd", "charge $"), ("requests", None)],
)
def test_money_is_shown_in_dollars(column: str, title: str | None) -> None:
    assert is_money(column) is (title is not None)
    assert cell(150_000, money=is_money(column)) == ("0.150000" if title else "150000")
    assert title is None or heading(column) == title


def test_a_budget_is_shown_in_dollars() -> None:
    shown = limited({"tokens_per_minute": 100_000, "budget_per_month": 5_500_000, "max_concurrent": None})
    assert shown["limits"] == "tokens_per_minute 100000, budget_per_month 5.500000 $"
