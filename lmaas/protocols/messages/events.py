"""A message as a stream of events."""

from typing import Any

import msgspec

from lmaas.error_bodies import anthropic_body
from lmaas.errors import LmaasError
from lmaas.inference.protocol import Answer, Inference
from lmaas.protocols.chunks import ChatStream, Choice, ToolCall, Usage
from lmaas.protocols.messages.message import SERVICE_TIER, arguments_of, is_object, message_id, signature, stop_of, tool_id, usage_of
from lmaas.protocols.messages.request import MessagesRequest

PING = b'event: ping\ndata: {"type":"ping"}\n\n'
_START = b'event: message_start\ndata: {"type":"message_start","message":%b}\n\n'
_OPEN = b'event: content_block_start\ndata: {"type":"content_block_start","index":%d,"content_block":%b}\n\n'
_DELTA = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":{"type":"%b_delta","%b":%b}}\n\n'
_CLOSE = b'event: content_block_stop\ndata: {"type":"content_block_stop","index":%d}\n\n'
_END = (
    b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":%b,"stop_sequence":%b},"usage":%b}\n\n'
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
)
_ERROR = b"event: error\ndata: %b\n\n"
_TEXT, _THINKING, _TOOL = "text", "thinking", "tool_use"
#: The start of a block, and the type and the field of its deltas.
_BLOCKS = {
    _TEXT: (b'{"type":"text","text":""}', b"text", b"text"),
    _THINKING: (b'{"type":"thinking","thinking":"","signature":""}', b"thinking", b"thinking"),
    _TOOL: (b"", b"input_json", b"partial_json"),
}
_json = msgspec.json.Encoder().encode


