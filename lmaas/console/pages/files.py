"""Files: the list, uploads, downloads."""

from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

from starlette.responses import Response, StreamingResponse

from lmaas.api.shapes.files import ANCHOR, SECONDS
from lmaas.api.table import CREATE_FILE, DELETE_FILE, GET_FILE, GET_FILE_CONTENT, LIST_FILES
from lmaas.console.command import command
from lmaas.console.page import Fields, Page, Section, Visit, errors_of, get, post
from lmaas.errors import ApiError
from lmaas.types import Role

LIST, UPLOAD = "/files", "/upload-file"
PAGE_SIZE = 50
MAX_UPLOAD_BYTES = 16 * 2**30
#: The purposes of an upload, in words. Result files have purposes of their own.
PURPOSES = (
    ("batch", "Requests of a batch"),
    ("fine-tune", "Training data"),
    ("evals", "Data of an evaluation"),
    ("user_data", "Anything else"),
)
RESULTS = (("batch_output", "Results of batches"), ("fine-tune-results", "Results of training"))
LIFETIMES = (("", "The default of its purpose"), ("86400", "One day"), ("604800", "7 days"))


async def show_list(visit: Visit) -> Response:
    """Show a page of the files, newest first."""
    purpose, after = visit.query.get("purpose", ""), visit.query.get("after")
    found = await visit.api.read_all(files=visit.api.send(LIST_FILES, query={"purpose": purpose, "after": after, "limit": PAGE_SIZE}))
    purposes = [("", "All"), *PURPOSES, *RESULTS]
    return visit.render(
        "files.html",
        purpose=purpose,
        purposes=purposes,
        names=dict(purposes),
        after=after,
        command=command(visit, "files", "list"),
        **found,
    )


async def show(visit: Visit) -> Response:
    """Show what is known of a file."""
    file = await visit.api.send(GET_FILE, file=visit.path["file"])
    commands = [command(visit, "files", "download", file["id"]), command(visit, "files", "delete", file["id"])]
    return visit.render("file.html", file=file, names=dict((*PURPOSES, *RESULTS)), commands=commands)


async def download(visit: Visit) -> Response:
    """Send the content of a file as a download, as it arrives."""
    file = await visit.api.send(GET_FILE, file=visit.path["file"])
    name = quote(file["filename"].rpartition("/")[2] or file["id"], safe="")
    headers = {
        "content-type": "application/octet-stream",
        "content-length": str(file["bytes"]),
        "content-disposition": f"attachment; filename*=UTF-8''{name}",
    }
    return StreamingResponse(_content(visit, file["id"]), headers=headers)


async def delete(visit: Visit) -> Response:
    """Delete a file."""
    await visit.api.send(DELETE_FILE, file=visit.path["file"])
    return visit.redirect(LIST, f"The file {visit.path['file']} was deleted.")


async def show_upload(visit: Visit) -> Response:
    """Show the form of an upload."""
    return _form(visit, Fields({"purpose": visit.query.get("purpose", "")}))


async def upload(visit: Visit) -> Response:
    """Upload a file."""
    try:
        stored = await store(visit, visit.form["purpose"], visit.form["lifetime"])
    except ApiError as error:
        if error.status in (401, 403):
            raise
        return _form(visit, visit.form, errors_of(error, ("purpose", "lifetime", "file")), error.status)
    return visit.redirect(f"{LIST}/{stored['id']}", f"{stored['filename']} was uploaded.")


async def store(visit: Visit, purpose: str, lifetime: str = "") -> dict[str, Any]:
    """Store the file of the form. Raises ApiError, also if none was chosen."""
    file = visit.file("file")
    if file is None:
        raise ApiError(400, "Choose a file.", "missing_parameter", "", "file")
    body = {"purpose": purpose} | ({ANCHOR: "created_at", SECONDS: lifetime} if lifetime else {})
    return await visit.api.send(CREATE_FILE, body, files={"file": (file.filename, file.file, "application/octet-stream")})


def _form(visit: Visit, typed: Fields, errors: Fields | None = None, status: int = 200) -> Response:
    purpose = typed["purpose"] or PURPOSES[0][0]
    shown = command(visit, "files", "upload", "PATH", "--purpose", purpose)
    context = {"typed": typed, "errors": errors or Fields(), "command": shown, "purposes": PURPOSES, "lifetimes": LIFETIMES}
    return visit.render("file_upload.html", status=status, **context)


async def _content(visit: Visit, file_id: str) -> AsyncIterator[bytes]:
    # Opened when the browser reads, so that a browser that goes before leaves nothing open.
    async with visit.api.stream("GET", visit.api.address(GET_FILE_CONTENT, {"file": file_id})) as upstream:
        async for chunk in upstream.aiter_bytes():
            yield chunk


PAGE = Page(
    LIST,
    "Files",
    Section.WORK,
    frozenset({Role.TENANT_ADMIN, Role.INFERENCE}),
    (
        get(LIST, show_list),
        get(LIST + "/{file}", show),
        get(LIST + "/{file}/content", download),
        post(LIST + "/{file}/delete", delete),
        get(UPLOAD, show_upload),
        post(UPLOAD, upload, max_bytes=MAX_UPLOAD_BYTES),
    ),
)
