"""Commands for reports: usage and costs, as tables, JSON or CSV."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from lmaas.api import table
from lmaas.api.operation import Operation
from lmaas.api.shapes.usage import PROBES, OperatorUsageQuery, UsageQuery
from lmaas.cli.context import Context, pass_context
from lmaas.cli.streams import binary_output
from lmaas.states import Dimension, UsageDimension, UsageStatus, WorkClass

#: The latest events that `lmaas usage --events` shows.
MOST_EVENTS = 100
TOKENS = ("prompt_tokens", "completion_tokens", "cached_tokens")
#: Columns of the tables, the most important first: on a narrow terminal the last ones are left out.
FIGURES = ("requests", "charge_microusd", *TOKENS, "failed_requests", "unpriced_requests", "run_ms")
USAGE = ("day", "tenant", "model", "adapter", "work", *FIGURES)
#: The figures of a use that only operators see.
WASTE = ("wasted_tokens", "wasted")
EVENT = (
    *("created_at", "model", "status", "prompt_tokens", "completion_tokens", "code", "request_id", "work", "queue_ms", "load_ms", "run_ms"),
    *("charge_microusd", "tenant_id", "key_id"),
)
COGS = (
    *("cost_microusd", "charge_microusd", "margin_microusd", "margin_ratio", "busy_s", "background_s", "idle_s", "starting_s", "loading_s"),
    "unpriced_requests",
)
#: The text in place of a charge of 0 that is only 0 because no price was set.
NO_PRICE = "no price"

Command = TypeVar("Command", bound=Callable[..., None])


def period_options(command: Command) -> Command:
    """Add the options for the days of a report and for CSV."""
    command = click.option("--csv", "as_csv", is_flag=True, help="Print the whole report as CSV, with money in dollars.")(command)
    command = click.option("--until", help="The last day (UTC).")(command)
    return click.option("--since", help="The first day, such as 2026-11-01 (UTC).")(command)


def _names(known: Sequence[str]) -> str:
    return f"{', '.join(known[:-1])} and {known[-1]}"


@click.command()
@period_options
@click.option("--by", help=f"Some of {_names(list(UsageDimension))}, separated by commas. By default day, model, adapter and work.")
@click.option("--key", help="Only this key's usage. Its id, as `lmaas key list` shows it.")
@click.option("--model", help="Only the usage of this base model.")
@click.option("--adapter", help="Only the usage of this adapter, with all its versions.")
@click.option("--work", type=click.Choice([work.value for work in WorkClass]), help="Only this class of work.")
@click.option("--events", is_flag=True, help="Show single requests instead, the latest first.")
@click.option("--status", type=click.Choice([status.value for status in UsageStatus]), help="With --events: only those with this end.")
@click.option("--request-id", help="With --events: only this request.")
@click.option(
    "--limit", type=click.IntRange(min=1), help=f"The lines to show, at most. By default {MOST_EVENTS} events, and all of a report."
)
@click.option("--check", is_flag=True, help="Compare the sums of these days with the ledger instead (operators, at most 31 days).")
@pass_context
def usage(
    context: Context,
    /,
    since: str | None,
    until: str | None,
    as_csv: bool,
    events: bool,
    check: bool,
    limit: int | None,
    **asked: str | None,
) -> None:
    """Show requests, tokens and charges by day, tenant, model, adapter and class of work. Operators also see what was wasted."""
    period = {"since": since, "until": until}
    if check:
        _check(context, period)
        return
    if not events and (asked["status"] or asked["request_id"]):
        raise click.UsageError("--status and --request-id are for single requests. Add --events.")
    if events and asked["by"]:
        raise click.UsageError("--by groups the lines of a report. Leave out --by or --events.")
    of_all = context.is_operator()
    query: dict[str, Any] = period | asked | ({"tenant": context.tenant} if of_all else {})
    if events:
        operation = table.LIST_ALL_EVENTS if of_all else table.LIST_EVENTS
    else:
        operation = table.REPORT_ALL_USAGE if of_all else table.REPORT_USAGE
    if as_csv:
        _print_csv(context, operation, query)
        return
    rows = context.client().items(operation, most=limit or (MOST_EVENTS if events else None), query=query)
    if context.as_json:
        context.show(rows, ())
    elif events:
        context.show([_event_line(row) for row in rows], EVENT)
    else:
        by = asked["by"] or (OperatorUsageQuery() if of_all else UsageQuery()).by
        context.show([_usage_line(row) for row in rows], (*_groups(by, rows), *FIGURES, *(WASTE if of_all else ())))
        _tell_unpriced(context, sum(row["unpriced_requests"] for row in rows))


def _groups(by: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the columns that lines are grouped by. A response may have more of them than were requested."""
    fields = {"key": ("key_id", "key")}
    asked = {name.strip() for name in by.split(",")} | ({"tenant"} if rows and "tenant" in rows[0] else set())
    return [field for name in UsageDimension if name in asked for field in fields.get(name, (name.value,))]


