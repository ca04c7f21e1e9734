"""Commands for tenants, which operators manage."""

from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lmaas.admission.tiers import TIERS
from lmaas.api import table
from lmaas.cli.context import Context, confirm, pass_context, yes_option
from lmaas.cli.limits import given, limit_options, limited, some
from lmaas.cli.names import TENANTS
from lmaas.errors import ApiError, SettingsError

if TYPE_CHECKING:
    from lmaas.manifests.client import ApiClient

#: The most important first: on a narrow terminal the last ones are left out.
TENANT = ("name", "id", "tier", "max_queued", "max_adapters", "limits", "created_at")
EMPTY = "There are no tenants. Create one: lmaas tenant create NAME"

Command = TypeVar("Command", bound=Callable[..., None])


def tenant_options(command: Command) -> Command:
    """Add the options for a tenant's tier and limits."""
    command = limit_options(command)
    command = click.option("--max-adapters", type=int, help="Adapters, each with any number of versions.")(command)
    command = click.option("--max-queued", type=int, help="Requests that may wait at once.")(command)
    return click.option("--tier", type=click.Choice(list(TIERS)), help="Share of the engines, and the limits that are not given.")(command)


@click.group()
def tenant() -> None:
    """Manage tenants, their tiers and limits."""


@tenant.command("list")
@pass_context
def tenant_list(context: Context) -> None:
    """List the tenants."""
    context.show([limited(row) for row in context.client().items(table.LIST_TENANTS)], TENANT, EMPTY)


@tenant.command("create")
@click.argument("name")
@tenant_options
@pass_context
def tenant_create(context: Context, /, name: str, **limits: Any) -> None:
    """Create a tenant."""
    body: dict[str, Any] = {"name": name} | given(limits)
    context.show_one(limited(context.client().send(table.CREATE_TENANT, body)), TENANT)


@tenant.command("change")
@click.argument("name", shell_complete=TENANTS)
@tenant_options
@pass_context
def tenant_change(context: Context, /, name: str, **limits: Any) -> None:
    """Change a tenant's tier or limits. If it has a manifest, the next `lmaas apply` puts the manifest's values back."""
    body = some(limits)
    context.show_one(limited(context.client().send(table.CHANGE_TENANT, body, tenant=name)), TENANT)


@tenant.command("delete")
@click.argument("name", shell_complete=TENANTS)
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
