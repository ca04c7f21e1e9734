"""Multipart forms: reading them within a limit, and refusing what is malformed."""

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from lmaas.errors import InvalidRequest
from lmaas.http import limited

MULTIPART = b"multipart/form-data"
#: The charsets of field names and text fields. Any other codec of Python's may fail in its own way, or not be text at all.
CHARSETS = frozenset({b"utf-8", b"utf8", b"us-ascii", b"ascii", b"iso-8859-1", b"latin-1", b"latin1"})


class _Parser(MultiPartParser):
    """Notices when a form lacks its end, which Starlette's parser takes for a form without the part that was cut."""

    _complete = False

    def on_end(self) -> None:
        self._complete = True

    async def parse(self) -> FormData:
        """Raises MultiPartException for a malformed form, and LookupError or ValueError for headers of parts that cannot be decoded."""
        form = await super().parse()
        if not self._complete:
            for file in self._files_to_close_on_error:
                file.close()
            raise MultiPartException("it ends before its last boundary. Send it again.")
        return form


@asynccontextmanager
async def multipart_form(request: Request, limit_bytes: int, *, max_files: int, max_fields: int) -> AsyncIterator[FormData]:
    """Read a multipart form; large files go to disk, and are closed at the end of the block.

    Raises TooLarge above `limit_bytes`, InvalidRequest `invalid_multipart` for a body that is not such a form.
    """
    form_encoding(request.headers.get("content-type", ""))
    limited_request = Request(request.scope, limited(request.receive, request.scope, limit_bytes))
    try:
        async with aclosing(limited_request.stream()) as stream:
            form = await _Parser(request.headers, stream, max_files=max_files, max_fields=max_fields).parse()
    except MultiPartException as error:
        raise InvalidRequest(f"The request body is not a valid multipart form: {error.message}", code="invalid_multipart") from None
    except (LookupError, ValueError) as error:
        raise InvalidRequest("The request body is not a valid multipart form.", code="invalid_multipart") from error
    try:
        yield form
    finally:
        await form.close()


@dataclass(frozen=True, slots=True)
class FormEncoding:
    """The encoding of a multipart form: the boundary of its parts, and the charset of its texts."""

    boundary: bytes
    charset: str


def form_encoding(content_type: str) -> FormEncoding:
    """Read a Content-Type. Raises InvalidRequest for one that is not that of a multipart form."""
    kind, options = parse_options_header(content_type.encode("latin-1"))
    if kind != MULTIPART:
        raise InvalidRequest("Send the form as multipart/form-data, with a boundary in the Content-Type header.", code="invalid_multipart")
    charset = options.get(b"charset", b"utf-8")
    if charset.lower() not in CHARSETS:
        shown = charset[:50].decode("latin-1")
        raise InvalidRequest(f"The charset '{shown}' of the form is not supported. Use UTF-8.", code="invalid_multipart")
    boundary = options.get(b"boundary", b"")
    if not boundary:
        raise InvalidRequest("The Content-Type header of the form lacks a boundary.", code="invalid_multipart")
    return FormEncoding(boundary, charset.decode("latin-1"))
