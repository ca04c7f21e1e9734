"""The lines of a batch's input file: where each begins, and the request in it."""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from lmaas.errors import InvalidRequest
from lmaas.http import checked_strings, parse_object

#: The maximum size of a line besides its request: the ids, the URL, and white space.
ENVELOPE_BYTES = 64 * 1024
#: The endpoint of Anthropic's batches.
MESSAGES = "/v1/messages"
_BOM = b"\xef\xbb\xbf"
_BLANK = re.compile(rb"[ \t\r\n]+")
#: The field of a line that has the request, by the protocol's path; `body` otherwise.
_REQUEST_FIELDS = {MESSAGES: "params"}


def request_field(endpoint: str) -> str:
    """Return the field of a line that has the request, for batches to this endpoint."""
    return _REQUEST_FIELDS.get(endpoint, "body")


def request_body(endpoint: str, text: bytes, texts: Collection[str]) -> dict[str, Any]:
    """Return the request of a line, parsed as the body of a request over HTTP is: `lmaas.http.parse_json` describes `texts` and the errors.

    Raises InvalidRequest.
    """
    field = request_field(endpoint)
    body = parse_object(text, "line").get(field)
    if not isinstance(body, dict):
        raise InvalidRequest(f"'{field}' must be a JSON object.", code="invalid_json", param=field)
    return checked_strings(body, text, texts, field)


@dataclass(frozen=True, slots=True)
class Line:
    """A line that is not blank. `number` counts all lines from 1, `offset` is its place in the file in bytes.

    `text` has no end of line. It is None for a line that is too long, which is not kept.
    """

    number: int
    offset: int
    text: bytes | None


class LineSplitter:
    """Divides a file into its lines, chunk by chunk. It holds one line of at most `max_bytes` at a time."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._number, self._offset = 1, 0
        #: The line that has begun, and its bytes in all, of which a line that is too long keeps none.
        self._held, self._size = bytearray(), 0

    def feed(self, chunk: bytes) -> Iterator[Line]:
        """Yield the lines that these bytes complete."""
        start = 0
        while True:
            if not self._size and (blank := _BLANK.match(chunk, start)) is not None:
                # Blank lines at once, because a file may consist of them.
                text = chunk.rfind(b"\n", start, blank.end()) + 1 or start
                self._number += chunk.count(b"\n", start, text)
                self._offset += text - start
                start = text
            end = chunk.find(b"\n", start)
            if end < 0:
                break
            self._hold(chunk[start:end])
            start = end + 1
            yield from self._ended()
        self._hold(chunk[start:])

    def close(self) -> Iterator[Line]:
        """Yield the last line, if it has no end."""
        yield from self._ended()

    def _hold(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size <= self._max_bytes:
            self._held += piece
        else:
            self._held.clear()

    def _ended(self) -> Iterator[Line]:
        text: bytes | None = bytes(self._held) if self._size <= self._max_bytes else None
        number, offset = self._number, self._offset
        if offset == 0 and text is not None and text.startswith(_BOM):
            text, offset = text[len(_BOM) :], len(_BOM)
        self._number, self._offset = number + 1, self._offset + self._size + 1
        self._held.clear()
        self._size = 0
        if text is None or text.strip(b" \t\r"):
            yield Line(number, offset, text)
