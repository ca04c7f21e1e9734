"""Reads an engine's answer to a chat as typed values: the events of a stream, and an answer in one piece.

The protocols that are translated from chats read answers with this module. Chat completions themselves are rewritten as bytes (sse.py).
"""

from typing import Any

import msgspec

from lmaas.protocols.sse import DONE, MAX_EVENT_BYTES

_DATA = b"data: "
_ERROR = b'data: {"error"'
_NULL = msgspec.Raw(b"null")
ABORTED = "abort"


class Function(msgspec.Struct):
    """A function and a piece of its arguments. Only the first piece has the name."""

    name: str | None = None
    arguments: str | None = None


class ToolCall(msgspec.Struct):
    """A tool call, or a piece of one. The pieces of a call have the same `index`; an answer in one piece has no indices."""

    index: int = 0
    id: str | None = None
    function: Function | None = None

    @property
    def name(self) -> str:
        """The function's name, empty in a piece that has none."""
        return (self.function.name if self.function else None) or ""

    @property
    def arguments(self) -> str:
        """The arguments, or a piece of them."""
        return (self.function.arguments if self.function else None) or ""


class Said(msgspec.Struct):
    """Text, reasoning and calls of the model: a piece in a stream, all of it in an answer in one piece."""

    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None


class Choice(msgspec.Struct):
    """One event's part of the only choice. `stop_reason` is the stop string or the stop token that ended the answer."""

    delta: Said
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    #: JSON that few requests use.
    logprobs: msgspec.Raw = _NULL


class PromptDetails(msgspec.Struct):
    """The tokens of the prompt that came from the engine's cache, and those that were added to it."""

    cached_tokens: int | None = None
    created_cache_tokens: int | None = None


class CompletionDetails(msgspec.Struct):
    """The tokens of the answer in which the model reasoned. Engines without a reasoning parser do not report them."""

    reasoning_tokens: int | None = None


class Usage(msgspec.Struct):
    """The tokens of a request so far."""

    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None
    completion_tokens_details: CompletionDetails | None = None

    @property
    def cached_tokens(self) -> int:
        """The tokens of the prompt that came from the engine's cache, as far as known: a stream reports them at its end."""
        return (self.prompt_tokens_details.cached_tokens or 0) if self.prompt_tokens_details is not None else 0

    @property
    def created_cache_tokens(self) -> int:
        """The tokens of the prompt that were added to the engine's cache, as far as known."""
        return (self.prompt_tokens_details.created_cache_tokens or 0) if self.prompt_tokens_details is not None else 0

    @property
    def reasoning_tokens(self) -> int | None:
        """The tokens of the answer in which the model reasoned, None if the engine does not count them."""
        return self.completion_tokens_details.reasoning_tokens if self.completion_tokens_details is not None else None

    def totals(self) -> dict[str, Any]:
        """Return the usage as `Answer.usage` has it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens or 0,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class _Chunk(msgspec.Struct):
    choices: list[Choice]
    usage: Usage | None = None


class WholeChoice(msgspec.Struct):
    """The only choice of an answer in one piece."""

    message: Said
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: msgspec.Raw = _NULL


class Whole(msgspec.Struct):
    """An answer in one piece."""

    choices: list[WholeChoice]
    usage: Usage


_CHUNK = msgspec.json.Decoder(_Chunk)
_WHOLE = msgspec.json.Decoder(Whole)


def read_whole(text: bytes) -> Whole:
    """Read an answer in one piece. Raises ValueError for bytes that are none."""
    try:
        whole = _WHOLE.decode(text)
    except msgspec.DecodeError as error:
        raise ValueError(str(error)) from None
    if len(whole.choices) != 1:
        raise ValueError(f"{len(whole.choices)} choices")
    return whole


class ChatStream:
    """Reads the stream of one chat with one choice, and keeps what `Answer` has to report about it."""

    def __init__(self) -> None:
        self._rest = b""
        #: The usage that the engine has reported so far.
        self.usage: Usage | None = None
        self.complete = False
        self.done = False
        self.error: bytes | None = None
        self.aborted = False

    def feed(self, chunk: bytes) -> list[Choice]:
        """Return the events that these bytes complete. Raises ValueError for bytes that are no event of an engine.

        Bytes after `[DONE]`, after an error or after the engine has aborted the answer are not part of it.
        """
        received = self._rest + chunk
        if len(self._rest) > MAX_EVENT_BYTES:
            raise ValueError(f"an event of more than {MAX_EVENT_BYTES} bytes")
        end = received.rfind(b"\n\n")
        if end < 0:
            self._rest = received
            return []
        self._rest = received[end + 2 :]
        found: list[Choice] = []
        for raw in received[:end].split(b"\n\n"):
            event = raw.strip(b"\n")
            if not event or self.done or self.error is not None:
                continue
            if event == DONE:
                self.done = True
            elif event.startswith(_ERROR):
                self.error = event.removeprefix(_DATA)
            elif not event.startswith(b":"):
                self._read(event, found)
        return found

    def close(self) -> list[Choice]:
        """Return the events that the end of the stream completes: the last one may lack its empty line."""
        return self.feed(b"\n\n") if self._rest.strip() else []

    def _read(self, event: bytes, found: list[Choice]) -> None:
        if not event.startswith(_DATA):
            raise ValueError("an event without data")
        try:
            chunk = _CHUNK.decode(event[len(_DATA) :])
        except msgspec.DecodeError as error:
            raise ValueError(str(error)) from None
        if chunk.usage is not None:
            self.usage = chunk.usage
            self.complete = self.complete or not chunk.choices
        for choice in chunk.choices:
            self.aborted = self.aborted or choice.finish_reason == ABORTED
            if not self.aborted:
                found.append(choice)
