"""Commands for webhooks."""

import time
from typing import Any, get_args

import click

from lmaas.api import table
from lmaas.api.shapes.webhooks import EventName, State
from lmaas.cli.context import Context, confirm, pass_context, yes_option
from lmaas.errors import SettingsError

#: The most important first: on a narrow terminal the last ones are left out.
LISTED = ("id", "state", "url", "name", "event_types", "created_at")
SHOWN = (*LISTED, "disabled_reason", "failing_since", "dropped_events", "signing_secret_hint", "previous_secret_until")
CREATED = ("id", "url", "event_types", "signing_secret")
KEEP = "Keep the signing secret: it is not shown again."
DELIVERY = ("id", "type", "state", "attempts", "status_code", "error", "created_at", "next_attempt_at", "duration_ms")
#: The interval between polls of a delivery, and the maximum time, which is longer than an attempt takes.
LOOK_S, MOST_S = 0.5, 30.0
EVENTS = get_args(EventName)
_event_option = click.option(
    "--event",
    "events",
    multiple=True,
    metavar="TYPE",
    type=click.Choice(EVENTS),
    help=f"A type of events to send: {', '.join(EVENTS)}. May be repeated.",
)


@click.group()
def webhooks() -> None:
    """Manage a tenant's webhooks: URLs that get a signed request when a batch or a response in the background ends, or a budget is used."""


@webhooks.command("list")
@pass_context
def webhooks_list(context: Context) -> None:
    """List the webhooks, oldest first."""
    found = context.tenant_client().items(table.LIST_WEBHOOKS)
    context.show(found if context.as_json else [_for_people(row) for row in found], LISTED)


@webhooks.command("create")
@click.argument("url")
@click.option("--name", default="", help="A name by which people know the webhook.")
@_event_option
@pass_context
def webhooks_create(context: Context, url: str, name: str, events: tuple[str, ...]) -> None:
    """Create a webhook that sends events to URL, those of all types unless some are named. Its secret is shown now and never again."""
    body = {"url": url, "name": name, "event_types": list(events) or None}
    _show(context, context.tenant_client().send(table.CREATE_WEBHOOK, body), CREATED, KEEP)


@webhooks.command("show")
@click.argument("webhook_id")
@pass_context
def webhooks_show(context: Context, webhook_id: str) -> None:
    """Show a webhook, and why it is switched off."""
    _show(context, context.tenant_client().send(table.GET_WEBHOOK, webhook=webhook_id))


@webhooks.command("change")
@click.argument("webhook_id")
@click.option("--url", help="Where events are sent.")
@click.option("--name", help="A name by which people know the webhook.")
@_event_option
@click.option("--all-events", is_flag=True, help="Send events of all types, also those of later releases.")
@click.option("--on/--off", "enabled", default=None, help="Switch the webhook on or off.")
@pass_context
def webhooks_change(
    context: Context, webhook_id: str, url: str | None, name: str | None, events: tuple[str, ...], all_events: bool, enabled: bool | None
) -> None:
    """Change a webhook."""
    if events and all_events:
        raise click.UsageError("Name types with --event, or give --all-events, but not both.")
    body: dict[str, Any] = {key: value for key, value in (("url", url), ("name", name), ("enabled", enabled)) if value is not None}
    if events or all_events:
        body["event_types"] = list(events) or None
    if not body:
        raise click.UsageError("Give at least one option that says what to change; --help lists them.")
    _show(context, context.tenant_client().send(table.CHANGE_WEBHOOK, body, webhook=webhook_id))


@webhooks.command("delete")
@click.argument("webhook_id")
@yes_option
@pass_context
def webhooks_delete(context: Context, webhook_id: str, yes: bool) -> None:
    """Delete a webhook with its deliveries."""
    client = context.tenant_client()
    confirm(f"Delete the webhook '{webhook_id}'? Events that wait for it are not sent. This cannot be undone.", yes=yes)
    context.show_done(client.send(table.DELETE_WEBHOOK, webhook=webhook_id), f"The webhook '{webhook_id}' is deleted.")


@webhooks.command("rotate-secret")
@click.argument("webhook_id")
@click.option(
    "--overlap", type=click.IntRange(0), default=86_400, show_default=True, help="Seconds for which the earlier secret works too."
)
@pass_context
def webhooks_rotate(context: Context, webhook_id: str, overlap: int) -> None:
    """Replace the secret of a webhook. The new one is shown now and never again."""
    answer = context.tenant_client().send(table.ROTATE_WEBHOOK_SECRET, {"overlap_s": overlap}, webhook=webhook_id)
    _show(context, answer, ("id", "url", "previous_secret_until", "signing_secret"), KEEP)


@webhooks.command("test")
@click.argument("webhook_id")
@pass_context
def webhooks_test(context: Context, webhook_id: str) -> None:
    """Send a test event to a webhook, and show what came of it. Exit code 1 unless the target accepts it."""
    client = context.tenant_client()
    _followed(context, webhook_id, client.send(table.TEST_WEBHOOK, webhook=webhook_id))


@webhooks.command("deliveries")
@click.argument("webhook_id")
@click.option("--state", type=click.Choice(get_args(State)), help="Only those in this state.")
@click.option("--most", type=click.IntRange(1), default=100, show_default=True, help="The number of deliveries.")
@pass_context
def webhooks_deliveries(context: Context, webhook_id: str, state: str | None, most: int) -> None:
    """List the latest events that were sent to a webhook, or are to be sent, with the errors of failed attempts."""
    client = context.tenant_client()
    context.show(client.items(table.LIST_DELIVERIES, most=most, query={"state": state}, webhook=webhook_id), DELIVERY)


@webhooks.command("redeliver")
@click.argument("webhook_id")
@click.argument("event_id")
@pass_context
def webhooks_redeliver(context: Context, webhook_id: str, event_id: str) -> None:
    """Send an event again, under the same id, and show what came of it. Exit code 1 unless the target accepts it."""
    client = context.tenant_client()
    _followed(context, webhook_id, client.send(table.REDELIVER, webhook=webhook_id, event=event_id))


def _followed(context: Context, webhook_id: str, delivery: dict[str, Any]) -> None:
    """Wait for the next attempt of a delivery, and show it."""
    client, attempts, began = context.tenant_client(), delivery["attempts"], time.monotonic()
    while delivery["attempts"] == attempts and delivery["state"] == "pending":
        if time.monotonic() - began > MOST_S:
            raise SettingsError(
                f"The event {delivery['id']} was not sent within {MOST_S:g} s. Check that a job runner runs (`lmaas jobs`)."
            )
        time.sleep(LOOK_S)
        delivery = client.send(table.GET_DELIVERY, webhook=webhook_id, event=delivery["id"])
    context.show_one(delivery, DELIVERY)
    if delivery["state"] != "delivered":
        raise SettingsError(f"The target did not accept the event: {delivery['error']}")


def _show(context: Context, row: dict[str, Any], columns: tuple[str, ...] = SHOWN, remark: str | None = None) -> None:
    context.show_one(row if context.as_json else _for_people(row), columns, remark)


def _for_people(row: dict[str, Any]) -> dict[str, Any]:
    """Return a webhook with its state in one word, and its types as one text."""
    state = "off" if not row["enabled"] else "failing" if row["failing_since"] is not None else "on"
    return row | {"state": state, "event_types": "all" if row["event_types"] is None else ", ".join(row["event_types"])}
