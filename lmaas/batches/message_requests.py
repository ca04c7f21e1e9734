"""Reads the body that creates a message batch in a stream: its requests become the lines of an input file."""

import asyncio
import codecs
import json
import re
from collections.abc import AsyncIterator, Iterator
from enum import StrEnum

from lmaas.batches.lines import ENVELOPE_BYTES, MESSAGES
from lmaas.batches.validation import Fault, Validator
from lmaas.errors import InvalidRequest

_START = re.compile(r'\s*\{\s*"requests"\s*:\s*\[\s*')
_SPACE = re.compile(r"\s*")
_END = re.compile(r"\s*\}\s*")
#: The maximum size of a body's beginning before the first request.
_MAX_START = 1024
_CUSTOM_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")


class _State(StrEnum):
    START = "start"
    #: A request must follow; in an empty list, its end.
    REQUEST = "request"
    #: A comma or the end of the list must follow.
    AFTER = "after"
    END = "end"


class RequestReader:
    """Divides a body `{"requests": [{"custom_id": …, "params": {…}}, …]}` into its requests, chunk by chunk.

    It holds one request at a time. `max_request_bytes` is the largest body of a request, `max_requests` the number of requests.
    """

    def __init__(self, max_request_bytes: int, max_requests: int) -> None:
        self._max_size = max_request_bytes + ENVELOPE_BYTES
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()
        self._text, self._state = "", _State.START
        #: Pieces that came after the text, and are not part of it until the text has the size `_wanted`.
        self._more: list[str] = []
        self._more_size = 0
        #: The size from which a request is tried again that was not complete.
        self._wanted = 0
        self._validator = Validator(MESSAGES, max_request_bytes, max_requests)
        self.count = 0

    def feed(self, chunk: bytes, *, last: bool = False) -> Iterator[bytes]:
        """Yield the lines of the requests that these bytes complete. After the `last` ones the body must be complete.

        Raises InvalidRequest.
        """
        try:
            more = self._decoder.decode(chunk, final=last)
        except UnicodeDecodeError:
            raise _invalid("it is not UTF-8") from None
        self._more.append(more)
        self._more_size += len(more)
        if len(self._text) + self._more_size < self._wanted and not last:
            return
        self._text += "".join(self._more)
        self._more.clear()
        self._more_size = 0
        place = 0
        while (found := self._next(place, last=last)) is not None:
            line, place = found
            if line is not None:
                yield line
        # The space before a value is not kept, else each chunk of it would cost as much as all before it.
        if self._state in (_State.REQUEST, _State.AFTER):
            place = self._skip(place)
        self._text = self._text[place:]
        if last and self._state is not _State.END:
            raise _invalid("it ends too early")
        if last and not self.count:
            raise InvalidRequest("'requests' must have at least one request.", code="out_of_range", param="requests")

    def _next(self, place: int, *, last: bool) -> tuple[bytes | None, int] | None:
        """Return what is found at a place, and where it ends; None if more of the body is needed."""
        text = self._text
        match self._state:
            case _State.START:
                start = _START.match(text)
                # A chunk may end in the middle of it.
                if start is None or start.end() == len(text):
                    if last or len(text) > _MAX_START:
                        raise InvalidRequest(
                            'The body must be {"requests": [...]}, with no other field.', code="invalid_json", param="requests"
                        )
                    return None
                self._state = _State.AFTER if text[start.end()] == "]" else _State.REQUEST
                return None, start.end()
            case _State.REQUEST:
                return self._request(place, last=last)
            case _State.AFTER:
                place = self._skip(place)
                if place == len(text):
                    return None
                if text[place] not in ",]":
                    raise _invalid(f"a comma or ']' must follow request {self.count}")
                self._state = _State.REQUEST if text[place] == "," else _State.END
                return None, place + 1
            case _State.END:
                if last and _END.fullmatch(text, place) is None:
                    raise InvalidRequest("Nothing but \"}\" may follow the list 'requests'.", code="invalid_json", param="requests")
                if len(text) - place > _MAX_START:
                    raise _invalid("text follows its end")
                return None

    def _skip(self, place: int) -> int:
        space = _SPACE.match(self._text, place)
        return place if space is None else space.end()

    def _request(self, place: int, *, last: bool) -> tuple[bytes, int] | None:
        place = self._skip(place)
        size = len(self._text) - place
        try:
            _, end = self._json.raw_decode(self._text, place)
        except (ValueError, RecursionError) as error:
            if isinstance(error, RecursionError):
                raise _invalid(f"request {self.count + 1} is nested too deeply") from None
            if last or size > self._max_size:
                raise _invalid(f"request {self.count + 1} is no JSON object, or has more than {self._max_size:,} bytes") from None
            # Twice the text next time, so that the tries cost no more than one of the whole.
            self._wanted = 2 * size
            return None
        self._wanted = 0
        self.count += 1
        # Only the space between values has ends of lines.
        line = self._text[place:end].replace("\n", " ").replace("\r", " ").encode() + b"\n"
        self._check(line)
        self._state = _State.AFTER
        return line, end

    def _check(self, line: bytes) -> None:
        validator = self._validator
        validator.feed(line)
        if validator.faults:
            raise _refusal(validator.faults[0])
        if _CUSTOM_ID.fullmatch(custom_id := validator.lines[-1].custom_id) is None:
            raise InvalidRequest(
                f"'custom_id' must have 1 to 64 letters, digits, '_' or '-', not {custom_id[:100]!a}.",
                code="invalid_custom_id",
                param=f"requests.{self.count - 1}.custom_id",
            )
        validator.lines.clear()


def _refusal(fault: Fault) -> InvalidRequest:
    """Return the error for a fault of a line. Lines count from 1, and requests from 0."""
    code = "invalid_json" if fault.code == "invalid_json_line" else fault.code
    place = f"requests.{(fault.line or 1) - 1}"
    if fault.code == "too_many_tasks":
        return InvalidRequest(fault.message.replace("input file", "body"), code=code, param="requests")
    return InvalidRequest(fault.message, code=code, param=place if fault.param is None else f"{place}.{fault.param}")


def _invalid(reason: str) -> InvalidRequest:
    return InvalidRequest(f"The request body is not valid JSON: {reason}.", code="invalid_json")


async def request_lines(chunks: AsyncIterator[bytes], reader: RequestReader) -> AsyncIterator[bytes]:
    """Provide the lines of a body's requests. Raises InvalidRequest."""
    async for chunk in chunks:
        if lines := b"".join(reader.feed(chunk)):
            yield lines
        # Chunks may be there already, and others are served meanwhile.
        await asyncio.sleep(0)
    if lines := b"".join(reader.feed(b"", last=True)):
        yield lines
