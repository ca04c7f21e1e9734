"""Validation of a batch's input file, line by line and without the file in memory. Pure: it reads no file and no database."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import UNSET, Raw, Struct

from lmaas.batches.lines import ENVELOPE_BYTES, MESSAGES, Line, LineSplitter, request_field
from lmaas.batches.order import Estimate, Outline, outline, prefix_key, tokens
from lmaas.errors import InvalidRequest
from lmaas.http import parse_object

#: The models that one batch may name.
MAX_MODELS = 1_000
#: The length of a `custom_id`, in bytes of UTF-8.
MAX_CUSTOM_ID_BYTES = 512
#: Validation ends after this number of faults: a file with so many has one cause, and the list is part of every answer.
MAX_FAULTS = 100
#: A model's name is cut here. No model has a longer name, and an error shows less of it.
_MAX_MODEL = 200
_MAX_SHOWN = 100


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of an input file, as OpenAI's BatchError. `line` counts from 1; None is about the whole file."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True)
class FoundLine:
    """A valid line: its place in the file, and what its order and its costs follow from.

    `model` is empty if the request names none. `prefix` sorts requests whose prompts begin with the same text next
    to each other.
    """

    number: int
    offset: int
    size: int
    custom_id: str
    model: str
    tokens: Estimate
    prefix: bytes


class _Line(Struct):
    custom_id: Any = UNSET
    method: Any = UNSET
    url: Any = UNSET
    body: Raw = Raw(b"")


class _MessagesLine(Struct):
    custom_id: Any = UNSET
    params: Raw = Raw(b"")


_LINE, _MESSAGES_LINE = msgspec.json.Decoder(_Line), msgspec.json.Decoder(_MessagesLine)


@dataclass(slots=True)
class Validator:
    """Checks the lines of one input file for batches to `endpoint`. `generates` is whether answers have completion tokens.

    The file is given to `feed` in chunks, then `close` is called. The file is valid if there are no `faults`; then `lines` has all of it.
    Once `is_full`, the rest of the file does not matter.
    """

    endpoint: str
    max_request_bytes: int
    max_lines: int
    generates: bool = True
    lines: list[FoundLine] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    is_full: bool = False
    _seen: int = 0
    #: The line of each `custom_id`.
    _ids: dict[str, int] = field(default_factory=dict)
    #: Names of models, so that lines share them.
    _models: dict[str, str] = field(default_factory=dict)
    _splitter: LineSplitter = field(init=False)

    def __post_init__(self) -> None:
        self._splitter = LineSplitter(self._max_line_bytes)

    @property
    def _max_line_bytes(self) -> int:
        return self.max_request_bytes + ENVELOPE_BYTES

    def feed(self, chunk: bytes) -> None:
        """Check the lines that these bytes complete."""
        self._check(self._splitter.feed(chunk))

    def close(self) -> None:
        """Check the last line, and the file as a whole."""
        self._check(self._splitter.close())
        if not self._seen:
            self._add("empty_file", "The input file has no requests. Write one on each line.")

    def _check(self, lines: Iterable[Line]) -> None:
        for line in lines:
            if self.is_full:
                return
            self._seen += 1
            if self._seen > self.max_lines:
                self.is_full = True
                message = f"The input file has more than {self.max_lines:,} requests. Divide it into several batches."
                self._add("too_many_tasks", message, line.number)
            else:
                self._check_line(line)

    def _add(self, code: str, message: str, line: int | None = None, param: str | None = None) -> None:
        self.faults.append(Fault(code, message, line, param))
        self.is_full = self.is_full or len(self.faults) >= MAX_FAULTS
        # They would not be used.
        self.lines.clear()

    def _check_line(self, line: Line) -> None:
        if line.text is None:
            message = f"The line has more than {self._max_line_bytes:,} bytes, the maximum. Shorten its request."
            self._add("line_too_large", message, line.number)
            return
        try:
            found, request = _read(self.endpoint, line.text)
        except InvalidRequest as error:
            self._add("invalid_json_line", error.message, line.number)
            return
        before = len(self.faults)
        self._check_custom_id(found.custom_id, line.number)
        if self.endpoint != MESSAGES:
            self._check_target(found, line.number)
        self._check_request(bytes(found.body), request, line.number)
        if len(self.faults) == before and not self.is_full:
            self._keep(line, found.custom_id, request)

    def _check_custom_id(self, value: Any, number: int) -> None:
        code, message = "invalid_custom_id", None
        if value in (UNSET, None, ""):
            code, message = "missing_custom_id", "'custom_id' is required. Give each line its own."
        elif not isinstance(value, str):
            message = f"'custom_id' must be text, not {_shown(value)}."
        elif (size := len(value.encode(errors="replace"))) > MAX_CUSTOM_ID_BYTES:
            message = f"'custom_id' has {size:,} bytes of UTF-8, the maximum is {MAX_CUSTOM_ID_BYTES}. Shorten it."
        elif "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            message = "'custom_id' has the character NUL or half a surrogate pair. Remove it."
        elif (first := self._ids.setdefault(value, number)) != number:
            code, message = "duplicate_custom_id", f"Line {first} has the 'custom_id' {_shown(value)} too. Give each line its own."
        if message is not None:
            self._add(code, message, number, "custom_id")

    def _check_target(self, line: _Line, number: int) -> None:
        if line.method != "POST":
            self._add("invalid_method", f"'method' must be \"POST\", not {_shown(line.method)}.", number, "method")
        if line.url != self.endpoint:
            message = f"'url' must be \"{self.endpoint}\", the endpoint of the batch, not {_shown(line.url)}."
            self._add("url_mismatch", message, number, "url")

    def _check_request(self, body: bytes, request: Outline, number: int) -> None:
        name = request_field(self.endpoint)
        if not body.startswith(b"{"):
            code = "missing_body" if body in (b"", b"null") else "invalid_body"
            self._add(code, f"'{name}' must be a JSON object: the request as it is sent to {self.endpoint}.", number, name)
        elif bytes(request.stream) == b"true":
            message = f"'{name}.stream' must not be true: answers of batches do not stream. Remove it."
            self._add("unsupported_parameter", message, number, f"{name}.stream")

    def _keep(self, line: Line, custom_id: str, request: Outline) -> None:
        name = request.model_name[:_MAX_MODEL]
        model = self._models.setdefault(name, name)
        if len(self._models) > MAX_MODELS:
            self.is_full = True
            message = f"The input file names more than {MAX_MODELS:,} models. Divide it into several batches."
            self._add("too_many_models", message, line.number, f"{request_field(self.endpoint)}.model")
            return
        size, estimated = len(line.text or b""), tokens(request, generates=self.generates)
        self.lines.append(FoundLine(line.number, line.offset, size, custom_id, model, estimated, prefix_key(request)))


def _read(endpoint: str, text: bytes) -> tuple[_Line, Outline]:
    """Return a line, whose `body` is empty if it has none, and the outline of its request. Raises InvalidRequest for what is not JSON."""
    try:
        text.decode()  # the decoder does not look into the strings that it skips
        if endpoint == MESSAGES:
            message = _MESSAGES_LINE.decode(text)
            line = _Line(message.custom_id, body=message.params)
        else:
            line = _LINE.decode(text)
        return line, outline(line.body)
    except (ValueError, RecursionError):
        pass
    # The decoder refuses a little of what a request may have, such as half a surrogate pair. This parser is slower, and explains.
    value = parse_object(text, "line")
    body = b""
    if (field_name := request_field(endpoint)) in value:
        body = json.dumps(value[field_name], ensure_ascii=False).encode(errors="replace")
    line = _Line(value.get("custom_id", UNSET), value.get("method", UNSET), value.get("url", UNSET), Raw(body))
    try:
        return line, outline(line.body)
    except (ValueError, RecursionError):
        raise InvalidRequest("The line is nested too deeply, or has a number that is too large.", code="invalid_json") from None


def _shown(value: Any) -> str:
    if value is UNSET:
        return "absent"
    shown = json.dumps(value, ensure_ascii=False, default=str)
    shown = shown.encode(errors="replace").decode().replace("\\u0000", "?")
    return shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}..."
