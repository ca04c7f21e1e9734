"""OpenAI's chat completions and completions, which are also the engine's own protocols: answers are changed as bytes on their way."""

from typing import Any

from lmaas.error_bodies import openai_body
from lmaas.errors import LmaasError
from lmaas.inference.protocol import Answer, Inference, Protocol
from lmaas.protocols import answers, sse
from lmaas.protocols.parameters.request import TextRequest, read_chat, read_completion


class StreamedText(sse.Rewriter, Answer):
    """The client's events of a chat or completion."""

    def __init__(self, inference: Inference[TextRequest]) -> None:
        request = inference.request
        super().__init__(
            inference.engine_name,
            request.model,
            include_usage=request.include_usage,
            continuous_usage=request.continuous_usage,
            n=request.parameters.get("n", 1),
            prompts=request.prompts,
            facts=inference.facts,
        )
        self._request = request
        self._is_changed = request.legacy_functions or request.only_echo

    def feed(self, chunk: bytes) -> bytes:
        """Return the client's events that these bytes complete."""
        events = super().feed(chunk)
        return answers.events_in_clients_form(events, self._request) if self._is_changed and events else events

    def end(self) -> bytes:
        """Return the mark of the end."""
        return sse.DONE + b"\n\n"

    def failed(self, error: LmaasError) -> bytes:
        """Return an event with the error. The mark of the end does not follow."""
        return sse.data(openai_body(error))


class WholeText(Answer):
    """The client's body of a chat or completion in one piece."""

    def __init__(self, inference: Inference[TextRequest]) -> None:
        self._inference, self._request = inference, inference.request
        self._usage: dict[str, Any] | None = None
        self._body = b""

    @property
    def usage(self) -> dict[str, Any] | None:
        """The engine's usage."""
        return self._usage

    def take(self, text: bytes) -> None:
        """Change the engine's body into the client's."""
        inference = self._inference
        body, self._usage, self.aborted = sse.rewrite_whole(text, inference.engine_name, self._request.model, inference.facts)
        if self._request.legacy_functions or self._request.only_echo:
            body = answers.in_clients_form(body, self._request)
        self._body = body

    def end(self) -> bytes:
        """Return the body."""
        return self._body


class TextProtocol(Protocol[TextRequest]):
    """The common parts of chat completions and completions."""

    def answer(self, inference: Inference[TextRequest]) -> Answer:
        """Return a new answer for an attempt."""
        return StreamedText(inference) if inference.request.stream else WholeText(inference)


class ChatCompletions(TextProtocol):
    """`/v1/chat/completions`."""

    path = engine_path = "/v1/chat/completions"
    texts = ("messages",)

    def read(self, body: dict[str, Any]) -> TextRequest:
        """Check a client's body and return the request for the engine."""
        return read_chat(body)

    def engine_ids(self, request_id: str, request: TextRequest) -> list[str]:
        """Return the engine's id of the request."""
        return chat_ids(request_id)


class Completions(TextProtocol):
    """`/v1/completions`."""

    path = engine_path = "/v1/completions"
    texts = ("prompt",)

    def read(self, body: dict[str, Any]) -> TextRequest:
        """Check a client's body and return the request for the engine."""
        return read_completion(body)

    def engine_ids(self, request_id: str, request: TextRequest) -> list[str]:
        """Return the engine's ids, one for each prompt."""
        return [f"cmpl-{request_id}-{index}" for index in range(request.prompts)]


def chat_ids(request_id: str) -> list[str]:
    """Return the ids that an engine gives to a request to its chat endpoint."""
    return [f"chatcmpl-{request_id}"]
