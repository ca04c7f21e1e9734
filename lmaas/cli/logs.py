"""`lmaas logs`: the logs of all processes of a stack on this machine, in one stream."""

import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from lmaas.cli.context import Context, pass_context
from lmaas.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lmaas.cli.log_lines import LogLine

#: The interval between reads of the files while they are followed.
POLL_S = 0.25
MOST_LINES = 100_000
LEVELS = ("debug", "info", "warning", "error", "critical")
_STYLES = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "bold red", "DEBUG": "dim"}


@click.command()
@click.option("--process", "-p", "processes", multiple=True, metavar="NAME", help="Only of this process or replica. May be repeated.")
@click.option(
    "--level", type=click.Choice(["debug", "info", "warning", "error", "critical"], case_sensitive=False), help="From this level on."
)
@click.option("--request", metavar="ID", help="Only about this request (req_…).")
@click.option("--lines", "-n", type=click.IntRange(0, MOST_LINES), default=50, show_default=True, help="Past lines to show first.")
@click.option("--follow/--no-follow", "-f", default=True, show_default=True, help="Show new lines as they are written, until Ctrl-C.")
@pass_context
def logs(context: Context, processes: tuple[str, ...], level: str | None, request: str | None, lines: int, follow: bool) -> None:
    """Follow the logs of a stack on this machine.

    These are the logs under LMAAS_HOME: of the gateway, the controller, the job runner, the database, the queue, and of each replica its
    supervisor and its engine. They have no text of prompts or answers. Times are in UTC.
    """
    from lmaas.cli.log_files import PROCESSES, LogFolder
    from lmaas.cli.log_lines import Filter

    home = context.settings.home
    folder = LogFolder(home, Filter(frozenset(processes), level.upper() if level else None, request))
    if not folder.has_logs():
        raise SettingsError(
            f"There are no logs in {home}. Start a stack with `lmaas up`, or set LMAAS_HOME to the home of the one that is meant. "
            "Processes that are started one by one log to their standard error."
        )
    known = folder.names() | set(PROCESSES)
    if unknown := next((name for name in processes if name not in known), None):
        raise click.UsageError(f"There is no log of '{unknown}'. Give a replica's id, or one of {', '.join(PROCESSES)}.")
    try:
        _print(context, folder.past(lines))
        # Ctrl-C is how a person ends this command, and no failure.
        with suppress(KeyboardInterrupt):
            while follow:
                _print(context, folder.new())
                time.sleep(POLL_S)
    finally:
        folder.close()


def _print(context: Context, lines: "Iterable[LogLine]") -> None:
    from rich.console import Console
    from rich.text import Text

    from lmaas.cli.log_lines import as_json, shown

    console = Console(soft_wrap=True)
    today = datetime.now(UTC).date()
    for line in lines:
        if context.as_json:
            click.echo(as_json(line))
        elif console.is_terminal:
            console.print(Text(shown(line, today), _STYLES.get(line.level, "")))
        else:
            click.echo(shown(line, today))
