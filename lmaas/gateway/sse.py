"""Server-sent events between an engine and a client: what is changed in them, and nothing else."""

import json
import re
from collections.abc import AsyncIterator
from typing import Any

DONE = b"data: [DONE]"
_DECODER = json.JSONDecoder()
_INDEX = re.compile(rb'"choices":\[{"index":(\d+)')


async def events(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The events of a stream, each whole and without its empty line, however the bytes arrive."""
    buffer = b""
    async for chunk in chunks:
        buffer += chunk
        while (end := buffer.find(b"\n\n")) >= 0:
            event, buffer = buffer[:end], buffer[end + 2 :]
            if event := event.strip(b"\n"):
                yield event
    if buffer.strip():
        yield buffer.strip()


def comment(text: str) -> bytes:
    """A line that clients skip, to show that the request is alive."""
    return f": {text}\n\n".encode()


def data(value: Any) -> bytes:
    """An event of ours."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class Rewriter:
    """Gives every event of one stream the name that the client asked for, and takes out what it did not ask for.

    Works on the bytes: an event is not parsed and written again for each token. That is safe because inside a JSON string every
    quote is escaped, so `,"usage":` and `"model":` as they stand here occur only as keys of the event itself, and because vLLM
    writes `model` before anything that a model wrote.
    """

    def __init__(self, engine_name: str, asked: str, *, include_usage: bool, continuous_usage: bool, n: int = 1) -> None:
        self._internal = b'"model":' + json.dumps(engine_name).encode()
        self._asked = b'"model":' + json.dumps(asked, ensure_ascii=False).encode()
        self._include_usage, self._continuous_usage = include_usage, continuous_usage
        self._n = n
        self._choices: dict[int, dict[str, Any]] = {}
        #: What the engine has reported of the request so far, as a usage object.
        self.usage: dict[str, Any] | None = None
        #: Whether the engine has given its account of the whole request: without it, `[DONE]` is no success (a dying engine says it too).
        self.complete = False

    def __call__(self, event: bytes) -> bytes | None:
        """The event for the client, or None if it is not for the client. Raises ValueError if the engine talks nonsense."""
        start = event.rfind(b',"usage":{')
        if start >= 0:
            tail = event[start + 9 :].decode()
            usage, end = _DECODER.raw_decode(tail)
            last = b'"choices":[],' in event or event[:start].endswith(b'"choices":[]')
            self.complete = self.complete or last
            self.usage = usage if last else self._total(event, usage)
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
