"""`lmaas top`: what the pools and replicas of a service do, live."""

import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from lmaas.api import table
from lmaas.cli.context import Context, pass_context
from lmaas.cli.models import troubles
from lmaas.cli.streams import is_terminal
from lmaas.cli.tables import plain
from lmaas.errors import ApiError, SettingsError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from lmaas.manifests.client import ApiClient

#: Statuses that no later call changes.
REFUSED = (401, 403)
#: The lines of a view beside the rows of its tables: the title, two headings, empty lines, and those that count what is left out.
FRAME = 8


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The base models with their pools and the replicas of a service, as the API shows them, at a time (UTC)."""

    time: str
    pools: list[dict[str, Any]]
    replicas: list[dict[str, Any]]


@click.command()
@click.option("--once", is_flag=True, help="Show the present state and end. This is also what a pipe gets.")
@click.option("--interval", type=click.FloatRange(0.5, 3600), default=2.0, show_default=True, help="Seconds between two looks.")
@pass_context
def top(context: Context, once: bool, interval: float) -> None:
    """Show pools, queue and replicas live, until Ctrl-C.

    For operators. The numbers are those of the controller's last decision, at most two seconds old.
    """
    client = context.client()
    first = _look(client)
    if context.as_json:
        click.echo(json.dumps(asdict(first)))
        with suppress(KeyboardInterrupt):
            while not once:
                time.sleep(interval)
                click.echo(json.dumps(asdict(_look(client))))
    elif once or not is_terminal(sys.stdout):
        _print(context, first)
    else:
        with suppress(KeyboardInterrupt):
            _follow(context, client, first, interval)


def _look(client: "ApiClient") -> Snapshot:
    pools, replicas = client.items(table.LIST_MODELS), client.items(table.LIST_REPLICAS)
    return Snapshot(datetime.now(UTC).isoformat(timespec="seconds"), pools, replicas)


def _print(context: Context, snapshot: Snapshot) -> None:
    from rich.console import Console

    console = Console()
    narrow = console.is_terminal and not context.wide
    if not narrow:
        console.width = 10_000
    console.print(view(snapshot, None), soft_wrap=not narrow, crop=narrow)


def _follow(context: Context, client: "ApiClient", snapshot: Snapshot, interval: float) -> None:
    """Show the state again and again. While the service cannot be reached, the last state stays, with the reason."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    with Live(view(snapshot, console.height), console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.refresh()
            time.sleep(interval)
            trouble = ""
            try:
                snapshot = _look(client)
            except (ApiError, SettingsError) as error:
                if isinstance(error, ApiError) and error.status in REFUSED:
                    raise
                trouble = f"This is the state of {snapshot.time[11:19]}. {error.message}"
            live.update(view(snapshot, console.height, trouble))


def view(snapshot: Snapshot, height: int | None, trouble: str = "") -> "RenderableType":
    """Return the state as tables, the busiest pools first. With a `height`, rows beyond it are left out and counted."""
    from rich.console import Group
    from rich.text import Text

    pools = sorted(snapshot.pools, key=lambda row: (-row["pool"]["queued"], -row["pool"]["running"], -row["pool"]["desired"], row["name"]))
    replicas = snapshot.replicas
    queued, running = (sum(row["pool"][name] for row in pools) for name in ("queued", "running"))
    title = (
        f"{snapshot.time[11:19]} UTC   {_count(len(pools), 'pool')}   {_count(len(replicas), 'replica')}   {queued:,} queued   "
        f"{running:,} running"
    )
    notes = [*([trouble] if trouble else []), *troubles(pools)]
    shown_pools, shown_replicas = room(len(pools), len(replicas), None if height is None else height - len(notes) - FRAME)
    # A pool that works takes a second line, for the reason of what it does.
    reasons = [f"{row['name']}: {row['pool']['reason']}" for row in pools[:shown_pools] if row["pool"]["desired"] and row["pool"]["reason"]]
    if height is not None:
        reasons = reasons[: max(0, height - len(notes) - FRAME - shown_pools - shown_replicas)]
    parts: list[RenderableType] = [Text(title, "bold"), Text(), _pools(pools[:shown_pools])]
    parts += [_line(f"  {reason}", "dim") for reason in reasons]
    if len(pools) > shown_pools:
        parts.append(_line(f"… and {_count(len(pools) - shown_pools, 'more pool')}", "dim"))
    parts += [Text(), _replicas(replicas[:shown_replicas], snapshot.time) if replicas else Text("No replica runs.")]
    if len(replicas) > shown_replicas:
        parts.append(_line(f"… and {_count(len(replicas) - shown_replicas, 'more replica')}", "dim"))
    return Group(*parts, *(Text(plain(note), "yellow") for note in notes))


def _line(text: str, style: str) -> "Text":
    """Return one line, which ends in an ellipsis where there is no room for all of it."""
    from rich.text import Text

    return Text(plain(text), style, no_wrap=True, overflow="ellipsis")


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def room(pools: int, replicas: int, height: int | None) -> tuple[int, int]:
    """Return how many rows of each table are shown in a height: each gets half, and what the other does not need."""
    if height is None or pools + replicas <= height:
        return pools, replicas
    shown_pools = min(pools, max(1, height // 2, height - replicas))
    return shown_pools, min(replicas, max(1, height - shown_pools))


def _table(*columns: tuple[str, bool]) -> "Table":
    """Return an empty table of columns, each with whether it has numbers."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold")
    for name, is_number in columns:
        # Columns that wrap give way first. The cells of `pool` are single lines nevertheless.
        made.add_column(name, justify="right" if is_number else "left", no_wrap=name != "pool", overflow="ellipsis")
    return made


def _pools(rows: Sequence[dict[str, Any]]) -> "Table":
    numbers = ("queued", "running", "ready", "starting", "wanted", "lines")
    made = _table(("pool", False), *((name, True) for name in numbers))
    for row in rows:
        pool = row["pool"]
        values = (*(pool[name] for name in numbers[:-1]), pool["background"]["lines"])
        made.add_row(_line(row["name"], ""), *(f"{value:,}" for value in values))
    return made


def _replicas(rows: Sequence[dict[str, Any]], now: str) -> "Table":
    made = _table(("replica", False), ("state", False), ("wanted", False), ("age", True), ("pool", False))
    for row in rows:
        made.add_row(row["id"], row["observed"], row["desired"], age(row["created_at"], now), _line(row["base_model"], ""))
    return made


def age(since: str, now: str) -> str:
    """Return the time between two moments in its largest unit: 45 s, 12 min, 3 h, 9 d."""
    seconds = max(0, int((datetime.fromisoformat(now) - datetime.fromisoformat(since)).total_seconds()))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"
