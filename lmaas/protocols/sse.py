"""Rewrites server-sent events on their way from an engine to a client."""

import functools
import json
import re
from collections.abc import Mapping
from typing import Any

DONE = b"data: [DONE]"
_DECODER = json.JSONDecoder()
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
_INDEX = re.compile(rb'"choices":\[{"index":(\d+)')
_COUNT = re.compile(rb'"(prompt_tokens|completion_tokens|cached_tokens)":(\d+)')
#: The largest event that an engine may send.
MAX_EVENT_BYTES = 8 * 1024 * 1024
_USAGE = b',"usage":{'
_NO_CHOICES = b'"choices":[]'
_ERROR = b'data: {"error"'
_ABORTED = b'"finish_reason":"abort"'
#: The form in which vLLM writes its fields about the service: in a plain answer before the usage, and at the end of a stream's last event.
_FACTS = re.compile(rb',"service_tier":(?:null|"[a-z]*"),"system_fingerprint":(?:null|"(?:[^"\\]|\\.)*")\Z')
_TIER, _MARK = b',"service_tier":', b',"system_fingerprint":'
_FINGERPRINT = re.compile(rb',"system_fingerprint":(?:null|"(?:[^"\\]|\\.)*")')
#: Marks of events that are more than a piece of the answer. A mark elsewhere, such as `data: [DONE]` written by a model, only costs time.
_SPECIAL = (DONE, _ERROR, _NO_CHOICES, _ABORTED, _MARK)


def data(value: Any) -> bytes:
    """Return an event with a JSON value."""
    return b"data: " + _ENCODER.encode(value).encode() + b"\n\n"


