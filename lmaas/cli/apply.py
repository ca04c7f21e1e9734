"""`lmaas apply`: the service as the manifests of a folder describe it."""

import json
from pathlib import Path

import click

from lmaas.cli.context import Context, pass_context


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.option("--dry-run", is_flag=True, help="Show what would change, and change nothing.")
@pass_context
def apply(context: Context, folder: Path, dry_run: bool) -> None:
    """Make the service match the manifests in FOLDER (or one file).

    Values that a manifest does not name become the service's defaults. Nothing is deleted. Everything is checked before the first change,
    and running it again changes nothing. See docs/reference/manifests.md.
    """
    from lmaas.manifests.apply import apply as apply_manifests
    from lmaas.manifests.apply import described
    from lmaas.manifests.folder import read_folder
    from lmaas.manifests.plan import Outcome

    manifests = read_folder(folder)
    if not manifests.models and not manifests.tenants:
        raise click.UsageError(f"There are no manifests (*.yaml or *.yml) in {folder}.")
    changes = apply_manifests(manifests, context.client(), dry_run=dry_run)
    if context.as_json:
        rows = [
            {
                "thing": change.thing,
                "name": change.name,
                "outcome": change.outcome,
                "file": str(change.path),
                "fields": [{"field": item.field, "old": item.old, "new": item.new} for item in change.fields],
                "notes": list(change.notes),
            }
            for change in changes
        ]
        click.echo(json.dumps(rows, indent=2))
        return
    for change in changes:
        if change.outcome is not Outcome.UNCHANGED or change.notes:
            click.echo("\n".join(described(change, dry_run=dry_run)))
    unchanged = sum(change.outcome is Outcome.UNCHANGED for change in changes)
    if unchanged:
        click.echo(f"{unchanged} of {len(changes)} unchanged.")
    if dry_run:
        click.echo("Nothing was changed (--dry-run).")
