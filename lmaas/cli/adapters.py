"""Commands for adapters, which are a tenant's."""

from pathlib import Path

import click

from lmaas.api import table
from lmaas.cli.context import Context, confirm, pass_context, yes_option
from lmaas.cli.names import ADAPTERS, BASE_MODELS
from lmaas.cli.progress import byte_bar

#: The most important first: on a narrow terminal the last ones are left out.
ADAPTER = ("name", "base_model", "live_version", "latest_version", "activated_by", "created_at")
EMPTY = "There are no adapters. Upload one: lmaas adapter upload NAME FOLDER --base-model MODEL"
VERSION = ("version", "rank", "size_bytes", "content_hash", "created_at", "target_modules")


@click.group()
def adapter() -> None:
    """Manage a tenant's adapters."""


@adapter.command("list")
@click.option("--search", help="Only adapters whose names contain this text.")
@pass_context
def adapter_list(context: Context, search: str | None) -> None:
    """List the adapters."""
    context.show(context.tenant_client().items(table.LIST_ADAPTERS, query={"search": search}), ADAPTER, EMPTY)


@adapter.command("upload")
@click.argument("name", shell_complete=ADAPTERS)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--base-model", required=True, shell_complete=BASE_MODELS, help="The base model that the adapter was trained on.")
@click.option("--no-activate", is_flag=True, help="Do not make the version live.")
@pass_context
def adapter_upload(context: Context, name: str, folder: Path, base_model: str, no_activate: bool) -> None:
    """Upload FOLDER, as PEFT saves it, as a new version of the adapter NAME, unless a version has the same content."""
    client = context.tenant_client()
    with byte_bar(context, f"Uploading {name}", weights_size(folder)) as progress:
        answer = client.upload(name, base_model, folder, activate=not no_activate, progress=progress)
    context.show_one(answer, ("name", "version", "live_version", "rank", "target_modules", "size_bytes", "content_hash"))


@adapter.command("versions")
@click.argument("name", shell_complete=ADAPTERS)
@pass_context
def adapter_versions(context: Context, name: str) -> None:
    """List the versions of an adapter."""
    context.show(context.tenant_client().items(table.LIST_VERSIONS, name=name), VERSION)


@adapter.command("activate")
@click.argument("name", shell_complete=ADAPTERS)
@click.argument("version", type=int)
@pass_context
def adapter_activate(context: Context, name: str, version: int) -> None:
    """Make a version the live one. An older one is a rollback."""
    context.show_one(context.tenant_client().send(table.ACTIVATE_VERSION, {"version": version}, name=name), ADAPTER)


@adapter.command("delete")
@click.argument("name", shell_complete=ADAPTERS)
@yes_option
@pass_context
def adapter_delete(context: Context, name: str, yes: bool) -> None:
    """Delete an adapter with all its versions."""
    client = context.tenant_client()
    confirm(f"Delete the adapter '{name}' with all its versions? This cannot be undone.", yes=yes)
    context.show_done(client.send(table.DELETE_ADAPTER, name=name), f"The adapter '{name}' is deleted.")


def weights_size(folder: Path) -> int | None:
    """Return the size of an adapter's weights in bytes, None if the folder has none."""
    from lmaas.adapters.safetensors import MODEL_FILE

    path = folder / MODEL_FILE
    return path.stat().st_size if path.is_file() else None
