"""Commands for API keys."""

from typing import Any

import click

from lmaas.api import table
from lmaas.cli.context import Context, confirm, pass_context, yes_option
from lmaas.cli.limits import given, limit_options, limited, some
from lmaas.cli.names import KEYS
from lmaas.errors import ApiError, SettingsError

#: The most important first: on a narrow terminal the last ones are left out.
KEY = ("id", "role", "revoked_at", "name", "limits", "prefix", "created_at", "expires_at")
EMPTY = "There are no keys. Create one: lmaas key create --role inference"


@click.group()
def key() -> None:
    """Manage API keys: a tenant's, or for an operator without --tenant those of operators."""


def _of_operators(context: Context) -> bool:
    return context.tenant is None and context.is_operator()


@key.command("list")
@pass_context
def key_list(context: Context) -> None:
    """List the keys, without their secrets."""
    operation = table.LIST_OPERATOR_KEYS if _of_operators(context) else table.LIST_KEYS
    context.show([limited(row) for row in context.client().items(operation)], KEY, EMPTY)


expiry_option = click.option(
    "--expires-in-days", type=click.IntRange(0, 3650), help="Days until the key stops working. 0: it does not expire."
)


def _with_expiry(body: dict[str, Any], days: int | None) -> dict[str, Any]:
    return body if days is None else body | {"expires_in_s": days * 86_400 or None}


@key.command("create")
@click.option("--role", type=click.Choice(["inference", "tenant_admin", "operator"]), help="What the key may do.")
@click.option("--name", default="", help="A name by which people know the key.")
@expiry_option
@limit_options
@pass_context
def key_create(context: Context, /, role: str | None, name: str, expires_in_days: int | None, **limits: int | None) -> None:
    """Create a key, with limits of its own if given. The key itself is shown now and never again."""
    body = _with_expiry({"name": name} | ({"role": role} if role else {}) | given(limits), expires_in_days)
    created = context.client().send(table.CREATE_OPERATOR_KEY if _of_operators(context) else table.CREATE_KEY, body)
    context.show_one(created, ("id", "role", "name", "key"), "Keep the key: it is not shown again.")


@key.command("change")
@click.argument("key_id", shell_complete=KEYS)
@expiry_option
@limit_options
@pass_context
def key_change(context: Context, /, key_id: str, expires_in_days: int | None, **limits: int | None) -> None:
    """Change the limits and the expiry of a tenant's key."""
    body = some(limits) if expires_in_days is None else _with_expiry(given(limits), expires_in_days)
    context.show_one(limited(context.tenant_client().send(table.CHANGE_KEY, body, key=key_id)), KEY)


@key.command("revoke")
@click.argument("key_id", shell_complete=KEYS)
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
    context.show_one(limited(answer), KEY)
