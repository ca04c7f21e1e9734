"""Turns the engine's chat answers into responses: the events of a stream, or the object of a whole answer."""

import json
import time
from typing import Any

from lmaas.error_bodies import openai_body
from lmaas.errors import LmaasError
from lmaas.inference.protocol import Answer, Inference
from lmaas.protocols.chunks import ABORTED, ChatStream, Choice, Usage, read_whole
from lmaas.protocols.responses.logprobs import tokens_of
from lmaas.protocols.responses.output import IN_PROGRESS, encode
from lmaas.protocols.responses.request import ResponsesRequest
from lmaas.protocols.responses.stream import OutputStream

#: The reason why an answer was cut off, by the engine's reason for its end. With every other reason it is complete.
_CUT = {"length": b'{"reason":"max_output_tokens"}', "content_filter": b'{"reason":"content_filter"}'}
#: Codes of errors that a response has as they are: those of OpenAI's responses, and two that only a response in the background can have.
#: Every other error has the code of its kind.
_KNOWN_CODES = ("rate_limit_exceeded", "insufficient_quota", "context_length_exceeded", "invalid_api_key", "response_expired")
QUEUED = b"queued"
_USAGE = (
    b'{"input_tokens":%d,"input_tokens_details":{"cached_tokens":%d,"cache_write_tokens":%d},'
    b'"output_tokens":%d,"output_tokens_details":{"reasoning_tokens":%d},"total_tokens":%d}'
)


def response_id(request_id: str) -> str:
    """Return the id of the response to a request."""
    return f"resp_{request_id.removeprefix('req_')}"


class ResponseAnswer(Answer):
    """The common parts of streams and whole answers: the response object."""

    def __init__(self, inference: Inference[ResponsesRequest]) -> None:
        self._inference, self._request = inference, inference.request
        run = inference.request.run
        self.response_id = response_id(inference.request_id) if run is None else run.response_id
        first_event = 0 if run is None else run.first_event
        self._output = OutputStream(self.response_id, inference.request.custom, inference.request.namespaces, first_event)
        self._created = int(time.time()) if run is None else run.created_at
        self._usage: Usage | None = None
        self._finish: str | None = None
        #: The fields that stay the same, as JSON with a comma before each.
        self._same = b""
        self._response = b""

    @property
    def usage(self) -> dict[str, Any] | None:
        """The engine's usage so far."""
        return None if self._usage is None else self._usage.totals()

    def response(self) -> bytes:
        """Return the response as JSON, once the engine's answer is complete or has failed."""
        if not self._response:
            cut = _CUT.get(self._finish or "")
            status = b"completed" if cut is None else b"incomplete"
            self._response = self._object(status, incomplete=cut or b"null", completed=cut is None)
        return self._response

    def queued(self) -> bytes:
        """Return a response in the background as it is created."""
        return self._object(QUEUED)

    def _object(self, status: bytes, *, error: bytes = b"null", incomplete: bytes = b"null", completed: bool = False) -> bytes:
        if not self._same:
            request = self._request
            self._same = _fields(request.repeated | {"service_tier": self._inference.facts["service_tier"]})
        # While it runs, a response has no usage.
        usage = b"null" if self._usage is None or status == IN_PROGRESS else _usage(self._usage)
        return b'{"id":"%b","object":"response","created_at":%d,"status":"%b","completed_at":%b,"error":%b,"incomplete_details":%b%b%b}' % (
            self.response_id.encode(),
            self._created,
            status,
            b"%d" % time.time() if completed else b"null",
            error,
            incomplete,
            self._same,
            b',"output":[%b],"usage":%b' % (self._output.output(), usage),
        )


def _fields(values: dict[str, Any]) -> bytes:
    """Return fields as they stand in a JSON object, each after a comma."""
    try:
        text = encode(values)
    except OverflowError:
        # An integer of more than 64 bits, as a tool's schema may hold one.
        text = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()
    return b"," + text[1:-1]


