"""Server-sent events between an engine and a client: what is changed in them, and nothing else."""

import json
import re
from typing import Any

DONE = b"data: [DONE]"
_DECODER = json.JSONDecoder()
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
_INDEX = re.compile(rb'"choices":\[{"index":(\d+)')
_COUNT = re.compile(rb'"(prompt_tokens|completion_tokens|cached_tokens)":(\d+)')
#: No event of an engine is larger; what has no end is none.
MAX_EVENT_BYTES = 8 * 1024 * 1024
_USAGE = b',"usage":{'
_NO_CHOICES = b'"choices":[]'
_ERROR = b'data: {"error"'
_ABORTED = b'"finish_reason":"abort"'
#: What makes an event more than a piece of the answer. Seen elsewhere too (a model may write `data: [DONE]`) they only cost time.
_SPECIAL = (DONE, _ERROR, _NO_CHOICES, _ABORTED)


def comment(text: str) -> bytes:
    """Return a comment line, which clients skip. It keeps a silent connection open.

    No empty line follows: it would end an event without data, which some clients (Go's) take for an answer that is empty. The comment
    becomes part of the next event, where parsers skip it too.
    """
    return f": {text}\n".encode()


def data(value: Any) -> bytes:
    """An event of ours."""
    return b"data: " + _ENCODER.encode(value).encode() + b"\n\n"