def _usage_line(row: dict[str, Any]) -> dict[str, Any]:
    """Return a line for people: a name for probes, the reasons of waste as one text, and no charge where no price was set."""
    shown = row | {"wasted": ", ".join(f"{code} {tokens}" for code, tokens in row.get("waste", {}).items())}
    if row.get("tenant", "") is None:
        shown["tenant"] = PROBES
    return _priced(shown)


def _event_line(row: dict[str, Any]) -> dict[str, Any]:
    tenant = {"tenant_id": PROBES} if row["tenant_id"] is None else {}
    # Half a micro-dollar and more is one.
    return row | tenant | {"charge_microusd": (row["charge_picousd"] + 500_000) // 1_000_000}


def _priced(row: dict[str, Any]) -> dict[str, Any]:
    return row | ({"charge_microusd": NO_PRICE} if row["charge_microusd"] == 0 and row["unpriced_requests"] > 0 else {})


def _tell_unpriced(context: Context, requests: int) -> None:
    if requests > 0:
        context.say(
            f"{requests:,} requests used tokens and cost nothing, because their model had no price. `lmaas model change` sets prices of "
            "later requests."
        )


def _check(context: Context, period: dict[str, str | None]) -> None:
    answer = context.client().send(table.CHECK_USAGE, query=period)
    if context.as_json:
        context.show_one(answer, ())
    elif answer["differences"]:
        rows = [
            {"day": one["day"], "table": one["table"], "group": _pairs(one["group"]), "the ledger has more": _pairs(one["more"])}
            for one in answer["differences"]
        ]
        context.show(rows, ("day", "table", "group", "the ledger has more"))
    else:
        click.echo(f"The sums of {answer['since']} to {answer['until']} agree with the ledger's {answer['events']:,} events.")
    if answer["differences"]:
        raise click.exceptions.Exit(1)


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def _print_csv(context: Context, operation: Operation, query: dict[str, Any]) -> None:
    if context.as_json:
        raise click.UsageError("--json and --csv are two formats. Choose one.")
    context.client().download(operation, binary_output(), query=query | {"format": "csv"})


@click.command()
@period_options
@click.option("--by", default="day,tenant,adapter", show_default=True, help=f"Some of {_names(list(Dimension))}, separated by commas.")
@pass_context
def cogs(context: Context, since: str | None, until: str | None, as_csv: bool, by: str) -> None:
    """Compare what engines cost with what tenants are charged, for operators."""
    query = {"since": since, "until": until, "by": by}
    if as_csv:
        _print_csv(context, table.REPORT_COGS, query)
        return
    answer = context.client().send(table.REPORT_COGS, query=query)
    if context.as_json:
        context.show_one(answer, ())
        return
    fields = {"adapter": ("base_model", "adapter"), "model": ("base_model",)}
    who = list(dict.fromkeys(name for part in answer["by"] for name in fields.get(part, (part,))))
    lines = [*answer["data"], dict.fromkeys(who, "") | {who[0]: "total"} | answer["total"]]
    context.show([_cogs_line(line) for line in lines], (*who, *COGS))
    spare = answer["idle_capacity"]
    if spare["used_ms"] > 0:
        context.say(
            f"Background work used {spare['used_ms'] / 1000:,.0f} s of the {spare['ms'] / 1000:,.0f} s in which engines had no other work"
            f" ({spare['used_ratio']:.1%})."
        )
    _tell_unpriced(context, answer["total"]["unpriced_requests"])


def _cogs_line(line: dict[str, Any]) -> dict[str, Any]:
    """Return a line for people: seconds, a name for the time that no tenant used, and no charge where no price was set."""
    seconds = {f"{phase}_s": ms / 1000 for phase, ms in line["engine_ms"].items()}
    return _priced(line | seconds | ({"tenant": "(no tenant)"} if line.get("tenant", "") is None else {}))
