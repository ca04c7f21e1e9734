"""The measured request of each protocol, and the check of its answer.

All requests have the same prompt and request TOKENS tokens. An embedding request has the same text as its only input.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.gateways.engine import TOKEN, TOKENS, VECTORS

SYSTEM = "You are a helpful assistant of a small shop. Answer in one or two sentences."
USER = "Good morning! My order has not arrived yet, although it was sent a week ago. What can I do now?"
#: The messages of a chat, which is the request to every proxy.
MESSAGES = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]

#: The name of the base model of kind embed.
EMBEDDER = "embedder"
_TEXT = TOKEN.strip(b'"')


@dataclass(frozen=True)
class Protocol:
    """A protocol: its path below `/v1`, the fields of a request and those that a stream has in addition.

    `fault` returns what is wrong with the body of an answer of status 200, or None. A `model` of None means the tenant's adapter.
    """

    path: str
    fields: Mapping[str, Any]
    fault: Callable[[bytes, bool], str | None]
    streaming: Mapping[str, Any] = field(default_factory=lambda: {"stream": True})
    model: str | None = None

    def body(self, model: str, *, stream: bool) -> dict[str, Any]:
        """Return the body of a request."""
        return {"model": model, **self.fields, **(self.streaming if stream else {})}


def _tokens(content: bytes, end: bytes) -> str | None:
    """Return a fault unless the content has all tokens and this end."""
    found = content.count(_TEXT)
    if found != TOKENS or not content.rstrip().endswith(end):
        return f"{found} of {TOKENS} tokens, ending with {content[-100:]!r}"
    return None


def _chat(content: bytes, streamed: bool) -> str | None:
    return _tokens(content, b"data: [DONE]" if streamed else b"}")


def _responses(content: bytes, streamed: bool) -> str | None:
    # The engine ends every answer at its limit, so a response with all tokens is incomplete.
    if not streamed:
        return _tokens(content, b"}") or (None if b'"reason":"max_output_tokens"' in content else f"another end: {content[:300]!r}")
    # The events after the pieces have the whole text again, the last one in the whole response.
    pieces, _, rest = content.partition(b"event: response.output_text.done\n")
    last = rest.rpartition(b"\nevent: ")[2]
    return _tokens(pieces, b"") or (None if last.startswith(b"response.incomplete\n") else f"ending with {content[-300:]!r}")


def _messages(content: bytes, streamed: bool) -> str | None:
    return _tokens(content, b'data: {"type":"message_stop"}' if streamed else b"}")


def _embeddings(content: bytes, _: bool) -> str | None:
    return None if sum(map(content.count, VECTORS.values())) == 1 else f"not the engine's vector: {content[:300]!r}"


_RESPONSE = {"instructions": SYSTEM, "input": [{"role": "user", "content": USER}], "max_output_tokens": TOKENS, "temperature": 0}
PROTOCOLS: Mapping[str, Protocol] = {
    "chat": Protocol(
        "/chat/completions",
        {"messages": MESSAGES, "max_tokens": TOKENS, "temperature": 0},
        _chat,
        {"stream": True, "stream_options": {"include_usage": True}},
    ),
    "responses": Protocol("/responses", _RESPONSE, _responses),
    "responses, store: false": Protocol("/responses", {**_RESPONSE, "store": False}, _responses),
    "messages": Protocol(
        "/messages", {"system": SYSTEM, "messages": MESSAGES[1:], "max_tokens": TOKENS, "temperature": 0}, _messages
    ),
    **{
        f"embeddings, {form}": Protocol(
            "/embeddings", {"input": [f"{SYSTEM} {USER}"], "encoding_format": form}, _embeddings, model=EMBEDDER
        )
        for form in VECTORS
    },
}  # fmt: skip
