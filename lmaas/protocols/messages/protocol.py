"""The Messages protocol on the path of a request."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from lmaas.admission.limits import rate_limit_headers
from lmaas.error_bodies import anthropic_body, anthropic_limit_headers, anthropic_status
from lmaas.errors import LmaasError
from lmaas.inference.protocol import Answer, Inference, Protocol
from lmaas.protocols.messages.events import PING, MessageStream
from lmaas.protocols.messages.request import MessagesRequest, read_messages
from lmaas.protocols.messages.whole import WholeMessage
from lmaas.protocols.text import chat_ids


class Messages(Protocol[MessagesRequest]):
    """`POST /v1/messages`, served by the engine's chat completions."""

    path = "/v1/messages"
    engine_path = "/v1/chat/completions"
    texts = ("messages", "system")

    def read(self, body: dict[str, Any]) -> MessagesRequest:
        """Check a client's body. Raises InvalidRequest with the field that is wrong."""
        return read_messages(body)

    def engine_ids(self, request_id: str, request: MessagesRequest) -> list[str]:
        """Return the engine's id of the chat."""
        return chat_ids(request_id)

    def answer(self, inference: Inference[MessagesRequest]) -> Answer:
        """Return a new answer for an attempt."""
        return MessageStream(inference) if inference.request.stream else WholeMessage(inference)

    def error_body(self, error: LmaasError, request_id: str) -> dict[str, Any]:
        """Return the body of an error response in Anthropic's shape."""
        return anthropic_body(error, request_id)

    def error_status(self, error: LmaasError) -> int:
        """Return the status that Anthropic's clients expect for an error."""
        return anthropic_status(error)

    def limit_lines(self, left: Mapping[str, Sequence[int]]) -> bytes:
        """Return the headers about the limits per minute, and Anthropic's beside them."""
        theirs = anthropic_limit_headers(rate_limit_headers(left), time.time())
        return super().limit_lines(left) + "".join(f"{name}: {value}\r\n" for name, value in theirs.items()).encode()

    def waiting(self, comments: Sequence[str]) -> bytes:
        """Return the comments about the wait and a ping, which Anthropic's clients expect and skip."""
        return super().waiting(comments) + PING
