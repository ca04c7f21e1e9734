"""The items of an output while they grow and when they are done, as JSON, and the events that report them.

Ids, names of events and states are ASCII without quotes, so they need no escapes. Texts are encoded.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import msgspec

from lmaas.protocols.responses.unwrapping import Unwrapper

encode = msgspec.json.encode

#: Returns an event, given its type and its fields after the type and the number.
Write = Callable[[bytes, bytes], bytes]
IN_PROGRESS, COMPLETED, INCOMPLETE = b"in_progress", b"completed", b"incomplete"


class OutputItem(ABC):
    """An item that grows by pieces of text."""

    #: The types of the events for a piece and for the whole text, and the field that has the whole text.
    _piece_event: bytes
    _text_event: bytes
    _text_field = b"text"

    def __init__(self, write: Write, item_id: str, index: int) -> None:
        self._write, self._id, self._index = write, item_id.encode(), index
        self._place = b'"item_id":"%b","output_index":%d' % (self._id, index)
        self._pieces: list[str] = []
        #: The item as JSON, once it is done.
        self.final = b""

    def add(self, text: str, logprobs: bytes = b"") -> None:
        """Add a piece without an event. `logprobs` are those of its tokens, as JSON objects with commas between them."""
        self._pieces.append(text)

    def begin(self) -> bytes:
        """Return the events of the item's beginning."""
        return self._write(b"response.output_item.added", b'"output_index":%d,"item":%b' % (self._index, self._item(IN_PROGRESS, None)))

    def grow(self, text: str, logprobs: bytes = b"") -> bytes:
        """Add a piece and return its event."""
        self.add(text, logprobs)
        return self._write(self._piece_event, b'%b,"delta":%b' % (self._place, encode(text)))

    def finish(self, status: bytes) -> bytes:
        """Return the events of the item's end."""
        text = self._text()
        self.final = self._item(status, text)
        return b"%b%b%b" % (
            self._write(self._text_event, self._whole(text)),
            self._part_done(text),
            self._write(b"response.output_item.done", b'"output_index":%d,"item":%b' % (self._index, self.final)),
        )

    def json(self, status: bytes) -> bytes:
        """Return the item as it is now."""
        return self._item(status, self._text())

    def _text(self) -> bytes:
        return encode("".join(self._pieces))

    def _whole(self, text: bytes) -> bytes:
        """Return the fields of the event for the whole text."""
        return b'%b,"%b":%b' % (self._place, self._text_field, text)

    def _part_done(self, text: bytes) -> bytes:
        """Return the event for the end of the item's part, if it has one."""
        return b""

    @abstractmethod
    def _item(self, status: bytes, text: bytes | None) -> bytes:
        """Return the item with this text, which is None for one that has only begun."""


class _Spoken(OutputItem):
    """An item whose text is its only part of content."""

    def __init__(self, write: Write, item_id: str, index: int) -> None:
        super().__init__(write, item_id, index)
        self._place += b',"content_index":0'

    def begin(self) -> bytes:
        """Return the events of the item's beginning and of its part's."""
        added = super().begin()
        return added + self._write(b"response.content_part.added", b'%b,"part":%b' % (self._place, self._part(b'""')))

    def _part_done(self, text: bytes) -> bytes:
        return self._write(b"response.content_part.done", b'%b,"part":%b' % (self._place, self._part(text)))

    @abstractmethod
    def _part(self, text: bytes) -> bytes: ...


