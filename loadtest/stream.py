"""Times and counts of one streamed response, without HTTP and without Locust."""

import json
from dataclasses import dataclass, field


@dataclass(slots=True)
class Stream:
    """One streamed chat completion from its client's view. Times are seconds of one monotonic clock.

    TTFT is the time to the first token with text, not to the headers, which are sent with the first comment of a cold start.
    """

    sent_at: float
    first_at: float | None = None
    last_at: float | None = None
    #: Seconds between one event with text and the next.
    gaps_s: list[float] = field(default_factory=list)
    #: Completion tokens as the engine counts them. An event may contain several.
    tokens: int = 0
    #: True once `[DONE]` has arrived. Without it, a stream is not a success.
    done: bool = False
    #: The code and text of an error event.
    error: str | None = None
    code: str | None = None

    def read(self, line: bytes, now: float) -> None:
        """Read one line of the stream, which arrived at `now`. Raises ValueError if it is not a line of OpenAI's API."""
        if not line or line.startswith(b":"):
            return
        if not line.startswith(b"data: "):
            raise ValueError(f"not a line of an event stream: {line[:100]!r}")
        if line == b"data: [DONE]":
            self.done = True
            return
        event = json.loads(line[6:])
        if "error" in event:
            self.code = str(event["error"]["code"])
            self.error = f"{self.code}: {event['error']['message']}"
            return
        if event.get("usage"):
            self.tokens = event["usage"]["completion_tokens"]
        if any(choice["delta"].get("content") for choice in event["choices"]):
            if self.last_at is None:
                self.first_at = now
            else:
                self.gaps_s.append(now - self.last_at)
            self.last_at = now

    @property
    def ttft_s(self) -> float | None:
        """Seconds to the first token; None if the response had no text."""
        return None if self.first_at is None else self.first_at - self.sent_at

    @property
    def tokens_per_s(self) -> float | None:
        """The speed of decoding, 1/TPOT: the tokens after the first, divided by their time. None if there are too few."""
        if self.first_at is None or self.last_at is None or self.tokens < 2 or self.last_at <= self.first_at:
            return None
        return (self.tokens - 1) / (self.last_at - self.first_at)