class MessageStream(Answer):
    """Turns the engine's chunks of a chat into the events of a message. Pieces that arrive together become one delta."""

    def __init__(self, inference: Inference[MessagesRequest]) -> None:
        self._request_id, self._request = inference.request_id, inference.request
        self._chat = ChatStream()
        self._begun = False
        #: The kind of the open block, if one is open, and the number of blocks before it.
        self._open: str | None = None
        self._blocks = 0
        #: Pieces that have arrived for the open block and are not written yet.
        self._pieces: list[str] = []
        #: Text that waits: white space before a block that may turn out to be no text, or text that came within a tool call.
        self._held: list[str] = []
        #: Thoughts that came within a tool call.
        self._thoughts: list[str] = []
        #: The engine's index of the latest tool call, the number of calls, and the arguments of the latest one.
        self._call = -1
        self._calls = 0
        self._arguments: list[str] = []
        #: True if those are an object, as far as their first character shows it; None before it has arrived.
        self._is_object: bool | None = None
        self._finish: str | None = None
        self._stop: int | str | None = None
        self._out: list[bytes] = []

    @property
    def usage(self) -> dict[str, Any] | None:
        """The usage that the engine has reported so far."""
        return self._chat.usage.totals() if self._chat.usage is not None else None

    def feed(self, chunk: bytes) -> bytes:
        """Return the events that these bytes complete."""
        return self._written(self._chat.feed(chunk))

    def close(self) -> bytes:
        """Return the events that the end of the engine's stream completes."""
        return self._written(self._chat.close())

    def end(self) -> bytes:
        """Return the last events: `message_delta` with the reason and the usage, and `message_stop`."""
        if not self._begun:
            self._begin()
        self._close_block()
        if self._held and not self._blocks:
            self._piece(_TEXT, "".join(self._held))
            self._close_block()
        usage = self._chat.usage or Usage()
        reason, sequence = stop_of(
            self._finish,
            self._stop,
            tokens=usage.completion_tokens or 0,
            max_tokens=self._request.max_tokens,
            called=self._calls > 0,
            cut=isinstance(self._stop, str) and self._calls > 0 and not is_object("".join(self._arguments)),
        )
        self._out.append(_END % (_json(reason), _json(sequence), _json(usage_of(usage))))
        return self._flushed()

    def failed(self, error: LmaasError) -> bytes:
        """Return the event that ends the stream with this error."""
        return error_event(error, self._request_id)

    def _written(self, choices: list[Choice]) -> bytes:
        chat = self._chat
        self.complete, self.done, self.error, self.aborted = chat.complete, chat.done, chat.error, chat.aborted
        for choice in choices:
            if not self._begun:
                self._begin()
            said = choice.delta
            if said.reasoning and self._request.shows_thinking:
                self._think(said.reasoning)
            if said.content:
                self._text(said.content)
            for call in said.tool_calls or ():
                self._tool(call)
            if choice.finish_reason is not None:
                self._finish, self._stop = choice.finish_reason, choice.stop_reason
        self._flush()
        return self._flushed()

    def _flushed(self) -> bytes:
        out = b"".join(self._out)
        self._out.clear()
        return out

    def _begin(self) -> None:
        self._begun = True
        message: dict[str, Any] = {
            "id": message_id(self._request_id),
            "type": "message",
            "role": "assistant",
            "model": self._request.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage_of(self._chat.usage or Usage()) | {"output_tokens": 0, "service_tier": SERVICE_TIER},
        }
        self._out.append(_START % _json(message))

    def _think(self, text: str) -> None:
        if self._open == _TOOL:
            self._thoughts.append(text)
        else:
            self._piece(_THINKING, text)

    def _text(self, text: str) -> None:
        if self._open == _TEXT:
            self._pieces.append(text)
        elif self._open == _TOOL or not text.strip():
            # A block cannot be opened within a call whose arguments may not have ended, and white space may be all that comes.
            self._held.append(text)
        else:
            self._piece(_TEXT, "".join((*self._held, text)))
            self._held.clear()

    def _tool(self, call: ToolCall) -> None:
        function = call.function
        if call.index != self._call:
            if function is None or not function.name or call.index < self._call:
                raise ValueError("a piece of a tool call that has not begun, or that has ended")
            self._close_block()
            self._held.clear()
            block = {"type": _TOOL, "id": tool_id(self._request_id, self._calls), "name": function.name, "input": {}}
            self._start_block(_TOOL, _json(block))
            self._call, self._calls = call.index, self._calls + 1
            self._arguments, self._is_object = [], None
        if function is not None and function.arguments:
            if self._open != _TOOL:
                raise ValueError("a piece of a tool call that has ended")
            self._argue(function.arguments)

    def _argue(self, piece: str) -> None:
        """Add to the arguments of the open call. They are held back if they are no object, which clients cannot read."""
        self._arguments.append(piece)
        if self._is_object is None:
            piece = "".join(self._arguments).lstrip()
            if not piece:
                return
            self._is_object = piece.startswith("{")
        if self._is_object:
            self._pieces.append(piece)

    def _piece(self, kind: str, text: str) -> None:
        """Add to the open block, or to a new one if another kind of block is open."""
        if self._open != kind:
            self._close_block()
            self._start_block(kind, _BLOCKS[kind][0])
        self._pieces.append(text)

    def _start_block(self, kind: str, block: bytes) -> None:
        self._out.append(_OPEN % (self._blocks, block))
        self._open = kind

    def _close_block(self) -> None:
        """End the open block. Thoughts and text that came within a tool call become blocks after it."""
        kind = self._open
        if kind is None:
            return
        if kind == _TOOL and self._is_object is False:
            self._pieces.append(_json(arguments_of("".join(self._arguments))).decode())
        self._flush()
        if kind == _THINKING:
            self._out.append(_DELTA % (self._blocks, b"signature", b"signature", _json(signature(self._request_id))))
        self._out.append(_CLOSE % self._blocks)
        self._open = None
        self._blocks += 1
        thoughts, text = "".join(self._thoughts), "".join(self._held)
        self._thoughts.clear()
        self._held.clear()
        if thoughts:
            self._piece(_THINKING, thoughts)
            self._close_block()
        if text.strip():
            self._piece(_TEXT, text)
            self._close_block()

    def _flush(self) -> None:
        """Write what has arrived for the open block as one delta."""
        if self._pieces and self._open is not None:
            _, kind, field = _BLOCKS[self._open]
            self._out.append(_DELTA % (self._blocks, kind, field, _json("".join(self._pieces))))
            self._pieces.clear()


def error_event(error: LmaasError, request_id: str) -> bytes:
    """Return the event of an error."""
    return _ERROR % _json(anthropic_body(error, request_id))
