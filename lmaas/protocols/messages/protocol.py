"""The Messages protocol on the path of a request."""

from collections.abc import Sequence
from typing import Any

from lmaas.error_bodies import anthropic_body
from lmaas.errors import LmaasError
from lmaas.inference.protocol import Answer, Inference, Protocol
from lmaas.inference.request import EngineRequest
from lmaas.protocols.messages.events import PING, MessageStream
from lmaas.protocols.messages.request import MessagesRequest, read_messages
from lmaas.protocols.messages.whole import WholeMessage


class Messages(Protocol):
    """`POST /v1/messages`, served by the engine's chat completions."""

    path = "/v1/messages"
    engine_path = "/v1/chat/completions"
    texts = ("messages", "system")

    def read(self, body: dict[str, Any]) -> MessagesRequest:
        """Check a client's body. Raises InvalidRequest with the field that is wrong."""
        return read_messages(body)

    def engine_ids(self, request_id: str, request: EngineRequest) -> list[str]:
        """Return the engine's id of the chat."""
        return [f"chatcmpl-{request_id}"]

    def answer(self, inference: Inference) -> Answer:
        """Return a new answer for an attempt."""
        request = inference.request
        if not isinstance(request, MessagesRequest):
            raise TypeError("the request is of another protocol")
        return (MessageStream if request.stream else WholeMessage)(inference, request)

    def error_body(self, error: LmaasError, request_id: str) -> dict[str, Any]:
        """Return the body of an error response in Anthropic's shape."""
        return anthropic_body(error, request_id)

    def waiting(self, comments: Sequence[str]) -> bytes:
        """Return the comments about the wait and a ping, which Anthropic's clients expect and skip."""
        return super().waiting(comments) + PING
