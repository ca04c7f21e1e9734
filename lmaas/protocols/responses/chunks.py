"""The engine's chat answers, as far as they are read: chunks of a stream, and whole answers."""

from typing import Any

import msgspec

_NOTHING = msgspec.Raw(b"null")


class Function(msgspec.Struct):
    """A call's function, or a part of it."""

    name: str | None = None
    arguments: str | None = None


class Call(msgspec.Struct):
    """A tool call, or a part of it. In whole answers the calls are in order and have no index."""

    index: int = 0
    function: Function | None = None

    @property
    def name(self) -> str:
        """The function's name, which comes with the first part; empty without it."""
        return (self.function.name if self.function else None) or ""

    @property
    def arguments(self) -> str:
        """The arguments, or a part of them."""
        return (self.function.arguments if self.function else None) or ""


class Said(msgspec.Struct):
    """A message, or a part of it."""

    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Call] | None = None


class Choice(msgspec.Struct):
    """A choice. A chunk has a `delta`, a whole answer a `message`."""

    delta: Said | None = None
    message: Said | None = None
    finish_reason: str | None = None
    logprobs: msgspec.Raw = _NOTHING


class PromptDetails(msgspec.Struct):
    """Details of the prompt's tokens."""

    cached_tokens: int | None = None
    created_cache_tokens: int | None = None


class CompletionDetails(msgspec.Struct):
    """Details of the completion's tokens."""

    reasoning_tokens: int | None = None


class Usage(msgspec.Struct):
    """The counts of tokens."""

    prompt_tokens: int = 0
    completion_tokens: int | None = 0
    prompt_tokens_details: PromptDetails | None = None
    completion_tokens_details: CompletionDetails | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the usage with the names of chat completions."""
        made, details = self.completion_tokens or 0, self.prompt_tokens_details
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
            "prompt_tokens_details": {"cached_tokens": (details.cached_tokens if details else None) or 0},
        }


class Chat(msgspec.Struct):
    """A chunk of a stream, or a whole answer."""

    choices: list[Choice]
    usage: Usage | None = None


class TopLogprob(msgspec.Struct):
    """An alternative to a token."""

    token: str
    logprob: float = -9999.0
    bytes: list[int] | None = None


class Logprob(msgspec.Struct):
    """A token with its log probability and its alternatives."""

    token: str
    logprob: float = -9999.0
    bytes: list[int] | None = None
    top_logprobs: list[TopLogprob] = []


class Logprobs(msgspec.Struct):
    """The log probabilities of a choice."""

    content: list[Logprob] | None = None


#: Raises ValueError for bytes that are no answer.
read_chat = msgspec.json.Decoder(Chat).decode
_read_logprobs = msgspec.json.Decoder(Logprobs | None).decode


def logprobs_of(choice: Choice) -> bytes:
    """Return the log probabilities of a choice as JSON objects with commas between them. Raises ValueError if they are none."""
    found = _read_logprobs(choice.logprobs)
    content = (found.content if found else None) or []
    for token in content:
        token.bytes = token.bytes or []
        for other in token.top_logprobs:
            other.bytes = other.bytes or []
    return msgspec.json.encode(content)[1:-1]
