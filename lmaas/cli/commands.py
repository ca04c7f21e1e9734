"""Every command of `lmaas`."""

import io
import sys
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lmaas import config
from lmaas.admission.tiers import TIERS
from lmaas.api import table
from lmaas.cli.apply import apply
from lmaas.cli.batches import batches
from lmaas.cli.context import Context, confirm, pass_context, yes_option
from lmaas.cli.errors import Commands, end, is_of_output
from lmaas.cli.files import files
from lmaas.cli.models import model
from lmaas.cli.processes import PROCESSES
from lmaas.cli.replicas import replica
from lmaas.cli.simulate import simulate
from lmaas.cli.webhooks import webhooks
from lmaas.errors import ApiError, LmaasError, SettingsError

if TYPE_CHECKING:
    from lmaas.manifests.client import ApiClient

#: The latest events that `lmaas usage --events` shows.
MOST_EVENTS = 100
#: Columns of the tables, the most important first: on a narrow terminal the last ones are left out.
TENANT = ("name", "id", "tier", "max_queued", "max_adapters", "limits", "created_at")
KEY = ("id", "role", "revoked_at", "name", "limits", "prefix", "created_at")
ADAPTER = ("name", "base_model", "live_version", "latest_version", "activated_by", "created_at")
VERSION = ("version", "rank", "size_bytes", "content_hash", "created_at", "target_modules")
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
LIMIT_OPTIONS = (
    ("--requests-per-minute", "Requests accepted in any 60 seconds."),
    ("--tokens-per-minute", "Prompt and completion tokens in any 60 seconds."),
    ("--max-concurrent", "Requests that wait or run at once."),
    ("--tokens-per-month", "Prompt and completion tokens in a calendar month (UTC)."),
    ("--budget-per-month", "Micro-dollars in a calendar month (UTC)."),
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

Command = TypeVar("Command", bound=Callable[..., None])


def limit_options(command: Command) -> Command:
    """Add the options for limits of a tenant or a key."""
    for option, text in reversed(LIMIT_OPTIONS):
        command = click.option(option, type=int, help=f"{text} 0: no limit of its own.")(command)
    return command


def tenant_options(command: Command) -> Command:
    """Add the options for a tenant's tier and limits."""
    command = limit_options(command)
    command = click.option("--max-adapters", type=int, help="Adapters, each with any number of versions.")(command)
    command = click.option("--max-queued", type=int, help="Requests that may wait at once.")(command)
    return click.option("--tier", type=click.Choice(list(TIERS)), help="Share of the engines, and the limits that are not given.")(command)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--tenant", "-t", help="For operators: the tenant whose adapters, keys or usage the command is about.")
@click.option("--traceback", is_flag=True, help="Of an unexpected error, show where it comes from. This may show secrets.")
@click.pass_context
def cli(context: click.Context, as_json: bool, tenant: str | None, traceback: bool) -> None:
    """Serverless LLM endpoints for many tenants."""
    del traceback  # The group reads it.
    context.obj = Context(config.load(), as_json, tenant)


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


for process in PROCESSES:
    cli.add_command(process)


# Operators


cli.add_command(apply)


@cli.group()
def tenant() -> None:
    """Manage tenants, their tiers and limits."""


@tenant.command("list")
@pass_context
def tenant_list(context: Context) -> None:
    """List the tenants."""
    context.show([_limited(row) for row in context.client().items(table.LIST_TENANTS)], TENANT)


@tenant.command("create")
@click.argument("name")
@tenant_options
@pass_context
def tenant_create(context: Context, /, name: str, **limits: Any) -> None:
    """Create a tenant."""
    body: dict[str, Any] = {"name": name} | _given(limits)
    context.show_one(_limited(context.client().send(table.CREATE_TENANT, body)), TENANT)


@tenant.command("change")
@click.argument("name")
@tenant_options
@pass_context
def tenant_change(context: Context, /, name: str, **limits: Any) -> None:
    """Change a tenant's tier or limits. If it has a manifest, the next `lmaas apply` puts the manifest's values back."""
    body = _some(limits)
    context.show_one(_limited(context.client().send(table.CHANGE_TENANT, body, tenant=name)), TENANT)


@tenant.command("delete")
@click.argument("name")
@yes_option
@pass_context
def tenant_delete(context: Context, name: str, yes: bool) -> None:
    """Delete a tenant with its keys and adapters. Its usage stays, for the bill."""
    confirm(f"Delete the tenant '{name}'? Its keys stop working at once, and its adapters are deleted. This cannot be undone.", yes=yes)
    client = context.client()
    # Another tenant may get the name as soon as this one is gone, so the deletion, and a second try, are of an id.
    tenant_id = _tenant_id(client, name)
    try:
        answer = client.send(table.DELETE_TENANT, tenant=tenant_id)
    except (ApiError, SettingsError) as error:
        if isinstance(error, ApiError) and error.status < HTTPStatus.INTERNAL_SERVER_ERROR:
            raise
        error.message += f" To try again: lmaas tenant delete {tenant_id}"
        raise
    context.show_done(answer, f"The tenant '{name}' is deleted.")


def _tenant_id(client: "ApiClient", name: str) -> str:
    """Return a tenant's id. One that is deleted already is left to the service, which may have files of it to remove."""
    try:
        return str(client.send(table.GET_TENANT, tenant=name)["id"])
    except ApiError as error:
        if error.status != HTTPStatus.NOT_FOUND:
            raise
        return name


cli.add_command(model)
cli.add_command(replica)


# Tenants


@cli.group()
def key() -> None:
    """Manage API keys: a tenant's, or for an operator without --tenant those of operators."""


def _of_operators(context: Context) -> bool:
    return context.tenant is None and context.is_operator()


@key.command("list")
@pass_context
def key_list(context: Context) -> None:
    """List the keys, without their secrets."""
    operation = table.LIST_OPERATOR_KEYS if _of_operators(context) else table.LIST_KEYS
    context.show([_limited(row) for row in context.client().items(operation)], KEY)


@key.command("create")
@click.option("--role", type=click.Choice(["inference", "tenant_admin", "operator"]))
@click.option("--name", default="", help="A name by which people know the key.")
@limit_options
@pass_context
def key_create(context: Context, /, role: str | None, name: str, **limits: int | None) -> None:
    """Create a key, with limits of its own if given. The key itself is shown now and never again."""
    body = {"name": name} | ({"role": role} if role else {}) | _given(limits)
    created = context.client().send(table.CREATE_OPERATOR_KEY if _of_operators(context) else table.CREATE_KEY, body)
    context.show_one(created, ("id", "role", "name", "key"), "Keep the key: it is not shown again.")


@key.command("change")
@click.argument("key_id")
@limit_options
@pass_context
def key_change(context: Context, /, key_id: str, **limits: int | None) -> None:
    """Change the limits of a tenant's key."""
    body = _some(limits)
    context.show_one(_limited(context.tenant_client().send(table.CHANGE_KEY, body, key=key_id)), KEY)


@key.command("revoke")
@click.argument("key_id")
@yes_option
@click.option("--force", is_flag=True, help="Revoke the last operator's key as well, after which no operator can call the service.")
@pass_context
def key_revoke(context: Context, key_id: str, yes: bool, force: bool) -> None:
    """Revoke a key. It stops working within a second."""
    confirm(f"Revoke the key '{key_id}'? It stops working within a second, and cannot be restored.", yes=yes)
    operation = table.REVOKE_OPERATOR_KEY if _of_operators(context) else table.REVOKE_KEY
    try:
        answer = context.client().send(operation, query={"force": force or None}, key=key_id)
    except ApiError as error:
        if error.code != "last_operator_key":
            raise
        raise SettingsError(
            f"'{key_id}' is the last operator's key, without which no operator can call the service. Create another one first "
            "(`lmaas key create`), or add --force."
        ) from error
    context.show_one(_limited(answer), KEY)


@cli.group()
def adapter() -> None:
    """Manage a tenant's adapters."""


@adapter.command("list")
@pass_context
def adapter_list(context: Context) -> None:
    """List the adapters."""
    context.show(context.tenant_client().items(table.LIST_ADAPTERS), ADAPTER)


@adapter.command("upload")
@click.argument("name")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--base-model", required=True, help="The base model that the adapter was trained on.")
@click.option("--no-activate", is_flag=True, help="Do not make the version live.")
@pass_context
def adapter_upload(context: Context, name: str, folder: Path, base_model: str, no_activate: bool) -> None:
    """Upload FOLDER, as PEFT saves it, as a new version of the adapter NAME, unless a version has the same content."""
    from rich.console import Console
    from rich.progress import Progress

    from lmaas.adapters.safetensors import MODEL_FILE

    client = context.tenant_client()
    total = (folder / MODEL_FILE).stat().st_size if (folder / MODEL_FILE).is_file() else None
    with Progress(console=Console(stderr=True), transient=True, disable=context.as_json) as progress:
        task = progress.add_task(f"Uploading {name}", total=total)
        answer = client.upload(
            name, base_model, folder, activate=not no_activate, progress=lambda count: progress.update(task, advance=count)
        )
    context.show_one(answer, ("name", "version", "live_version", "rank", "target_modules", "size_bytes", "content_hash"))


@adapter.command("versions")
@click.argument("name")
@pass_context
def adapter_versions(context: Context, name: str) -> None:
    """List the versions of an adapter."""
    context.show(context.tenant_client().items(table.LIST_VERSIONS, name=name), VERSION)


@adapter.command("activate")
@click.argument("name")
@click.argument("version", type=int)
@pass_context
def adapter_activate(context: Context, name: str, version: int) -> None:
    """Make a version the live one. An older one is a rollback."""
    context.show_one(context.tenant_client().send(table.ACTIVATE_VERSION, {"version": version}, name=name), ADAPTER)


@adapter.command("delete")
@click.argument("name")
@yes_option
@pass_context
def adapter_delete(context: Context, name: str, yes: bool) -> None:
    """Delete an adapter with all its versions."""
    client = context.tenant_client()
    confirm(f"Delete the adapter '{name}' with all its versions? This cannot be undone.", yes=yes)
    context.show_done(client.send(table.DELETE_ADAPTER, name=name), f"The adapter '{name}' is deleted.")


cli.add_command(files)
cli.add_command(batches)
cli.add_command(webhooks)


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


cli.add_command(simulate)


def _cogs_line(line: dict[str, Any]) -> dict[str, Any]:
    """Return a line for people: seconds, and a name for the time that no tenant used."""
    seconds = {f"{phase}_s": ms / 1000 for phase, ms in line["engine_ms"].items()}
    return line | seconds | ({"tenant": "(no tenant)"} if line.get("tenant", "") is None else {})


def _wasted(row: dict[str, Any]) -> dict[str, Any]:
    """Return a line of usage with the reasons of its waste as one text."""
    return row | {"wasted": ", ".join(f"{code} {tokens}" for code, tokens in row.get("waste", {}).items())}


def _limited(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with its limits as one text: a tenant's with those of its tier, a key's own."""
    limits = row.get("effective_limits", row)
    names = [option.removeprefix("--").replace("-", "_") for option, _ in LIMIT_OPTIONS]
    return row | {"limits": ", ".join(f"{name} {limits[name]}" for name in names if limits.get(name) is not None) or "none"}


def _some(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given, of which a change needs at least one."""
    if not (given := _given(options)):
        raise click.UsageError("Give at least one option that says what to change; --help lists them.")
    return given


def _given(options: dict[str, Any]) -> dict[str, Any]:
    names = {option.removeprefix("--").replace("-", "_") for option, _ in LIMIT_OPTIONS}
    return {name: None if value == 0 and name in names else value for name, value in options.items() if value is not None}
