"""Every command of `lmaas`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from lmaas import config
from lmaas.admission.tiers import TIERS
from lmaas.cli.context import Context, pass_context
from lmaas.cli.models import model
from lmaas.cli.processes import PROCESSES
from lmaas.cli.replicas import replica
from lmaas.cli.simulate import simulate
from lmaas.errors import ApiError, LmaasError

TENANT = ("name", "id", "tier", "max_queued", "max_adapters", "limits", "created_at")
KEY = ("id", "role", "name", "prefix", "limits", "created_at", "revoked_at")
ADAPTER = ("name", "base_model", "live_version", "latest_version", "created_at")
VERSION = ("version", "rank", "target_modules", "size_bytes", "content_hash", "created_at")
TOKENS = ("prompt_tokens", "cached_tokens", "completion_tokens")
USAGE = ("day", "tenant", "model", "requests", "failed_requests", *TOKENS, "run_ms", "charge_microusd")
EVENT = ("created_at", "request_id", "model", "status", "code", "prompt_tokens", "completion_tokens", "queue_ms", "load_ms", "run_ms")
LIMIT_OPTIONS = (
    ("--requests-per-minute", "Requests accepted in any 60 seconds."),
    ("--tokens-per-minute", "Prompt and completion tokens in any 60 seconds."),
    ("--max-concurrent", "Requests that wait or run at once."),
    ("--tokens-per-month", "Prompt and completion tokens in a calendar month (UTC)."),
    ("--budget-per-month", "Micro-dollars in a calendar month (UTC)."),
)
COGS = ("starting_s", "loading_s", "busy_s", "idle_s", "cost_microusd", "charge_microusd", "margin_microusd", "margin_ratio")

Command = TypeVar("Command", bound=Callable[..., None])


def limit_options(command: Command) -> Command:
    """The options for limits of a tenant or a key."""
    for option, text in reversed(LIMIT_OPTIONS):
        command = click.option(option, type=int, help=f"{text} 0: no limit of its own.")(command)
    return command


def tenant_options(command: Command) -> Command:
    """The options for a tenant's tier and limits."""
    command = limit_options(command)
    command = click.option("--max-adapters", type=int, help="Adapter names.")(command)
    command = click.option("--max-queued", type=int, help="Requests that may wait at once.")(command)
    return click.option("--tier", type=click.Choice(list(TIERS)), help="Share of the engines, and limits unless others are given.")(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="JSON instead of tables.")
@click.option("--tenant", "-t", help="Whose adapters, keys or usage are meant, for an operator.")
@click.pass_context
def cli(context: click.Context, as_json: bool, tenant: str | None) -> None:
    """Serverless, multi-tenant LLM endpoints."""
    context.obj = Context(config.load(), as_json, tenant)


def main() -> None:
    """Run a command; what goes wrong is one line on standard error and exit code 1."""
    try:
        cli(prog_name="lmaas")
    except ApiError as error:
        reference = f" ({error.code}, {error.request_id})" if error.request_id else ""
        click.echo(f"lmaas: {error.message}{reference}", err=True)
        sys.exit(1)
    except LmaasError as error:
        click.echo(f"lmaas: {error.message}", err=True)
        sys.exit(1)


for process in PROCESSES:
    cli.add_command(process)


# Operators


@cli.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@pass_context
def apply(context: Context, folder: Path) -> None:
    """Make the service match the manifests in FOLDER. Running it again changes nothing."""
    from lmaas.manifests.apply import apply as apply_manifests
    from lmaas.manifests.apply import read_folder
    from lmaas.manifests.models import read_models

    manifests, models = read_folder(folder), read_models(folder)
    if not manifests and not models:
        raise click.UsageError(f"There are no manifests (*.yaml) in {folder}.")
    changes = apply_manifests(manifests, context.client(), models)
    context.show(
        [{"thing": change.thing, "name": change.name, "outcome": change.outcome} for change in changes], ("thing", "name", "outcome")
    )


@cli.group()
def tenant() -> None:
    """Tenants."""


@tenant.command("list")
@pass_context
def tenant_list(context: Context) -> None:
    """Every tenant."""
    context.show([_limited(row) for row in context.client().list("/admin/v1/tenants")], TENANT)


@tenant.command("create")
@click.argument("name")
@tenant_options
@pass_context
def tenant_create(context: Context, /, name: str, **limits: Any) -> None:
    """A new tenant."""
    body: dict[str, Any] = {"name": name} | _given(limits)
    context.show_one(_limited(context.client().call("POST", "/admin/v1/tenants", json=body)), TENANT)


@tenant.command("change")
@click.argument("name")
@tenant_options
@pass_context
def tenant_change(context: Context, /, name: str, **limits: Any) -> None:
    """Another tier or other limits for a tenant."""
    context.show_one(_limited(context.client().call("PATCH", f"/admin/v1/tenants/{name}", json=_given(limits))), TENANT)


@tenant.command("delete")
@click.argument("name")
@click.confirmation_option(prompt="Its keys stop at once and its adapters are deleted. Go on?")
@pass_context
def tenant_delete(context: Context, name: str) -> None:
    """End a tenant."""
    context.show_one(context.client().call("DELETE", f"/admin/v1/tenants/{name}"), ("id", "deleted"))


cli.add_command(model)
cli.add_command(replica)


# Tenants


@cli.group()
def key() -> None:
    """API keys: a tenant's, or with neither --tenant nor LMAAS_API_KEY the operators'."""


def _keys(context: Context) -> str:
    if context.tenant is None and not context.settings.api_key:
        return "/admin/v1/keys"
    return context.client().own("/keys")


