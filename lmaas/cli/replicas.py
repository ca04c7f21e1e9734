"""Commands about replicas."""

import click

from lmaas.cli.context import Context, address, pass_context
from lmaas.cli.models import troubles
from lmaas.states import START_PHASES

#: The most important first: on a narrow terminal the last ones are left out.
REPLICA = ("id", "base_model", "desired", "observed", "reason", "created_at", "ready_at", "url")


@click.group()
def replica() -> None:
    """Show and stop replicas."""


@replica.command("list")
@click.option("--ended", is_flag=True, help="Show also those that ended lately, and why.")
@pass_context
def replica_list(context: Context, ended: bool) -> None:
    """List the replicas that exist."""
    client = context.client()
    context.show(client.list("/admin/v1/replicas", ended="true" if ended else None), REPLICA)
    if not context.as_json:
        for line in troubles(client.list("/admin/v1/base-models")):
            click.echo(line)


@replica.command("show")
@click.argument("replica_id")
@pass_context
def replica_show(context: Context, replica_id: str) -> None:
    """Show a replica, and where the time of its start went."""
    row = context.client().call("GET", address("/admin/v1/replicas", replica_id))
    context.show_one(row, REPLICA)
    if row["start"] and not context.as_json:
        click.echo()
        context.show([row["start"]], ("by", *START_PHASES))


@replica.command("stop")
@click.argument("replica_id")
@pass_context
def replica_stop(context: Context, replica_id: str) -> None:
    """Drain a replica and stop it. Its requests finish; if there is demand, another starts."""
    context.show_one(context.client().call("DELETE", address("/admin/v1/replicas", replica_id)), ("id", "desired"))