def _usage(usage: Usage) -> bytes:
    prompt, made = usage.prompt_tokens, usage.completion_tokens or 0
    return _USAGE % (prompt, usage.cached_tokens, usage.created_cache_tokens, made, usage.reasoning_tokens or 0, prompt + made)


def error_json(error: LmaasError) -> bytes:
    """Return an error as it stands in a response: its code is one that OpenAI's clients know."""
    code = error.error_code
    if code not in _KNOWN_CODES:
        code = "server_error" if error.status >= 500 else "rate_limit_exceeded" if error.status == 429 else "invalid_prompt"
    shown = openai_body(error)["error"]
    return encode({"code": code, "message": shown["message"], "param": shown["param"], "type": shown["type"]})


class StreamedResponse(ResponseAnswer):
    """The events of a response."""

    def __init__(self, inference: Inference[ResponsesRequest]) -> None:
        super().__init__(inference)
        self._chat = ChatStream()
        self._begun = False

    def feed(self, chunk: bytes) -> bytes:
        """Return the client's events that these bytes complete. Pieces that arrived together are one event."""
        return self._written(self._chat.feed(chunk))

    def close(self) -> bytes:
        """Return the events that the end of the stream completes."""
        return self._written(self._chat.close())

    def _written(self, choices: list[Choice]) -> bytes:
        chat, output = self._chat, self._output
        self.complete, self.done, self.error, self.aborted = chat.complete, chat.done, chat.error, chat.aborted
        self._usage = chat.usage
        for choice in choices:
            if not self._begun:
                self._begin()
            said = choice.delta
            if said.reasoning:
                output.think(said.reasoning)
            has_logprobs = self._request.wants_logprobs and not said.reasoning and not said.tool_calls
            logprobs = tokens_of(choice.logprobs) if has_logprobs else b""
            if said.content or logprobs:
                output.say(said.content or "", logprobs)
            for call in said.tool_calls or ():
                output.call(call.index, call.name, call.arguments)
            if choice.finish_reason is not None:
                self._finish = choice.finish_reason
                output.finish(cut=self._finish in _CUT)
        if self.done and self.complete and not self.aborted and self._finish is None:
            # The engine has ended the answer without a reason.
            if not self._begun:
                self._begin()
            self._finish = "stop"
            output.finish(cut=False)
        return output.taken()

    def _begin(self) -> None:
        self._begun = True
        response = b'"response":%b' % self._object(IN_PROGRESS)
        if self._request.run is None:
            self._output.send(b"response.created", response)
        self._output.send(b"response.in_progress", response)

    def end(self) -> bytes:
        """Return the event of the end, which has the response."""
        kind = b"response.incomplete" if self._finish in _CUT else b"response.completed"
        self._output.send(kind, b'"response":%b' % self.response())
        return self._output.taken()

    def failed(self, error: LmaasError) -> bytes:
        """Return the event of a failure, which has what was written before. Events of the beginning precede it if there were none yet."""
        if not self._begun:
            self._begin()
        self._response = self._object(b"failed", error=error_json(error))
        self._output.send(b"response.failed", b'"response":%b' % self._response)
        return self._output.taken()


class WholeResponse(ResponseAnswer):
    """A response in one piece."""

    def take(self, text: bytes) -> None:
        """Read the engine's answer."""
        chat = read_whole(text)
        choice, message = chat.choices[0], chat.choices[0].message
        self._usage, self._finish = chat.usage, choice.finish_reason
        self.aborted, self.complete, self.done = self._finish == ABORTED, True, True
        output, calls = self._output, message.tool_calls or ()
        if message.reasoning:
            output.think(message.reasoning)
        # Beside reasoning or calls it is not known which tokens are those of the text.
        is_alone = not message.reasoning and not calls
        if message.content:
            output.say(message.content, tokens_of(choice.logprobs) if self._request.wants_logprobs and is_alone else b"")
        for number, call in enumerate(calls):
            output.call(number, call.name, call.arguments)
        output.finish(cut=self._finish in _CUT)

    def end(self) -> bytes:
        """Return the response."""
        return self.response()
