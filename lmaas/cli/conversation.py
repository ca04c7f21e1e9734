"""A conversation with a model: what is sent, and what the lines of a streamed answer mean."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lmaas.errors import ApiError

PATH = "/v1/chat/completions"
_QUEUED = re.compile(r"queued position=(\d+) estimated_wait_s=(\d+)((?: \w+=\w+)*)")


@dataclass(frozen=True, slots=True)
class Waiting:
    """The request waits. `words` name the reason and the expected time."""

    words: str


@dataclass(frozen=True, slots=True)
class Text:
    """The next piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The reason why the answer ended: `stop`, `length` and so on."""

    reason: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of the request, as the service counts them."""

    prompt: int
    cached: int
    completion: int


Event = Waiting | Text | Ended | Tokens


@dataclass(slots=True)
class Conversation:
    """The messages so far, and the parameters of each request."""

    model: str
    system: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)

    def request(self, text: str) -> dict[str, Any]:
        """Return the body of the request with the next message."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages = [*first, *self.messages, {"role": "user", "content": text}]
        given = {name: value for name, value in self.parameters.items() if value is not None}
        return {"model": self.model, "messages": messages, "stream": True, "stream_options": {"include_usage": True}} | given

    def keep(self, text: str, answer: str) -> None:
        """Keep a message and its answer, or its outcome, for the next request. A message without any answer is left out."""
        if answer:
            self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    def reset(self) -> None:
        """Forget the messages. The system message stays."""
        self.messages.clear()


def events(lines: Iterable[str]) -> Iterator[Event]:
    """Return the events of a streamed answer. Raises ApiError for an error in the stream, and for one that is cut off."""
    for line in lines:
        if line.startswith(":"):
            yield Waiting(waiting_words(line[1:].strip()))
        elif line.startswith("data:"):
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                return
            yield from _of_chunk(_read(data))
    raise ApiError(502, "The answer broke off. Send the message again.", "", "")


def _read(data: str) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except ValueError:
        chunk = None
    if not isinstance(chunk, dict):
        raise ApiError(502, "The service sent something that is not an event of an answer. Check LMAAS_URL.", "", "")
    return chunk


def _of_chunk(chunk: dict[str, Any]) -> Iterator[Event]:
    if isinstance(error := chunk.get("error"), dict):
        raise ApiError(502, str(error.get("message")), str(error.get("code") or ""), "")
    for choice in chunk.get("choices") or ():
        if text := (choice.get("delta") or {}).get("content"):
            yield Text(text)
        if reason := choice.get("finish_reason"):
            yield Ended(reason)
    if usage := chunk.get("usage"):
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        yield Tokens(usage.get("prompt_tokens", 0), cached, usage.get("completion_tokens", 0))


def waiting_words(comment: str) -> str:
    """Return a comment of a stream that waits (docs/reference/http.md) in words for people."""
    found = _QUEUED.fullmatch(comment)
    if found is None:
        return comment[:1].upper() + comment[1:]
    marks = dict(mark.split("=", maxsplit=1) for mark in found[3].split())
    words = f"Cold start: an engine starts, about {found[2]} s" if "cold_start" in marks else f"In the queue, about {found[2]} s"
    words += f", position {found[1]}"
    if "late_s" in marks:
        words += f", {marks['late_s']} s later than usual"
    return words + (" (the first start of this model, so this is a guess)" if marks.get("start") == "unknown" else "")


@dataclass(slots=True)
class Timing:
    """The times of one request, in seconds of one clock."""

    sent: float
    first: float | None = None
    last: float | None = None

    def token(self, now: float) -> None:
        """Note that a piece of the answer came."""
        self.first = now if self.first is None else self.first
        self.last = now


def summary(timing: Timing, tokens: Tokens | None, ended: str | None) -> str:
    """Return one line about an answer: its tokens, the time to the first one, the whole time, and the rate."""
    parts = []
    if tokens is not None:
        cached = f" ({tokens.cached} cached)" if tokens.cached else ""
        parts.append(f"{tokens.prompt}{cached} + {tokens.completion} tokens")
    if timing.first is not None and timing.last is not None:
        parts += [f"first token {timing.first - timing.sent:.2f} s", f"total {timing.last - timing.sent:.2f} s"]
        span_s = timing.last - timing.first
        if tokens is not None and tokens.completion > 1 and span_s > 0:
            parts.append(f"{(tokens.completion - 1) / span_s:.1f} tokens/s")
    if ended == "length":
        parts.append("token limit")
    elif ended not in (None, "stop"):
        parts.append(f"ended: {ended}")
    return ", ".join(parts)
