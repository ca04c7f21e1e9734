"""The options for the limits of tenants and keys, which `lmaas tenant` and `lmaas key` share."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from lmaas.cli.money import BUDGET
from lmaas.cli.tables import cell, is_money

LIMIT_OPTIONS = (
    ("--requests-per-minute", int, "Requests accepted in any 60 seconds."),
    ("--tokens-per-minute", int, "Prompt and completion tokens in any 60 seconds."),
    ("--max-concurrent", int, "Requests that wait or run at once."),
    ("--tokens-per-month", int, "Prompt and completion tokens in a calendar month (UTC)."),
    ("--budget-per-month", BUDGET, "Dollars in a calendar month (UTC), such as 50."),
)
LIMITS = tuple(option.removeprefix("--").replace("-", "_") for option, *_ in LIMIT_OPTIONS)

Command = TypeVar("Command", bound=Callable[..., None])


def limit_options(command: Command) -> Command:
    """Add the options for limits of a tenant or a key."""
    for option, kind, text in reversed(LIMIT_OPTIONS):
        command = click.option(option, type=kind, help=f"{text} 0: no limit of its own.")(command)
    return command


def limited(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with its limits as one text: a tenant's with those of its tier, a key's own."""
    limits = row.get("effective_limits", row)
    texts = [f"{name} {_amount(name, limits[name])}" for name in LIMITS if limits.get(name) is not None]
    return row | {"limits": ", ".join(texts) or "none"}


def _amount(name: str, limit: int) -> str:
    return f"{cell(limit, money=True)} $" if is_money(name) else str(limit)


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given as the API's values. A limit of 0 is null there."""
    return {name: None if value == 0 and name in LIMITS else value for name, value in options.items() if value is not None}


def some(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given. Raises UsageError if there are none, because a change needs at least one."""
    if not (values := given(options)):
        raise click.UsageError("Give at least one option that says what to change; --help lists them.")
    return values
