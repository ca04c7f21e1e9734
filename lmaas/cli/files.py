"""Commands for files, which are a tenant's own."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, get_args

import click

from lmaas.api import table
from lmaas.api.shapes.files import MAX_EXPIRY_S, MIN_EXPIRY_S, AnyPurpose, UploadPurpose
from lmaas.cli.context import Context, confirm, pass_context, yes_option
from lmaas.cli.progress import byte_bar
from lmaas.cli.streams import binary_output
from lmaas.errors import SettingsError

COLUMNS = ("id", "purpose", "bytes", "filename", "created_at", "expires_at")
EMPTY = "There are no files. Upload one: lmaas files upload PATH"
#: The target of a download to standard output.
STDOUT = "-"


@click.group()
def files() -> None:
    """Manage a tenant's files: input and output of batches, training data and others."""


@files.command("list")
@click.option("--purpose", type=click.Choice(get_args(AnyPurpose)), help="Files of this purpose alone.")
@pass_context
def files_list(context: Context, purpose: str | None) -> None:
    """List the files, newest first."""
    found = context.own_client().items(table.LIST_FILES, query={"purpose": purpose})
    context.show(found if context.as_json else [_for_people(file) for file in found], COLUMNS, EMPTY)


@files.command("upload")
@click.argument("path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--purpose", type=click.Choice(get_args(UploadPurpose)), default="batch", show_default=True, help="What the file is for.")
@click.option("--expires-after", type=click.IntRange(MIN_EXPIRY_S, MAX_EXPIRY_S), help="Seconds after which the file is deleted.")
@pass_context
def files_upload(context: Context, path: Path, purpose: str, expires_after: int | None) -> None:
    """Upload a file."""
    client = context.own_client()
    with byte_bar(context, f"Uploading {path.name}", path.stat().st_size) as progress:
        file = client.upload_file(path, purpose, expires_after_s=expires_after, progress=progress)
    _show(context, file)


@files.command("show")
@click.argument("file_id")
@pass_context
def files_show(context: Context, file_id: str) -> None:
    """Show what is known of a file."""
    _show(context, context.own_client().send(table.GET_FILE, file=file_id))


@files.command("download")
@click.argument("file_id")
@click.argument("target", required=False)
@pass_context
def files_download(context: Context, file_id: str, target: str | None) -> None:
    """Download a file to TARGET, by default under its own name in this folder; `-` is standard output."""
    client = context.own_client()
    if target == STDOUT:
        client.download(table.GET_FILE_CONTENT, binary_output(), file=file_id)
        return
    file = client.send(table.GET_FILE, file=file_id)
    path = Path(target) if target is not None else Path(_plain(str(file["filename"])))
    with byte_bar(context, f"Downloading {path.name}", int(file["bytes"])) as progress, _new(path) as written:
        client.download(table.GET_FILE_CONTENT, written, progress, file=file_id)
    context.show_done(file, f"The file '{file_id}' is in {path}.")


@files.command("delete")
@click.argument("file_id")
@yes_option
@pass_context
def files_delete(context: Context, file_id: str, yes: bool) -> None:
    """Delete a file."""
    confirm(f"Delete the file '{file_id}'? This cannot be undone.", yes=yes)
    context.show_done(context.own_client().send(table.DELETE_FILE, file=file_id), f"The file '{file_id}' is deleted.")


def _show(context: Context, file: dict[str, Any]) -> None:
    context.show_one(file if context.as_json else _for_people(file), COLUMNS)


def _for_people(file: dict[str, Any]) -> dict[str, Any]:
    """Return a file with its times as text."""
    times = {name: file[name] for name in ("created_at", "expires_at") if file[name] is not None}
    return file | {name: datetime.fromtimestamp(seconds, UTC).isoformat(" ", "seconds")[:19] for name, seconds in times.items()}


def _plain(name: str) -> str:
    """Return a file's name as one of this folder. Raises SettingsError for a path, because the service must not choose the folder."""
    if not name or name in (".", "..") or any(character in "/\\\0" for character in name):
        raise SettingsError("The name of the file cannot be used in this folder. Name a TARGET.")
    return name


@contextmanager
def _new(path: Path) -> Iterator[BinaryIO]:
    """Provide a new file, which is at its place after the block, complete. Raises SettingsError if there is one already."""
    partial = path.with_name(path.name + ".partial")
    if path.exists():
        raise SettingsError(f"{path} exists already. Name another TARGET, or remove it.")
    try:
        with partial.open("wb") as file:
            yield file
        partial.rename(path)
    except OSError as error:
        raise SettingsError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        partial.unlink(missing_ok=True)
