"""Amounts of money on the command line, in dollars. The API takes and returns whole micro-dollars."""

from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any, TypeVar

import click

MICROUSD = 1_000_000
#: Older releases took micro-dollars. Their values are above these bounds, so none becomes an amount that is a million times too high.
MOST_PRICE, MOST_BUDGET = 1_000, 1_000_000

Command = TypeVar("Command", bound=Callable[..., Any])


class Dollars(click.ParamType[int]):
    """An amount in dollars with at most six decimals, such as 0.15. Its value is in micro-dollars."""

    name = "dollars"

    def __init__(self, less_than: int) -> None:
        self._less_than = less_than

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read an amount. Fails for what is not one, and for one that was meant in micro-dollars."""
        try:
            amount = Decimal(str(value).strip().removeprefix("$"))
        except InvalidOperation:
            self.fail(f"{value!r} is not an amount in dollars, such as 0.15.", param, ctx)
        if not amount.is_finite() or amount < 0:
            self.fail(f"{value!r} is not an amount in dollars, such as 0.15.", param, ctx)
        if amount >= self._less_than:
            self.fail(
                f"{value} dollars is more than this takes: it must be less than {self._less_than:,}. Amounts are in dollars, no longer in "
                "micro-dollars: write 0.15 for 150000 micro-dollars.",
                param,
                ctx,
            )
        micro = amount * MICROUSD
        if micro != micro.to_integral_value():
            self.fail(f"{value} has more than six decimals.", param, ctx)
        return int(micro)


PRICE, BUDGET = Dollars(MOST_PRICE), Dollars(MOST_BUDGET)