class Rewriter:
    """Turns an engine's stream into a client's: puts the client's model name and facts about the service into every event, removes fields
    that the client did not request, and keeps the usage.

    It works on the bytes of all events that arrived together, and parses nothing for each token. That is safe because every quote inside a
    JSON string is escaped, so `,"usage":`, `"model":` and the like can only be keys of the event itself.
    """

    def __init__(
        self,
        engine_name: str,
        asked: str,
        *,
        include_usage: bool,
        continuous_usage: bool,
        n: int = 1,
        prompts: int = 1,
        facts: Mapping[str, str] | None = None,
    ) -> None:
        self._internal = b'"model":' + json.dumps(engine_name).encode()
        #: The name, and with it the facts about the service (`service_tier`, `system_fingerprint`), which every event has.
        self._asked = b'"model":' + _ENCODER.encode(asked).encode() + _written(facts)
        self._has_facts = bool(facts)
        self._include_usage, self._continuous_usage = include_usage, continuous_usage
        self._n = n
        #: With one choice, an event's usage is that of the request, and most events can be changed together.
        self._simple = n == 1 and prompts == 1 and not continuous_usage
        self._choices: dict[int, dict[str, Any]] = {}
        self._rest = b""
        self._unread = b""
        self._usage: dict[str, Any] | None = None
        #: True if the usage of the whole request has arrived. Without it `[DONE]` is not a success, because a dying engine sends that too.
        self.complete = False
        #: True if `[DONE]` has arrived.
        self.done = False
        #: The JSON of the engine's error event, if one has come.
        self.error: bytes | None = None
        #: True if the engine has aborted a choice. Later events still count for the usage, but are not sent to the client.
        self.aborted = False

    @property
    def usage(self) -> dict[str, Any] | None:
        """The usage that the engine has reported so far."""
        if self._unread:
            found = {name.decode(): int(count) for name, count in _COUNT.findall(self._unread)}
            cached = found.pop("cached_tokens", 0)
            self._usage, self._unread = found | {"prompt_tokens_details": {"cached_tokens": cached}}, b""
        return self._usage

    def feed(self, chunk: bytes) -> bytes:
        """Return the client's events, each with its empty line, that these bytes complete. Raises ValueError for bytes that
        are no event of an engine. What comes after `[DONE]` or an error does not count."""
        received = (self._rest + chunk).lstrip(b"\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise ValueError(f"an event of more than {MAX_EVENT_BYTES} bytes")
        end = received.rfind(b"\n\n") + 2
        if end < 2:
            self._rest = received
            return b""
        block, self._rest = received[:end], received[end:]
        plain = self._plain_until(block)
        out = self._plain(block[:plain]) if plain else b""
        return out + self._each(block[plain:]) if plain < end else out

    def close(self) -> bytes:
        """Return the client's events that the end of the stream completes: the last one may lack its empty line."""
        return self.feed(b"\n\n") if self._rest.strip() else b""

    def _plain_until(self, block: bytes) -> int:
        """Return the position of the first event that must be parsed individually."""
        if not self._simple or self.done or self.aborted or self.error is not None:
            return 0
        place = min((place for mark in _SPECIAL if (place := block.find(mark)) >= 0), default=-1)
        if place < 0:
            return len(block)
        before = block.rfind(b"\n\n", 0, place)
        return before + 2 if before >= 0 else 0

    def _plain(self, events: bytes) -> bytes:
        """Change many events at once, each of which is a piece of the only choice."""
        parts = events.split(_USAGE)
        for number in range(1, len(parts)):
            part = parts[number]
            end = part.find(b"}")
            if end < 0 or part.find(b"{", 0, end) >= 0:
                # The JSON has nested objects, unlike the events that vLLM writes while a stream runs.
                return self._each(events)
            parts[number] = part[end + 1 :]
        if len(parts) > 1:
            self._unread = events[events.rfind(_USAGE) :]
        return b"".join(parts).replace(self._internal, self._asked)

    def _each(self, events: bytes) -> bytes:
        """Change events one by one."""
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
        """Return an event as the client gets it, or None to leave it out. Raises ValueError if the engine's bytes cannot be parsed."""
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
        if self._has_facts and _MARK in event:
            # The engine's own fingerprint, which stands in its last event.
            event = _FINGERPRINT.sub(b"", event)
        return event.replace(self._internal, self._asked, 1)

    def _total(self, event: bytes, usage: dict[str, Any]) -> dict[str, Any]:
        """Return the usage of all choices. While a stream runs, vLLM reports only the usage of the event's own choice and prompt."""
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
    """Raise ValueError unless the counts are numbers: they are used later, where such an error could not be handled."""
    details = usage.get("prompt_tokens_details") or {}
    counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"), details.get("cached_tokens") if isinstance(details, dict) else "")
    if not all(isinstance(count, int | None) for count in counts):
        raise ValueError(f"usage {usage}")


def _written(facts: Mapping[str, str] | None) -> bytes:
    return _pairs(*facts.items()) if facts else b""


@functools.lru_cache(10_000)
def _pairs(*items: tuple[str, str]) -> bytes:
    """Names and values as they stand in JSON, each after a comma. Few differ, and every answer has some."""
    return b"".join(b"," + _ENCODER.encode(name).encode() + b":" + _ENCODER.encode(value).encode() for name, value in items)


def rewrite_whole(text: bytes, engine_name: str, asked: str, facts: Mapping[str, str] | None = None) -> tuple[bytes, dict[str, Any], bool]:
    """Return an answer in one piece for the client, its usage, and whether the engine ended a choice before its time.

    `facts` replace the engine's own fields about the service. Works on the bytes as above, where they are as vLLM writes them. Raises
    ValueError if the engine's bytes cannot be parsed.
    """
    place = text.rfind(_USAGE)
    internal = b'"model":' + json.dumps(engine_name).encode()
    if place >= 0 and internal in text and text.endswith(b"}"):
        start = text.rfind(_TIER, max(0, place - 300), place)
        own = _FACTS.match(text, start, place) if start >= 0 else None
        if not facts or own is not None or (_TIER not in text and _MARK not in text):
            usage, _ = _DECODER.raw_decode(text[place + len(_USAGE) - 1 :].decode())
            _check(usage)
            if facts:
                text = text[: place if own is None else own.start()] + _written(facts) + text[place:]
            return text.replace(internal, b'"model":' + _ENCODER.encode(asked).encode(), 1), usage, _ABORTED in text
    answer: dict[str, Any] = json.loads(text)
    aborted = any(choice.get("finish_reason") == "abort" for choice in answer.get("choices", ()))
    answer |= {"model": asked, **(facts or {})}
    return _ENCODER.encode(answer).encode(), answer.get("usage") or {}, aborted
