"""The protocols of the chaos test's clients: the shape of a request, and how to read a response."""

from abc import ABC, abstractmethod
from typing import Any

from tests.support.verdict import Attempt

#: The beginnings of the texts of errors within a stream of responses, whose codes are OpenAI's own, and the codes to which they correspond.
_FAILURES = {"The engine failed": "engine_failed", "No engine had room": "no_capacity", "The request queue": "queue_unavailable"}


class Dialect(ABC):
    """One endpoint of one protocol."""

    path: str
    #: True if its responses can be streams.
    streams = True

    @abstractmethod
    def body(self, words: str, max_tokens: int, *, stream: bool) -> dict[str, Any]:
        """Return the body of a request, without its model."""

    @abstractmethod
    def read_event(self, event: dict[str, Any], attempt: Attempt) -> bool:
        """Record the contents of an event. Returns True if it ends the stream."""

    @abstractmethod
    def completion_tokens(self, answer: dict[str, Any]) -> int:
        """Return the completion tokens that a whole response reports."""

    def schema(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Return the fields that make a response fit a schema; none if the protocol has no such fields."""
        return {}


class Chat(Dialect):
    """OpenAI's chat completions."""

    path = "/v1/chat/completions"

    def body(self, words: str, max_tokens: int, *, stream: bool) -> dict[str, Any]:
        """Return the body of a request."""
        return {"messages": [{"role": "user", "content": words}], "max_tokens": max_tokens, "stream": stream, "ignore_eos": True}

    def schema(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Return the response format."""
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}

    def read_event(self, event: dict[str, Any], attempt: Attempt) -> bool:
        """Record the tokens, the usage or the error. The end is `[DONE]`, which is not JSON."""
        if "error" in event:
            attempt.code = event["error"]["code"]
            return True
        for choice in event["choices"]:
            attempt.tokens += bool(choice.get("text") or choice.get("delta", {}).get("content"))
        attempt.usage = event.get("usage") or attempt.usage
        return False

    def completion_tokens(self, answer: dict[str, Any]) -> int:
        """Return the completion tokens."""
        return int(answer["usage"]["completion_tokens"])


class Completion(Chat):
    """OpenAI's completions."""

    path = "/v1/completions"

    def body(self, words: str, max_tokens: int, *, stream: bool) -> dict[str, Any]:
        """Return the body of a request."""
        return {"prompt": words, "max_tokens": max_tokens, "stream": stream, "ignore_eos": True}


class Responses(Dialect):
    """OpenAI's responses. Their pieces may have several tokens, which are words."""

    path = "/v1/responses"

    def body(self, words: str, max_tokens: int, *, stream: bool) -> dict[str, Any]:
        """Return the body of a request."""
        return {"input": words, "max_output_tokens": max_tokens, "stream": stream, "ignore_eos": True}

    def schema(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Return the format of the text."""
        return {"text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}}

    def read_event(self, event: dict[str, Any], attempt: Attempt) -> bool:
        """Record the tokens, the usage or the error."""
        match event["type"]:
            case "response.output_text.delta":
                attempt.tokens += len(event["delta"].split())
            case "response.completed" | "response.incomplete":
                attempt.done, attempt.usage = True, {"completion_tokens": event["response"]["usage"]["output_tokens"]}
                return True
            case "response.failed":
                message = event["response"]["error"]["message"]
                attempt.code = next((code for begin, code in _FAILURES.items() if message.startswith(begin)), message)
                return True
        return False

    def completion_tokens(self, answer: dict[str, Any]) -> int:
        """Return the completion tokens."""
        return int(answer["usage"]["output_tokens"])


class Messages(Dialect):
    """Anthropic's messages. Their pieces may have several tokens, which are words."""

    path = "/v1/messages"

    def body(self, words: str, max_tokens: int, *, stream: bool) -> dict[str, Any]:
        """Return the body of a request."""
        return {"messages": [{"role": "user", "content": words}], "max_tokens": max_tokens, "stream": stream}

    def schema(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Return the format of the output."""
        return {"output_config": {"format": {"type": "json_schema", "schema": schema}}}

    def read_event(self, event: dict[str, Any], attempt: Attempt) -> bool:
        """Record the tokens, the usage or the error."""
        match event["type"]:
            case "content_block_delta":
                attempt.tokens += len(event["delta"].get("text", "").split())
            case "message_delta":
                attempt.usage = {"completion_tokens": event["usage"]["output_tokens"]}
            case "message_stop":
                attempt.done = True
                return True
            case "error":
                attempt.code = event["error"]["code"]
                return True
        return False

    def completion_tokens(self, answer: dict[str, Any]) -> int:
        """Return the completion tokens."""
        return int(answer["usage"]["output_tokens"])


class Embeddings(Dialect):
    """OpenAI's embeddings, which have no completion tokens."""

    path = "/v1/embeddings"
    streams = False

    def body(self, words: str, max_tokens: int, *, stream: bool) -> dict[str, Any]:
        """Return the body of a request with one input per word. The test uses more words than one part of a request can have inputs."""
        return {"input": [f"{words} {number}" for number in range(max_tokens)]}

    def read_event(self, event: dict[str, Any], attempt: Attempt) -> bool:
        """Raise ValueError: there are no streams."""
        raise ValueError(event)

    def completion_tokens(self, answer: dict[str, Any]) -> int:
        """Return 0."""
        return 0


#: The protocols for text, and how often each is used.
TEXT: dict[Dialect, int] = {Chat(): 3, Completion(): 2, Responses(): 3, Messages(): 2}
EMBEDDINGS = Embeddings()
