"""Multipart forms with one file, which is written to its place while the form arrives."""

from collections.abc import Awaitable, Callable, Collection
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from lmaas.api.forms import FormEncoding, form_encoding
from lmaas.errors import InvalidRequest
from lmaas.http import limited

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

#: The part of a form besides its file: text fields of at most this many bytes, and the headers and boundaries of its parts.
MAX_TEXT_BYTES = 4096
FORM_OVERHEAD_BYTES = 256 * 1024
MAX_FILENAME = 255


@dataclass(slots=True)
class UploadForm:
    """The text fields of a form by name, and the name of its file, which has no control characters and is not a path. It is empty until the
    file begins."""

    texts: dict[str, str] = field(default_factory=dict)
    filename: str = ""


def announced_bytes(request: Request) -> int:
    """Return the length of the body that the request declares; 0 if it declares none, or if the body will be unpacked."""
    length = request.headers.get("content-length", "")
    return int(length) if length.isdigit() and len(length) < 20 and "content-encoding" not in request.headers else 0


async def read_upload(
    request: Request, limit_bytes: int, file_field: str, text_fields: Collection[str], write: Callable[[bytes], Awaitable[None]]
) -> UploadForm:
    """Read a form with a file in `file_field`, whose bytes go to `write` as they arrive, and texts in `text_fields`.

    Raises TooLarge above `limit_bytes`, and InvalidRequest for what is not such a form. The file may have been written in part then.
    """
    reader = _Reader(form_encoding(request.headers.get("content-type", "")), file_field, text_fields)
    limited_request = Request(request.scope, limited(request.receive, request.scope, limit_bytes))
    async with aclosing(limited_request.stream()) as stream:
        async for chunk in stream:
            for piece in reader.feed(chunk):
                await write(piece)
    return reader.end()


class _Reader:
    """Takes a form apart. The parser bounds the boundary, and the number and size of a part's headers."""

    def __init__(self, encoding: FormEncoding, file_field: str, text_fields: Collection[str]) -> None:
        self._charset, self._file_field, self._text_fields = encoding.charset, file_field, text_fields
        self._form = UploadForm()
        self._pieces: list[bytes] = []
        self._header_name = self._header_value = self._disposition = b""
        #: The text field of the present part; None in the file and between parts.
        self._text_field: str | None = None
        self._text = b""
        self._in_file = self._complete = False
        callbacks: MultipartCallbacks = {
            "on_part_begin": self._begin_part,
            "on_header_field": self._add_header_name,
            "on_header_value": self._add_header_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._add_data,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }
        try:
            self._parser = MultipartParser(encoding.boundary, callbacks)
        except FormParserError:
            raise _malformed("its boundary is too long.") from None

    def feed(self, chunk: bytes) -> list[bytes]:
        """Take bytes of the form, and return those of the file among them. Raises InvalidRequest."""
        self._pieces = []
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise _malformed(f"{str(error)[:200]}.") from None
        return self._pieces

    def end(self) -> UploadForm:
        """Return the form. Raises InvalidRequest if it is not complete."""
        if not self._complete:
            raise _malformed("it ends before its last boundary. Send it again.")
        if not self._form.filename:
            raise InvalidRequest(
                f"The form lacks its file. Send it in the field '{self._file_field}', with a file name.",
                code="missing_parameter",
                param=self._file_field,
            )
        return self._form

    def _begin_part(self) -> None:
        self._header_name = self._header_value = self._disposition = self._text = b""
        self._text_field, self._in_file = None, False

    def _add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise _malformed("a part has no name in its Content-Disposition.")
        name = self._decoded(options[b"name"], "The name of a form field")
        shown = name.replace("\0", "\ufffd")[:100]
        if name == self._file_field:
            if self._form.filename:
                raise InvalidRequest(f"The form has several files. Send one, in '{shown}'.", code="unexpected_field", param=shown)
            if b"filename" not in options:
                raise InvalidRequest(
                    f"The form field '{shown}' must be a file: its part needs a file name.", code="missing_parameter", param=shown
                )
            self._form.filename = _file_name(self._decoded(options[b"filename"], "The name of the file"), shown)
            self._in_file = True
        elif name not in self._text_fields or name in self._form.texts:
            raise InvalidRequest(f"The form field '{shown}' is not known, or given twice.", code="unexpected_field", param=shown)
        elif b"filename" in options:
            raise InvalidRequest(f"The form field '{shown}' must be text, not a file.", code="invalid_type", param=shown)
        else:
            self._text_field = name

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._pieces.append(data[start:end])
            return
        self._text += data[start:end]
        if len(self._text) > MAX_TEXT_BYTES:
            raise InvalidRequest(
                f"The form field '{self._text_field}' has more than {MAX_TEXT_BYTES:,} bytes, the maximum.",
                code="out_of_range",
                param=self._text_field,
            )

    def _end_part(self) -> None:
        if self._text_field is not None:
            text = self._decoded(self._text, f"The form field '{self._text_field}'")
            if "\0" in text:
                raise InvalidRequest(
                    f"The form field '{self._text_field}' holds the character NUL.", code="invalid_type", param=self._text_field
                )
            self._form.texts[self._text_field] = text

    def _end(self) -> None:
        self._complete = True

    def _decoded(self, value: bytes, what: str) -> str:
        try:
            return value.decode(self._charset)
        except UnicodeDecodeError:
            raise InvalidRequest(f"{what} is not valid {self._charset.upper()}.", code="invalid_multipart") from None


def _file_name(given: str, param: str) -> str:
    """Return the last part of what may be a path. Raises InvalidRequest if it cannot be a name."""
    name = given.replace("\\", "/").rsplit("/", 1)[-1]
    if not name.strip() or name in (".", ".."):
        words = "The file needs a name."
    elif any(ord(character) < 32 or 127 <= ord(character) < 160 for character in name):
        words = "The file's name has a control character, such as NUL. Rename it."
    elif len(name) > MAX_FILENAME:
        words = f"The file's name has {len(name):,} characters, and may have {MAX_FILENAME}. Shorten it."
    else:
        return name
    raise InvalidRequest(words, code="invalid_filename", param=param)


def _malformed(words: str) -> InvalidRequest:
    return InvalidRequest(f"The request body is not a valid multipart form: {words}", code="invalid_multipart")