class Rewriter:
    """Turns an engine's stream into a client's: gives every event the name that the client asked for, takes out what it did not ask
    for, and keeps the account.

    Works on the bytes, and on all events that arrived together at once: nothing is parsed for each token. That is safe because inside a
    JSON string every quote is escaped, so `,"usage":`, `"model":` and the like as they stand here occur only as keys of the event itself.
    """

    def __init__(self, engine_name: str, asked: str, *, include_usage: bool, continuous_usage: bool, n: int = 1, prompts: int = 1) -> None:
        self._internal = b'"model":' + json.dumps(engine_name).encode()
        self._asked = b'"model":' + _ENCODER.encode(asked).encode()
        self._include_usage, self._continuous_usage = include_usage, continuous_usage
        self._n = n
        #: With one choice an event's usage is the request's, and the client's events need no look at each.
        self._simple = n == 1 and prompts == 1 and not continuous_usage
        self._choices: dict[int, dict[str, Any]] = {}
        self._rest = b""
        self._unread = b""
        self._usage: dict[str, Any] | None = None
        #: Whether the engine has given its account of the whole request: without it, `[DONE]` is no success (a dying engine says it too).
        self.complete = False
        #: The engine has said `[DONE]`.
        self.done = False
        #: The engine's error event, as JSON.
        self.error: bytes | None = None
        #: The engine has ended a choice before its time. Its events still count, and are not for the client any more.
        self.aborted = False

    @property
    def usage(self) -> dict[str, Any] | None:
        """What the engine has reported of the request so far, as a usage object."""
        if self._unread:
            found = {name.decode(): int(count) for name, count in _COUNT.findall(self._unread)}
            cached = found.pop("cached_tokens", 0)
            self._usage, self._unread = found | {"prompt_tokens_details": {"cached_tokens": cached}}, b""
        return self._usage

    def feed(self, chunk: bytes) -> bytes:
        """The events for the client, each with its empty line, that these bytes complete. Raises ValueError if the engine talks
        nonsense. What comes after `[DONE]` or an error does not count."""
        received = (self._rest + chunk).lstrip(b"\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise ValueError("an event without an end")
        end = received.rfind(b"\n\n") + 2
        if end < 2:
            self._rest = received
            return b""
        block, self._rest = received[:end], received[end:]
        plain = self._plain_until(block)
        out = self._plain(block[:plain]) if plain else b""
        return out + self._each(block[plain:]) if plain < end else out

    def close(self) -> bytes:
        """The stream has ended: what stands there without its empty line is an event too."""
        return self.feed(b"\n\n") if self._rest.strip() else b""

    def _plain_until(self, block: bytes) -> int:
        """Where the first event begins that needs a look of its own."""
        if not self._simple or self.done or self.aborted or self.error is not None:
            return 0
        place = min((place for mark in _SPECIAL if (place := block.find(mark)) >= 0), default=-1)
        if place < 0:
            return len(block)
        before = block.rfind(b"\n\n", 0, place)
        return before + 2 if before >= 0 else 0

    def _plain(self, events: bytes) -> bytes:
        """Pieces of the only choice, many at once."""
        parts = events.split(_USAGE)
        for number in range(1, len(parts)):
            part = parts[number]
            end = part.find(b"}")
            if end < 0 or part.find(b"{", 0, end) >= 0:
                # Not as flat as vLLM writes it while a stream runs.
                return self._each(events)
            parts[number] = part[end + 1 :]
        if len(parts) > 1:
            self._unread = events[events.rfind(_USAGE) :]
        return b"".join(parts).replace(self._internal, self._asked)

    def _each(self, events: bytes) -> bytes:
        """Events one by one."""
        out: list[bytes] = []
        for raw in events.split(b"\n\n"):
            event = raw.strip(b"\n")
            if not event or self.done or self.error is not None:
                continue
            if event == DONE:
                self.done = True
            elif event.startswith(_ERROR):
                self.error = event.removeprefix(b"data: ")
            else:
                rewritten = self(event)
                self.aborted = self.aborted or _ABORTED in event
                if rewritten is not None and not self.aborted:
                    out += (rewritten, b"\n\n")
        return b"".join(out)

    def __call__(self, event: bytes) -> bytes | None:
        """One event for the client, or None if it is not for the client. Raises ValueError if the engine talks nonsense."""
        start = event.rfind(_USAGE)
        if start >= 0:
            tail = event[start + len(_USAGE) - 1 :].decode()
            usage, end = _DECODER.raw_decode(tail)
            _check(usage)
            last = _NO_CHOICES + b"," in event or event[:start].endswith(_NO_CHOICES)
            self.complete = self.complete or last
            self._usage, self._unread = usage if last else self._total(event, usage), b""
            if last and not self._include_usage:
                return None
            if not last and not self._continuous_usage:
                event = event[:start] + tail[end:].encode()
        return event.replace(self._internal, self._asked, 1)

    def _total(self, event: bytes, usage: dict[str, Any]) -> dict[str, Any]:
        """The usage of all choices: while a stream runs, vLLM reports that of the chunk's own choice (and prompt) only."""
        found = _INDEX.search(event)
        self._choices[int(found[1]) if found else 0] = usage
        if len(self._choices) == 1:
            return usage
        # Choices are numbered prompt by prompt; a prompt counts once.
        prompts = {index // self._n: choice for index, choice in self._choices.items()}
        cached = sum((choice.get("prompt_tokens_details") or {}).get("cached_tokens") or 0 for choice in prompts.values())
        return {
            "prompt_tokens": sum(choice["prompt_tokens"] for choice in prompts.values()),
            "completion_tokens": sum(choice["completion_tokens"] for choice in self._choices.values()),
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def _check(usage: dict[str, Any]) -> None:
    """Raises ValueError unless what is counted is a number: it is read where nobody could handle that."""
    details = usage.get("prompt_tokens_details") or {}
    counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"), details.get("cached_tokens") if isinstance(details, dict) else "")
    if not all(isinstance(count, int | None) for count in counts):
        raise ValueError(f"usage {usage}")


def rewrite_whole(text: bytes, engine_name: str, asked: str) -> tuple[bytes, dict[str, Any], bool]:
    """An answer in one piece, for the client; its usage; and whether the engine ended a choice before its time.

    On the bytes as above, where they are as vLLM writes them. Raises ValueError if the engine talks nonsense.
    """
    place = text.rfind(_USAGE)
    internal = b'"model":' + json.dumps(engine_name).encode()
    if place >= 0 and internal in text and text.endswith(b"}"):
        usage, _ = _DECODER.raw_decode(text[place + len(_USAGE) - 1 :].decode())
        _check(usage)
        return text.replace(internal, b'"model":' + _ENCODER.encode(asked).encode(), 1), usage, _ABORTED in text
    answer: dict[str, Any] = json.loads(text)
    aborted = any(choice.get("finish_reason") == "abort" for choice in answer.get("choices", ()))
    answer["model"] = asked
    return _ENCODER.encode(answer).encode(), answer.get("usage") or {}, aborted
