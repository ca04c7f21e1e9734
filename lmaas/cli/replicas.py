"""Commands about replicas."""

import click

from lmaas.api import table
from lmaas.cli.context import Context, pass_context
from lmaas.cli.models import troubles
from lmaas.cli.names import REPLICAS
from lmaas.states import START_PHASES

#: The latest replicas that `lmaas replica list --ended` shows.
MOST_ENDED = 100
#: The most important first: on a narrow terminal the last ones are left out.
REPLICA = ("id", "base_model", "desired", "observed", "reason", "created_at", "ready_at", "url")

EMPTY = "There are no replicas. One starts with the first request to a model."


@click.group()
def replica() -> None:
    """Show and stop replicas."""


@replica.command("list")
@click.option("--ended", is_flag=True, help="Show also those that ended lately, and why.")
@pass_context
def replica_list(context: Context, ended: bool) -> None:
    """List the replicas that exist."""
    client = context.client()
    context.show(client.items(table.LIST_REPLICAS, most=MOST_ENDED if ended else None, query={"ended": ended}), REPLICA, EMPTY)
    if not context.as_json:
        for line in troubles(client.items(table.LIST_MODELS)):
            context.say(line)


@replica.command("show")
@click.argument("replica_id", shell_complete=REPLICAS)
@pass_context
def replica_show(context: Context, replica_id: str) -> None:
    """Show a replica, and where the time of its start went."""
    row = context.client().send(table.GET_REPLICA, replica=replica_id)
    context.show_one(row, REPLICA)
    if row["start"] and not context.as_json:
        click.echo()
        context.show([row["start"]], ("by", *START_PHASES))


@replica.command("stop")
@click.argument("replica_id", shell_complete=REPLICAS)
@pass_context
def replica_stop(context: Context, replica_id: str) -> None:
    """Drain a replica and stop it. Its requests finish; if there is demand, another starts."""
    context.show_one(context.client().send(table.STOP_REPLICA, replica=replica_id), ("id", "desired"))