class Message(_Spoken):
    """The text of the answer."""

    _piece_event, _text_event = b"response.output_text.delta", b"response.output_text.done"

    def __init__(self, write: Write, item_id: str, index: int) -> None:
        super().__init__(write, item_id, index)
        self._logprobs: list[bytes] = []

    def add(self, text: str, logprobs: bytes = b"") -> None:
        """Add a piece without an event."""
        self._pieces.append(text)
        if logprobs:
            self._logprobs.append(logprobs)

    def grow(self, text: str, logprobs: bytes = b"") -> bytes:
        """Add a piece and return its event."""
        self.add(text, logprobs)
        return self._write(self._piece_event, b'%b,"delta":%b,"logprobs":[%b]' % (self._place, encode(text), logprobs))

    def _whole(self, text: bytes) -> bytes:
        return b'%b,"text":%b,"logprobs":[%b]' % (self._place, text, b",".join(self._logprobs))

    def _part(self, text: bytes) -> bytes:
        return b'{"type":"output_text","annotations":[],"logprobs":[%b],"text":%b}' % (b",".join(self._logprobs), text)

    def _item(self, status: bytes, text: bytes | None) -> bytes:
        content = b"" if text is None else self._part(text)
        return b'{"id":"%b","type":"message","status":"%b","content":[%b],"role":"assistant"}' % (self._id, status, content)


class Reasoning(_Spoken):
    """The thoughts of the model before it answers."""

    _piece_event, _text_event = b"response.reasoning_text.delta", b"response.reasoning_text.done"

    def _part(self, text: bytes) -> bytes:
        return b'{"type":"reasoning_text","text":%b}' % text

    def _item(self, status: bytes, text: bytes | None) -> bytes:
        content = b"" if text is None else self._part(text)
        form = b'{"id":"%b","type":"reasoning","status":"%b","summary":[],"content":[%b],"encrypted_content":null}'
        return form % (self._id, status, content)


class FunctionCall(OutputItem):
    """A call of a function."""

    _piece_event, _text_event = b"response.function_call_arguments.delta", b"response.function_call_arguments.done"
    _text_field = b"arguments"
    _form = b'{"id":"%b","type":"function_call","status":"%b","arguments":%b,"call_id":"%b","name":%b%b}'

    def __init__(self, write: Write, item_id: str, index: int, call_id: str, name: str, namespace: str | None = None) -> None:
        super().__init__(write, item_id, index)
        self._call_id, self._name = call_id.encode(), encode(name)
        self._namespace = b"" if namespace is None else b',"namespace":%b' % encode(namespace)

    def finish(self, status: bytes) -> bytes:
        """Return the events of the item's end."""
        rest = self._last(status)
        self._pieces.append(rest)
        return self._event(rest) + super().finish(status)

    def _last(self, status: bytes) -> str:
        """Return what the end adds to the text. A whole call without arguments has an empty object, which clients can parse."""
        return "{}" if status == COMPLETED and not any(map(str.strip, self._pieces)) else ""

    def _event(self, text: str) -> bytes:
        return self._write(self._piece_event, b'%b,"delta":%b' % (self._place, encode(text))) if text else b""

    def _item(self, status: bytes, text: bytes | None) -> bytes:
        return self._form % (self._id, status, b'""' if text is None else text, self._call_id, self._name, self._namespace)


class CustomCall(FunctionCall):
    """A call of a custom tool. The pieces are those of the arguments of the function that stands for it."""

    _piece_event, _text_event = b"response.custom_tool_call_input.delta", b"response.custom_tool_call_input.done"
    _text_field = b"input"
    _form = b'{"id":"%b","type":"custom_tool_call","status":"%b","input":%b,"call_id":"%b","name":%b%b}'

    def __init__(self, write: Write, item_id: str, index: int, call_id: str, name: str, namespace: str | None = None) -> None:
        super().__init__(write, item_id, index, call_id, name, namespace)
        self._unwrapper: Unwrapper | None = Unwrapper()

    def add(self, text: str, logprobs: bytes = b"") -> None:
        """Add a piece without an event."""
        if self._unwrapper is not None:
            self._pieces.append(self._unwrapper.feed(text))

    def grow(self, text: str, logprobs: bytes = b"") -> bytes:
        """Add a piece and return its event, if it adds to the input."""
        self.add(text)
        return self._event(self._pieces[-1])

    def json(self, status: bytes) -> bytes:
        """Return the item as it is now, which ends it."""
        self._pieces.append(self._last(status))
        return super().json(status)

    def _last(self, status: bytes) -> str:
        """Return the rest of the input, once."""
        rest, self._unwrapper = "" if self._unwrapper is None else self._unwrapper.end(), None
        return rest
