"""The items of a response as they arrive, and their events."""

from collections.abc import Mapping

from lmaas.protocols.responses.items import item_id
from lmaas.protocols.responses.output import COMPLETED, INCOMPLETE, CustomCall, FunctionCall, Message, OutputItem, Reasoning

_NO_CALL = -1


def event(kind: bytes, number: int, fields: bytes) -> bytes:
    """Return an event with its number and these fields."""
    return b'event: %b\ndata: {"type":"%b","sequence_number":%d,%b}\n\n' % (kind, kind, number, fields)


class OutputStream:
    """Makes items of what the engine writes: reasoning, messages and calls. An item ends when another one begins.

    Pieces of one item that arrive before `taken` become one event. White space alone is a message only if there is nothing else, because
    the templates of some models put it around calls. Text and reasoning that come within a call wait until it is done, because more of its
    arguments may follow.
    """

    def __init__(self, response_id: str, custom: frozenset[str], namespaces: Mapping[str, tuple[str, str]], first_event: int = 0) -> None:
        self._response_id, self._custom, self._namespaces = response_id, custom, namespaces
        #: The number of the next event.
        self._number = first_event
        self._out: list[bytes] = []
        #: The items that are done.
        self._items: list[bytes] = []
        self._open: OutputItem | None = None
        #: The engine's number of the call that grows.
        self._call = _NO_CALL
        self._pieces: list[str] = []
        self._logprobs: list[bytes] = []
        #: Reasoning that came within a call.
        self._thoughts: list[str] = []
        #: White space that becomes the beginning of a message if text follows, or text that came within a call, with its log probabilities.
        self._blank: list[str] = []
        self._blank_logprobs: list[bytes] = []

    def event(self, kind: bytes, fields: bytes) -> bytes:
        """Return an event with the next number."""
        number = self._number
        self._number += 1
        return event(kind, number, fields)

    def send(self, kind: bytes, fields: bytes) -> None:
        """Send an event about the response itself."""
        self._out.append(self.event(kind, fields))

    def taken(self) -> bytes:
        """Return the events since the last call."""
        self._flush()
        out = b"".join(self._out)
        self._out.clear()
        return out

    def output(self) -> bytes:
        """Return the items as JSON with commas between them. One that still grows is incomplete."""
        self._flush()
        growing = [] if self._open is None else [self._open.json(INCOMPLETE)]
        return b",".join(self._items + growing)

    def think(self, text: str) -> None:
        """Add to the reasoning."""
        if self._call != _NO_CALL:
            self._thoughts.append(text)
            return
        if not isinstance(self._open, Reasoning):
            self._begin(Reasoning(self.event, *self._next("reasoning")))
        self._pieces.append(text)

    def say(self, text: str, logprobs: bytes = b"") -> None:
        """Add to the message."""
        if not isinstance(self._open, Message):
            self._blank.append(text)
            if logprobs:
                self._blank_logprobs.append(logprobs)
            if self._call != _NO_CALL or text.isspace() or not text:
                return
            self._say_blank()
            return
        self._pieces.append(text)
        if logprobs:
            self._logprobs.append(logprobs)

    def call(self, number: int, name: str, arguments: str) -> None:
        """Add to a call, which begins with its name. Raises ValueError for a call without a name, or one that has ended."""
        if self._call != number:
            if not name or number < self._call:
                raise ValueError("a part of a call that has not begun, or that has ended")
            self._end_call()
            custom = name in self._custom
            item, index = self._next("custom_tool_call" if custom else "function_call")
            call_id = f"call_{item.partition('_')[2]}"
            namespace, own = self._namespaces.get(name, (None, name))
            self._begin((CustomCall if custom else FunctionCall)(self.event, item, index, call_id, own, namespace))
            self._call = number
        if arguments:
            self._pieces.append(arguments)

    def finish(self, *, cut: bool) -> None:
        """End the last item, which is incomplete if the answer was cut off. An answer without any item gets an empty message."""
        if self._open is None and not self._items:
            self._say_blank()
        if self._thoughts or any(map(str.strip, self._blank)):
            self._end_call()
        if self._open is not None:
            self._end(INCOMPLETE if cut else COMPLETED)

    def _end_call(self) -> None:
        """End the call that grows, if one does. What came within it becomes items after it."""
        if self._call == _NO_CALL:
            return
        self._end(COMPLETED)
        self._call = _NO_CALL
        thoughts, text, logprobs = "".join(self._thoughts), "".join(self._blank), b",".join(self._blank_logprobs)
        for held in (self._thoughts, self._blank, self._blank_logprobs):
            held.clear()
        if thoughts:
            self.think(thoughts)
        if text.strip():
            self.say(text, logprobs)

    def _say_blank(self) -> None:
        text, logprobs = "".join(self._blank), b",".join(self._blank_logprobs)
        self._begin(Message(self.event, *self._next("message")))
        if text:
            self._pieces.append(text)
        if logprobs:
            self._logprobs.append(logprobs)

    def _next(self, kind: str) -> tuple[str, int]:
        """Return the id and the index of the next item."""
        index = len(self._items) + (self._open is not None)
        return item_id(kind, self._response_id, index), index

    def _begin(self, item: OutputItem) -> None:
        if self._open is not None:
            self._end(COMPLETED)
        self._blank.clear()
        self._blank_logprobs.clear()
        self._call = _NO_CALL
        self._open = item
        self._out.append(item.begin())

    def _end(self, status: bytes) -> None:
        self._flush(last=True)
        if self._open is not None:
            self._out.append(self._open.finish(status))
            self._items.append(self._open.final)
            self._open = None

    def _flush(self, *, last: bool = False) -> None:
        """Send the event for the pieces that have arrived. Log probabilities of tokens without text wait for text or the item's end."""
        if self._open is None or not (self._pieces or (last and self._logprobs)):
            return
        self._out.append(self._open.grow("".join(self._pieces), b",".join(self._logprobs)))
        self._pieces.clear()
        self._logprobs.clear()