@key.command("list")
@pass_context
def key_list(context: Context) -> None:
    """The keys, without their secrets."""
    context.show([_limited(row) for row in context.client().list(_keys(context))], KEY)


@key.command("create")
@click.option("--role", type=click.Choice(["inference", "tenant_admin", "operator"]))
@click.option("--name", default="", help="For people, to tell keys apart.")
@limit_options
@pass_context
def key_create(context: Context, /, role: str | None, name: str, **limits: int | None) -> None:
    """A new key, with limits of its own if given. Its secret is shown now and never again."""
    body = {"name": name} | ({"role": role} if role else {}) | _given(limits)
    created = context.client().call("POST", _keys(context), json=body)
    context.show_one(created, (*KEY[:4], "key"), "Keep the key: it is not shown again.")


@key.command("change")
@click.argument("key_id")
@limit_options
@pass_context
def key_change(context: Context, /, key_id: str, **limits: int | None) -> None:
    """Other limits for a tenant's key."""
    context.show_one(_limited(context.client().call("PATCH", f"{_keys(context)}/{key_id}", json=_given(limits))), KEY)


@key.command("revoke")
@click.argument("key_id")
@pass_context
def key_revoke(context: Context, key_id: str) -> None:
    """Revoke a key: within a second it works nowhere."""
    context.show_one(_limited(context.client().call("DELETE", f"{_keys(context)}/{key_id}")), KEY)


@cli.group()
def adapter() -> None:
    """A tenant's adapters."""


@adapter.command("list")
@pass_context
def adapter_list(context: Context) -> None:
    """Every adapter."""
    client = context.tenant_client()
    context.show(client.list(client.own("/adapters")), ADAPTER)


@adapter.command("upload")
@click.argument("name")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--base-model", required=True, help="The base model that it was trained on.")
@click.option("--no-activate", is_flag=True, help="Leave the live version as it is.")
@pass_context
def adapter_upload(context: Context, name: str, folder: Path, base_model: str, no_activate: bool) -> None:
    """Upload FOLDER, as PEFT saved it, as a version of the adapter NAME: a new one, unless one has the same content already."""
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
    """The versions of an adapter."""
    client = context.tenant_client()
    context.show(client.list(client.own(f"/adapters/{name}/versions")), VERSION)


@adapter.command("activate")
@click.argument("name")
@click.argument("version", type=int)
@pass_context
def adapter_activate(context: Context, name: str, version: int) -> None:
    """Make a version the live one; an older one is a rollback."""
    client = context.tenant_client()
    context.show_one(client.call("POST", client.own(f"/adapters/{name}/activate"), json={"version": version}), ADAPTER)


@adapter.command("delete")
@click.argument("name")
@click.confirmation_option(prompt="All its versions are deleted. Go on?")
@pass_context
def adapter_delete(context: Context, name: str) -> None:
    """Delete an adapter."""
    client = context.tenant_client()
    context.show_one(client.call("DELETE", client.own(f"/adapters/{name}")), ("name", "deleted"))


@cli.command()
@click.option("--since", help="The first day, such as 2026-11-01 (UTC).")
@click.option("--until", help="The last day.")
@click.option("--events", is_flag=True, help="The latest single requests instead.")
@pass_context
def usage(context: Context, since: str | None, until: str | None, events: bool) -> None:
    """Requests, tokens and charges by day, tenant and model."""
    path = "/v1/usage" if context.settings.api_key and context.tenant is None else "/admin/v1/usage"
    if events:
        context.show(context.client().list(f"{path}/events", tenant=context.tenant), EVENT)
    else:
        context.show(context.client().list(path, tenant=context.tenant, since=since, until=until), USAGE)


@cli.command()
@click.option("--since", help="The first day, such as 2026-11-01 (UTC).")
@click.option("--until", help="The last day.")
@click.option("--by", default="day,tenant,adapter", show_default=True, help="Some of these.")
@pass_context
def cogs(context: Context, since: str | None, until: str | None, by: str) -> None:
    """What engines cost beside what tenants are charged, for operators."""
    answer = context.client().call("GET", "/admin/v1/cogs", params=_given({"since": since, "until": until, "by": by}))
    if context.as_json:
        context.show_one(answer, ())
        return
    who = [name for part in answer["by"] for name in {"adapter": ("base_model", "adapter")}.get(part, (part,))]
    lines = [*answer["data"], dict.fromkeys(who, "") | {who[0]: "total"} | answer["total"]]
    context.show([_cogs_line(line) for line in lines], (*who, *COGS))


cli.add_command(simulate)


def _cogs_line(line: dict[str, Any]) -> dict[str, Any]:
    """A line for people: seconds, and a name for what nobody used."""
    seconds = {f"{phase}_s": ms / 1000 for phase, ms in line["engine_ms"].items()}
    return line | seconds | ({"tenant": "(nobody)"} if line.get("tenant", "") is None else {})


def _limited(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its limits as one text: a tenant's as they hold, a key's own."""
    limits = row.get("effective_limits", row)
    names = [option.removeprefix("--").replace("-", "_") for option, _ in LIMIT_OPTIONS]
    return row | {"limits": ", ".join(f"{name} {limits[name]}" for name in names if limits.get(name) is not None) or "none"}


def _given(options: dict[str, Any]) -> dict[str, Any]:
    names = {option.removeprefix("--").replace("-", "_") for option, _ in LIMIT_OPTIONS}
    return {name: None if value == 0 and name in names else value for name, value in options.items() if value is not None}
