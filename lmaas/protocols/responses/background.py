"""Responses in the background: their objects before their end, the events of their creation, and the protocol by which they run."""

import msgspec

from lmaas.errors import LmaasError
from lmaas.inference.protocol import Answer, Inference
from lmaas.protocols.responses.answer import StreamedResponse, error_json
from lmaas.protocols.responses.output import encode
from lmaas.protocols.responses.protocol import Responses
from lmaas.protocols.responses.request import BackgroundRun, ResponsesRequest
from lmaas.protocols.responses.stream import event
from lmaas.states import BackgroundStatus

#: Fields of the object of a queued response. No text of a client precedes them.
_QUEUED = b'"status":"queued","completed_at":null,"error":null,'


class _Head(msgspec.Struct):
    """The fields of a response object that are read."""

    created_at: int
    status: BackgroundStatus


_HEAD = msgspec.json.Decoder(_Head)


def with_status(queued: bytes, status: str, error: LmaasError | None = None) -> bytes:
    """Return the object of a queued response with another status, and the error of a failed one."""
    shown = b"null" if error is None else error_json(error)
    return queued.replace(_QUEUED, b'"status":"%b","completed_at":null,"error":%b,' % (status.encode(), shown), 1)


def creation_events(queued: bytes) -> bytes:
    """Return the events of a creation, which have the numbers 0 and 1."""
    response = b'"response":%b' % queued
    return event(b"response.created", 0, response) + event(b"response.queued", 1, response)


def failure_event(number: int, response: bytes) -> bytes:
    """Return the event of a response that failed before an engine had it."""
    return event(b"response.failed", number, b'"response":%b' % response)


def error_event(number: int, code: str, message: str) -> bytes:
    """Return the event for an error that ends a stream and is not about the answer itself."""
    return event(b"error", number, b'"code":%b,"message":%b,"param":null' % (encode(code), encode(message)))


def run_of(response_id: str, body: bytes, first_event: int) -> BackgroundRun:
    """Return what a run of a response has from its creation. `body` is the object of the queued response."""
    return BackgroundRun(response_id, _HEAD.decode(body).created_at, first_event)


def status_of(body: bytes) -> BackgroundStatus:
    """Return the status of a response object."""
    return _HEAD.decode(body).status


class BackgroundAnswer(StreamedResponse):
    """The answer to a run. The job runner decides the meaning of a failure: the run may be tried again."""

    def __init__(self, inference: Inference[ResponsesRequest]) -> None:
        super().__init__(inference)
        #: The error with which the run ended.
        self.failure: LmaasError | None = None

    def failed(self, error: LmaasError) -> bytes:
        """Keep the error. No event follows from it yet."""
        self.failure = error
        return b""

    def failure_events(self, error: LmaasError) -> bytes:
        """Return the events of a failure that is not tried again. `response` has it then."""
        return super().failed(error)


class BackgroundResponses(Responses):
    """The protocol of responses that run in the background. Those who run them store them."""

    def answer(self, inference: Inference[ResponsesRequest]) -> Answer:
        """Return a new answer for an attempt."""
        return BackgroundAnswer(inference)

    async def keep(self, inference: Inference[ResponsesRequest]) -> None:
        """Store nothing: the response is stored together with its usage event."""

    def waiting(self, comments: object) -> bytes:
        """Return nothing: comments are not events."""
        return b""
