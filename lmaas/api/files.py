"""Handlers for files, which are a tenant's own: operators do not see them."""

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack
from typing import Any
from urllib.parse import quote

from msgspec import UNSET
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from lmaas.api.context import Api, ApiCall
from lmaas.api.decoding import decode
from lmaas.api.operation import page_of
from lmaas.api.shapes.common import Page
from lmaas.api.shapes.files import ANCHOR, SECONDS, DeletedFile, File, FileQuery, FileUpload
from lmaas.api.uploads import FORM_OVERHEAD_BYTES, UploadForm, announced_bytes, read_upload
from lmaas.errors import InvalidRequest, LmaasError, TooLarge
from lmaas.files.drafts import too_large
from lmaas.files.service import UPLOADED, Purpose, Written
from lmaas.store import files as rows
from lmaas.store.paging import Part

log = logging.getLogger(__name__)

FIELD = "file"
TEXTS = ("purpose", ANCHOR, SECONDS)
MEDIA = "application/octet-stream"
#: OpenAI's default for input files of batches. Other files are kept.
BATCH_EXPIRY_S = 30 * 86400
_SERVICE = "Files of the purpose '{purpose}' are written by the service itself and cannot be uploaded."
_OTHER = "The purpose '{purpose}' belongs to an API of OpenAI that this service lacks."
#: Purposes that OpenAI's clients know, and why they cannot be uploaded here.
REFUSED = {
    "assistants": _OTHER,
    "assistants_output": _OTHER,
    "vision": _OTHER,
    Purpose.BATCH_OUTPUT.value: _SERVICE,
    Purpose.FINE_TUNE_RESULTS.value: _SERVICE,
}


def shown_file(file: rows.File) -> File:
    """Return a file as the API shows it."""
    return File(
        id=file.id,
        bytes=file.size_bytes,
        created_at=int(file.created_at.timestamp()),
        expires_at=None if file.expires_at is None else int(file.expires_at.timestamp()),
        filename=file.filename,
        purpose=file.purpose,  # type: ignore[arg-type]  # the database has only these purposes
        status="processed",
        status_details=None,
    )


async def create_file(api: Api, call: ApiCall[None, None]) -> File:
    """Store a file."""
    tenant_id, files = call.tenant_id, api.files
    await files.check_room(tenant_id, max(announced_bytes(call.request) - FORM_OVERHEAD_BYTES, 0))
    async with files.uploading(tenant_id) as draft:
        try:
            form = await read_upload(call.request, files.max_bytes + FORM_OVERHEAD_BYTES, FIELD, TEXTS, draft.write)
        except TooLarge:
            # Also if it is the form that is too large: nothing else in it may be.
            raise too_large(files.max_bytes) from None
        asked = _asked(form)
        expires_after_s = asked.expires_after_s if isinstance(asked.expires_after_s, int) else None
        purpose = Purpose(asked.purpose)
        if expires_after_s is None and purpose is Purpose.BATCH:
            expires_after_s = BATCH_EXPIRY_S
        written = Written(purpose, form.filename, draft, expires_after_s)
        return shown_file(await files.upload(tenant_id, written, audit=call.audit))


def _asked(form: UploadForm) -> FileUpload:
    """Return the fields of a form. Raises InvalidRequest."""
    purpose = form.texts.get("purpose", "")
    if purpose in REFUSED:
        words = f"{REFUSED[purpose].format(purpose=purpose)} Use one of: {', '.join(UPLOADED)}."
        raise InvalidRequest(words, code="invalid_purpose", param="purpose")
    asked = decode(FileUpload, form.texts | {FIELD: ""}, text=True)
    if (asked.expires_after_anchor is UNSET) != (asked.expires_after_s is UNSET):
        missing = ANCHOR if asked.expires_after_anchor is UNSET else SECONDS
        raise InvalidRequest(f"'{missing}' is required with the other field of 'expires_after'.", code="missing_parameter", param=missing)
    return asked


async def list_files(api: Api, call: ApiCall[None, FileQuery]) -> Page[File]:
    """Return a page of the tenant's files."""
    asked = call.query
    newest_first = asked.order == "desc"
    found = await rows.list_files(api.db, call.tenant_id, Part(asked.limit, asked.after), purpose=asked.purpose, newest_first=newest_first)
    return page_of([shown_file(file) for file in found], [file.id for file in found], asked.limit)


async def get_file(api: Api, call: ApiCall[None, None]) -> File:
    """Return what is known of a file."""
    return shown_file(await api.files.get(call.tenant_id, call.path["file"]))


async def get_content(api: Api, call: ApiCall[None, None]) -> Response:
    """Return the bytes of a file, as it was uploaded."""
    file = await api.files.get(call.tenant_id, call.path["file"])
    headers = {
        "content-disposition": disposition(file.filename),
        # No browser may run a tenant's file, whatever its content.
        "x-content-type-options": "nosniff",
    }
    return await download(api, call, file, MEDIA, headers)


async def download(api: Api, call: ApiCall[Any, Any], file: rows.File, media_type: str, headers: Mapping[str, str]) -> Response:
    """Return a response with the bytes of a file. Raises OverLimit if the tenant has too many downloads at once, NotFound if the file was
    deleted meanwhile, and Unavailable."""
    headers = {**headers, "content-length": str(file.size_bytes)}
    if call.request.method == "HEAD":
        return Response(headers=headers, media_type=media_type)
    with ExitStack() as slot:
        slot.enter_context(api.files.downloading(call.tenant_id))
        pieces = api.files.stream(file)
        # Until the first piece is there, what goes wrong is an error response.
        first = [await anext(pieces, b"")]
        return Download(_all(first, pieces, call), media_type, headers, slot.pop_all())


class Download(StreamingResponse):
    """A file on its way to a client. It closes `slot` when it has ended."""

    def __init__(self, pieces: AsyncIterator[bytes], media_type: str, headers: Mapping[str, str], slot: ExitStack) -> None:
        super().__init__(pieces, headers=headers, media_type=media_type)
        self._slot = slot

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        with self._slot:
            await super().__call__(scope, receive, send)


async def _all(first: list[bytes], rest: AsyncIterator[bytes], call: ApiCall[Any, Any]) -> AsyncIterator[bytes]:
    try:
        yield first.pop()
        async for piece in rest:
            yield piece
    except LmaasError as error:
        # The client receives less than was announced, and so sees that a part is missing.
        extra = {"request_id": call.request.scope["request_id"], "tenant_id": call.tenant_id, "action": "file.download"}
        log.warning("a download was cut off", extra=extra | {"detail": error.message})
        raise ClientDisconnect from error


def disposition(filename: str) -> str:
    """Return the Content-Disposition of a download: the name in ASCII for old clients, and as it is (RFC 6266)."""
    plain = "".join(letter if " " <= letter <= "~" and letter not in '"\\%' else "_" for letter in filename)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}"


async def delete_file(api: Api, call: ApiCall[None, None]) -> DeletedFile:
    """Delete a file."""
    await api.files.delete(call.tenant_id, call.path["file"], audit=call.audit)
    return DeletedFile(id=call.path["file"], deleted=True)
