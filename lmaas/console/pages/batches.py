"""Batches: the list, one batch as it progresses, the lines that failed, and new batches."""

import json
from typing import Any, get_args

from starlette.responses import Response

from lmaas.api.shapes.batches import Endpoint
from lmaas.api.table import CANCEL_BATCH, CREATE_BATCH, GET_BATCH, GET_FILE_CONTENT, LIST_BATCHES, LIST_FILES
from lmaas.console.api import Unread
from lmaas.console.command import command
from lmaas.console.page import EVERYONE, Fields, Page, Section, Visit, errors_of, get, post
from lmaas.console.pages.files import MAX_UPLOAD_BYTES, store
from lmaas.errors import ApiError

LIST, NEW = "/batches", "/new-batch"
PAGE_SIZE = 20
FILES_OFFERED = 100
#: The part of an error file that is read, and the number of its lines that a page shows.
SHOWN_BYTES, SHOWN_LINES = 512 * 1024, 100
ENDPOINTS: tuple[str, ...] = get_args(get_args(Endpoint)[0])
#: Statuses in the colours of badges. Those that are not listed here have ended without success.
KINDS = {"completed": "good", "in_progress": "busy", "finalizing": "busy", "validating": "busy", "cancelling": "warn", "cancelled": "quiet"}
RUNNING = frozenset({"validating", "in_progress", "finalizing", "cancelling"})
_TIMES = (
    ("created_at", "Created"),
    ("in_progress_at", "First request"),
    ("finalizing_at", "Last request"),
    ("completed_at", "Completed"),
    ("failed_at", "Failed"),
    ("expired_at", "Expired"),
    ("cancelling_at", "Cancelled by a person"),
    ("cancelled_at", "Ended after the cancellation"),
)


async def show_list(visit: Visit) -> Response:
    """Show a page of the batches, newest first; for htmx their table only."""
    after = visit.query.get("after")
    reading = visit.api.send(LIST_BATCHES, query={"after": after, "limit": PAGE_SIZE})
    # If a part cannot be read, that is an error, so that the page keeps what it shows.
    found = {"batches": await reading} if visit.is_part else await visit.api.read_all(batches=reading)
    lines = [] if isinstance(found["batches"], Unread) else found["batches"]["data"]
    template = "batches_table.html" if visit.is_part else "batches.html"
    live = any(batch["status"] in RUNNING for batch in lines)
    return visit.render(template, after=after, kinds=KINDS, live=live, command=command(visit, "batches", "list"), **found)


async def show(visit: Visit) -> Response:
    """Show a batch; for htmx only what changes while it runs."""
    batch = await visit.api.send(GET_BATCH, batch=visit.path["batch"])
    failed: Any = []
    if batch["error_file_id"] and not visit.person.is_operator:
        failed = (await visit.api.read_all(lines=_failed_lines(visit, batch["error_file_id"])))["lines"]
    words = "show" if batch["status"] in RUNNING else "results"
    commands = [command(visit, "batches", words, batch["id"])]
    if batch["status"] in RUNNING:
        commands.append(command(visit, "batches", "cancel", batch["id"]))
    return visit.render(
        "batch_part.html" if visit.is_part else "batch.html",
        batch=batch,
        kinds=KINDS,
        live=batch["status"] in RUNNING,
        times=[(words, batch[name]) for name, words in _TIMES if batch[name] is not None],
        failed=failed,
        shown_lines=SHOWN_LINES,
        commands=commands,
    )


async def cancel(visit: Visit) -> Response:
    """Cancel a batch."""
    batch = visit.path["batch"]
    await visit.api.send(CANCEL_BATCH, batch=batch)
    return visit.redirect(f"{LIST}/{batch}", "The batch is being cancelled. Requests that have ended are kept.")


async def show_new(visit: Visit) -> Response:
    """Show the form of a new batch."""
    return await _form(visit, Fields({"input_file_id": visit.query.get("file", "")}))


async def create(visit: Visit) -> Response:
    """Create a batch from a new file or from one that was uploaded before."""
    typed = visit.form
    if visit.file("file") is None and not typed["input_file_id"]:
        missing = Fields({"file": "Choose a file from your computer, or one that was uploaded before."})
        return await _form(visit, typed, missing, 400)
    try:
        if visit.file("file") is not None:
            stored = await store(visit, "batch")
            # If the batch is refused, the form offers the file that is uploaded now.
            typed = typed.changed(input_file_id=stored["id"])
        body: dict[str, Any] = {"input_file_id": typed["input_file_id"], "endpoint": typed["endpoint"], "completion_window": "24h"}
        if name := typed["name"].strip():
            body["metadata"] = {"name": name}
        batch = await visit.api.send(CREATE_BATCH, body)
    except ApiError as error:
        if error.status in (401, 403):
            raise
        param = "name" if (error.param or "").startswith("metadata") else error.param
        shown = ApiError(error.status, error.message, error.code, error.request_id, param)
        return await _form(visit, typed, errors_of(shown, ("file", "input_file_id", "endpoint", "name")), error.status)
    return visit.redirect(f"{LIST}/{batch['id']}", "The batch was created. Its file is being checked.")


async def _form(visit: Visit, typed: Fields, errors: Fields | None = None, status: int = 200) -> Response:
    found = await visit.api.read_all(files=visit.api.send(LIST_FILES, query={"purpose": "batch", "limit": FILES_OFFERED}))
    endpoint = typed["endpoint"] or ENDPOINTS[0]
    shown = command(visit, "batches", "create", typed["input_file_id"] or "requests.jsonl", "--endpoint", endpoint)
    context = {"typed": typed, "errors": errors or Fields(), "command": shown, "endpoints": ENDPOINTS}
    return visit.render("batch_new.html", status=status, **context, **found)


async def _failed_lines(visit: Visit, file_id: str) -> list[dict[str, str]]:
    """Return the first lines of an error file: the id of each, its status, the code and the message of its error."""
    content = b""
    async with visit.api.stream("GET", visit.api.address(GET_FILE_CONTENT, {"file": file_id})) as response:
        async for chunk in response.aiter_bytes():
            content += chunk
            if len(content) >= SHOWN_BYTES or content.count(b"\n") >= SHOWN_LINES:
                break
    complete, _, _ = content.rpartition(b"\n")
    return [_failed_line(line) for line in complete.splitlines()[:SHOWN_LINES]]


def _failed_line(line: bytes) -> dict[str, str]:
    found = json.loads(line)
    response = found.get("response") or {}
    body = response.get("body")
    error = found.get("error") or (body.get("error") if isinstance(body, dict) else None) or {}
    return {
        "custom_id": str(found.get("custom_id", "")),
        "status": str(response.get("status_code", "")),
        "code": str(error.get("code") or ""),
        "message": str(error.get("message", "")),
    }


PAGE = Page(
    LIST,
    "Batches",
    Section.WORK,
    EVERYONE,
    (
        get(LIST, show_list),
        get(LIST + "/{batch}", show),
        post(LIST + "/{batch}/cancel", cancel),
        get(NEW, show_new),
        post(NEW, create, max_bytes=MAX_UPLOAD_BYTES),
    ),
    of_tenant=True,
)
