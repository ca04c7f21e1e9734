"""Commands for batches, in OpenAI's form."""

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from lmaas.api import table
from lmaas.api.shapes.batches import MAX_KEPT_S, MIN_KEPT_S, Endpoint
from lmaas.cli.context import Context, pass_context
from lmaas.cli.names import BATCHES
from lmaas.cli.progress import byte_bar, count_bar
from lmaas.cli.streams import binary_output
from lmaas.errors import SettingsError

if TYPE_CHECKING:
    from lmaas.manifests.client import ApiClient

#: The most important first: on a narrow terminal the last ones are left out.
LISTED = ("id", "status", "total", "completed", "failed", "endpoint", "created_at", "ended_at")
SHOWN = (*LISTED, "expires_at", "input_file_id", "output_file_id", "error_file_id", "input_tokens", "output_tokens", "metadata")
EMPTY = "There are no batches. Create one from a file of requests: lmaas batches create requests.jsonl"
FAULT = ("line", "code", "message")
ENDED = ("failed", "completed", "expired", "cancelled")
ENDPOINTS = get_args(get_args(Endpoint)[0])
#: The interval between polls of a batch that is followed.
FOLLOW_S = 1.0
_FILE_ID = "file-"
_follow_option = click.option("--follow", is_flag=True, help="Show a bar until the batch has ended. Exit code 1 unless it is completed.")


@click.group()
def batches() -> None:
    """Manage a tenant's batches: files of requests that run at a lower price when engines have room."""


@batches.command("list")
@click.option("--most", type=click.IntRange(1), default=100, show_default=True, help="The number of batches.")
@pass_context
def batches_list(context: Context, most: int) -> None:
    """List the batches, newest first."""
    found = context.tenant_client().items(table.LIST_BATCHES, most=most)
    context.show(found if context.as_json else [_for_people(batch) for batch in found], LISTED, EMPTY)


@batches.command("create")
@click.argument("requests")
@click.option("--endpoint", type=click.Choice(ENDPOINTS), default=ENDPOINTS[0], show_default=True, help="The URL of every line.")
@click.option("--metadata", multiple=True, metavar="KEY=VALUE", help="A pair to keep with the batch. May be repeated.")
@click.option("--results-expire-after", type=click.IntRange(MIN_KEPT_S, MAX_KEPT_S), help="Seconds for which result files are kept.")
@_follow_option
@pass_context
def batches_create(
    context: Context, requests: str, endpoint: str, metadata: tuple[str, ...], results_expire_after: int | None, follow: bool
) -> None:
    """Create a batch of REQUESTS: a file of JSON Lines, which is uploaded first, or the id of an uploaded one."""
    pairs = dict(_pair(each) for each in metadata)
    client = context.own_client()
    file_id = requests if requests.startswith(_FILE_ID) and not Path(requests).exists() else _uploaded(context, client, Path(requests))
    body: dict[str, Any] = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": "24h", "metadata": pairs}
    if results_expire_after is not None:
        body["output_expires_after"] = {"anchor": "created_at", "seconds": results_expire_after}
    _show_or_follow(context, client, client.send(table.CREATE_BATCH, body), follow)


@batches.command("show")
@click.argument("batch_id", shell_complete=BATCHES)
@_follow_option
@pass_context
def batches_show(context: Context, batch_id: str, follow: bool) -> None:
    """Show a batch, and what is wrong with its input file."""
    client = context.tenant_client()
    _show_or_follow(context, client, client.send(table.GET_BATCH, batch=batch_id), follow)


@batches.command("cancel")
@click.argument("batch_id", shell_complete=BATCHES)
@pass_context
def batches_cancel(context: Context, batch_id: str) -> None:
    """Cancel a batch. Requests that have ended are kept."""
    _show(context, context.tenant_client().send(table.CANCEL_BATCH, batch=batch_id))


@batches.command("results")
@click.argument("batch_id", shell_complete=BATCHES)
@click.option("--errors", is_flag=True, help="The requests that failed or did not run, instead of the answers.")
@pass_context
def batches_results(context: Context, batch_id: str, errors: bool) -> None:
    """Write the answers of a batch that has ended to standard output, one line for each."""
    client = context.own_client()
    batch = client.send(table.GET_BATCH, batch=batch_id)
    file_id = batch["error_file_id" if errors else "output_file_id"]
    if batch["status"] not in ENDED:
        raise SettingsError(
            f"The batch is {_words(batch['status'])}. Its results are written when it has ended: lmaas batches show --follow."
        )
    if batch["status"] == "failed":
        raise SettingsError("The batch failed, and none of its requests ran: lmaas batches show lists what is wrong with its input file.")
    if file_id is not None:
        client.download(table.GET_FILE_CONTENT, binary_output(), file=file_id)


def _uploaded(context: Context, client: "ApiClient", path: Path) -> str:
    if not path.is_file():
        raise click.UsageError(f"There is no file {path}. Name a file of JSON Lines, or the id of an uploaded one (file-…).")
    with byte_bar(context, f"Uploading {path.name}", path.stat().st_size) as progress:
        return str(client.upload_file(path, "batch", progress=progress)["id"])


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise click.UsageError(f"--metadata must be KEY=VALUE, not '{text}'.")
    return key, value


def _followed(context: Context, client: "ApiClient", batch: dict[str, Any]) -> dict[str, Any]:
    """Show a bar on the terminal until a batch has ended, and return the batch as it is then."""
    with count_bar(context, _words(batch["status"])) as show:
        while True:
            counts = batch["request_counts"]
            show(_words(batch["status"]), counts["completed"] + counts["failed"], counts["total"] or None)
            if batch["status"] in ENDED:
                return batch
            time.sleep(FOLLOW_S)
            batch = client.send(table.GET_BATCH, batch=batch["id"])


def _show_or_follow(context: Context, client: "ApiClient", batch: dict[str, Any], follow: bool) -> None:
    """Show a batch, with `follow` once it has ended. Then anything but `completed` is an error, as scripts expect."""
    if not follow:
        _show(context, batch)
        return
    try:
        batch = _followed(context, client, batch)
    except KeyboardInterrupt:
        click.echo(f"The batch goes on. To follow it again: lmaas batches show {batch['id']} --follow", err=True)
        raise click.exceptions.Exit(1) from None
    _show(context, batch)
    if batch["status"] != "completed":
        raise SettingsError(f"The batch ended as {batch['status']}, not as completed.")


def _words(status: str) -> str:
    return status.replace("_", " ")


def _show(context: Context, batch: dict[str, Any]) -> None:
    if context.as_json:
        context.show_one(batch, ())
        return
    context.show_one(_for_people(batch), SHOWN)
    if batch["errors"] is not None:
        click.echo()
        context.show(batch["errors"]["data"], FAULT)


def _for_people(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch in one piece: its counts and tokens, and its times as text."""
    ended: int | None = next((batch[f"{status}_at"] for status in ENDED if batch[f"{status}_at"] is not None), None)
    times = {"created_at": batch["created_at"], "expires_at": batch["expires_at"], "ended_at": ended}
    shown = {name: None if seconds is None else _moment(seconds) for name, seconds in times.items()}
    metadata = ", ".join(f"{key}={value}" for key, value in batch["metadata"].items()) or None
    facts: dict[str, Any] = batch["request_counts"] | batch["usage"]
    return batch | facts | shown | {"metadata": metadata}


def _moment(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(" ", "seconds")[:19]
