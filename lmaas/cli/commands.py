"""Every command of `lmaas`."""

import io
import sys
from typing import Any

import click

from lmaas.api import table
from lmaas.cli.adapters import adapter
from lmaas.cli.apply import apply
from lmaas.cli.batches import batches
from lmaas.cli.chat import chat
from lmaas.cli.completion import completion
from lmaas.cli.context import Context, pass_context
from lmaas.cli.doctor.command import doctor
from lmaas.cli.errors import Commands, end, is_of_output
from lmaas.cli.files import files
from lmaas.cli.keys import key
from lmaas.cli.logs import logs
from lmaas.cli.models import model
from lmaas.cli.processes import PROCESSES
from lmaas.cli.replicas import replica
from lmaas.cli.shared_options import add_shared_options
from lmaas.cli.simulate import simulate
from lmaas.cli.tenants import tenant
from lmaas.cli.top import top
from lmaas.errors import ApiError, LmaasError

#: The latest events that `lmaas usage --events` shows.
MOST_EVENTS = 100
#: Columns of the tables, the most important first: on a narrow terminal the last ones are left out.
TOKENS = ("prompt_tokens", "completion_tokens", "cached_tokens")
USAGE = ("day", "tenant", "model", "work", "requests", "charge_microusd", *TOKENS, "failed_requests", "run_ms")
#: What only operators see of a use.
WASTE = ("wasted_tokens", "wasted")
EVENT = (
    "created_at",
    "model",
    "status",
    "prompt_tokens",
    "completion_tokens",
    "code",
    "request_id",
    "work",
    "queue_ms",
    "load_ms",
    "run_ms",
)
COGS = (
    "cost_microusd",
    "charge_microusd",
    "margin_microusd",
    "margin_ratio",
    "busy_s",
    "background_s",
    "idle_s",
    "starting_s",
    "loading_s",
)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--wide", is_flag=True, help="Show all columns, also beyond the terminal.")
@click.option("--tenant", "-t", metavar="NAME", help="For operators: the tenant whose resources the command is about.")
@click.option("--traceback", is_flag=True, help="Of an unexpected error, show where it comes from. This may show secrets.")
@click.version_option(package_name="lmaas", prog_name="lmaas", message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context, as_json: bool, wide: bool, tenant: str | None, traceback: bool) -> None:
    """Serverless LLM endpoints for many tenants.

    `--json`, `--wide` and `--tenant` may stand before a command or after it.
    """
    del traceback  # The group reads it.
    context.obj = Context(as_json=as_json, wide=wide, tenant=tenant)


def main() -> None:
    """Run a command. An error is printed on standard error, with exit code 1; wrong usage has 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Also in a locale without these characters, what was done is said.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        cli(prog_name="lmaas")
    except ApiError as error:
        end(f"{error.message}{f' ({error.code}, {error.request_id})' if error.request_id else ''}")
    except LmaasError as error:
        end(error.message)
    except OSError as error:
        if not is_of_output(error):
            raise
        end(f"The output cannot be written: {error.strerror}.")


@cli.command()
@click.option("--since", help="The first day, such as 2026-11-01 (UTC).")
@click.option("--until", help="The last day.")
@click.option("--events", is_flag=True, help="Show the latest requests instead, one line each.")
@pass_context
def usage(context: Context, since: str | None, until: str | None, events: bool) -> None:
    """Show requests, tokens and charges by day, tenant, model and class of work. Operators also see what was wasted."""
    of_all = context.is_operator()
    query = {"tenant": context.tenant} if of_all else {}
    if events:
        operation = table.LIST_ALL_EVENTS if of_all else table.LIST_EVENTS
        context.show(context.client().items(operation, most=MOST_EVENTS, query=query), EVENT)
    else:
        operation = table.REPORT_ALL_USAGE if of_all else table.REPORT_USAGE
        rows = context.client().items(operation, query={**query, "since": since, "until": until})
        context.show(rows if context.as_json else [_wasted(row) for row in rows], (*USAGE, *WASTE) if of_all else USAGE)


@cli.command()
@click.option("--since", help="The first day, such as 2026-11-01 (UTC).")
@click.option("--until", help="The last day.")
@click.option("--by", default="day,tenant,adapter", show_default=True, help="Some of day, tenant, adapter and work, separated by commas.")
@pass_context
def cogs(context: Context, since: str | None, until: str | None, by: str) -> None:
    """Compare what engines cost with what tenants are charged, for operators."""
    answer = context.client().send(table.REPORT_COGS, query={"since": since, "until": until, "by": by})
    if context.as_json:
        context.show_one(answer, ())
        return
    who = [name for part in answer["by"] for name in {"adapter": ("base_model", "adapter")}.get(part, (part,))]
    lines = [*answer["data"], dict.fromkeys(who, "") | {who[0]: "total"} | answer["total"]]
    context.show([_cogs_line(line) for line in lines], (*who, *COGS))
    spare = answer["idle_capacity"]
    if spare["used_ms"] > 0:
        click.echo(
            f"Background work used {spare['used_ms'] / 1000:,.0f} s of the {spare['ms'] / 1000:,.0f} s in which engines had no other work"
            f" ({spare['used_ratio']:.1%})."
        )


def _cogs_line(line: dict[str, Any]) -> dict[str, Any]:
    """Return a line for people: seconds, and a name for the time that no tenant used."""
    seconds = {f"{phase}_s": ms / 1000 for phase, ms in line["engine_ms"].items()}
    return line | seconds | ({"tenant": "(no tenant)"} if line.get("tenant", "") is None else {})


def _wasted(row: dict[str, Any]) -> dict[str, Any]:
    """Return a line of usage with the reasons of its waste as one text."""
    return row | {"wasted": ", ".join(f"{code} {tokens}" for code, tokens in row.get("waste", {}).items())}


SECTIONS: dict[str, tuple[click.Command, ...]] = {
    "Using a model": (chat,),
    "A tenant's resources": (adapter, files, batches, key, usage),
    "For operators": (apply, tenant, model, replica, cogs, simulate),
    "Running a service": PROCESSES,
    "Looking after a service": (doctor, top, logs),
    "This command": (completion,),
}
for commands in SECTIONS.values():
    for command in commands:
        cli.add_command(command)
cli.sections = {heading: [str(each.name) for each in commands if not each.hidden] for heading, commands in SECTIONS.items()}
add_shared_options(
    cli,
    without={*(str(process.name) for process in PROCESSES), "completion"},
    of_operators={"apply", "cogs", "doctor", "logs", "model", "replica", "simulate", "tenant", "top"},
)
