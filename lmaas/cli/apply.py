"""`lmaas apply`: the service as the manifests of a folder describe it."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lmaas.cli.adapters import weights_size
from lmaas.cli.context import Context, pass_context
from lmaas.cli.progress import byte_bar
from lmaas.cli.streams import is_terminal

if TYPE_CHECKING:
    from lmaas.manifests.client import ApiClient
    from lmaas.manifests.plan import Change


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.option("--dry-run", is_flag=True, help="Show the plan, and change nothing.")
@click.option("--yes", "-y", is_flag=True, help="Make the changes without asking.")
@pass_context
def apply(context: Context, folder: Path, dry_run: bool, yes: bool) -> None:
    """Make the service match the manifests in FOLDER (or one file).

    The plan is shown first. On a terminal, the command then asks before it makes the changes, unless --yes is given. Values that a manifest
    does not name become the service's defaults. Nothing is deleted. Everything is checked before the first change, and running it again
    changes nothing. See docs/reference/manifests.md.
    """
    from lmaas.manifests.folder import read_folder
    from lmaas.manifests.observe import observe
    from lmaas.manifests.plan import Outcome, plan

    manifests = read_folder(folder)
    if not manifests.models and not manifests.tenants:
        raise click.UsageError(f"There are no manifests (*.yaml or *.yml) in {folder}.")
    client = context.client()
    changes = plan(manifests, observe(manifests, client))
    asks = not dry_run and not yes and is_terminal(sys.stdin)
    has_changes = any(change.outcome is not Outcome.UNCHANGED for change in changes)
    if not context.as_json or (asks and has_changes):
        # The plan is no part of the JSON on standard output.
        _show_plan(changes, to_stderr=context.as_json)
    if not dry_run and has_changes:
        if asks:
            click.confirm("Make these changes?", abort=True, err=True)
        _execute(context, client, changes)
    if context.as_json:
        click.echo(json.dumps([_as_json(change) for change in changes], indent=2))
    elif dry_run:
        click.echo("Nothing was changed (--dry-run).")


def _show_plan(changes: "Sequence[Change]", *, to_stderr: bool) -> None:
    from lmaas.manifests.apply import planned, summary

    click.echo("\n".join([*(line for change in changes for line in planned(change)), summary(changes)]), err=to_stderr)


def _execute(context: Context, client: "ApiClient", changes: "Sequence[Change]") -> None:
    """Make the changes, and report each one that is done."""
    from lmaas.manifests.apply import execute
    from lmaas.manifests.plan import Outcome

    done: list[Change] = []

    def report(change: "Change") -> None:
        done.append(change)
        if not context.as_json:
            click.echo(f"{change.thing} {change.name}: {change.outcome}")

    execute(
        changes,
        client,
        report=report,
        uploading=lambda upload: byte_bar(context, f"Uploading {upload.tenant}/{upload.adapter}", weights_size(upload.folder)),
    )
    if not context.as_json:
        counts = {outcome: sum(change.outcome is outcome for change in done) for outcome in (Outcome.CREATED, Outcome.CHANGED)}
        click.echo(f"Done: {', '.join(f'{count} {outcome}' for outcome, count in counts.items() if count)}.")


def _as_json(change: "Change") -> dict[str, object]:
    return {
        "thing": change.thing,
        "name": change.name,
        "outcome": change.outcome,
        "file": str(change.path),
        "fields": [{"field": item.field, "old": item.old, "new": item.new} for item in change.fields],
        "notes": list(change.notes),
    }
