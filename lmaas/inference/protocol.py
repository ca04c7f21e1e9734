"""The interface between the path of a request and a client protocol. Each module of `lmaas.protocols` implements it for one protocol."""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from lmaas.admission.limits import rate_limit_lines
from lmaas.error_bodies import openai_body
from lmaas.errors import LmaasError
from lmaas.inference.catalog import ServedModel
from lmaas.inference.request import EngineRequest
from lmaas.inference.work import INTERACTIVE, Work
from lmaas.metering.usage import UsageRecord
from lmaas.states import PoolKind
from lmaas.tracing.trace import Trace

#: The key under which an endpoint leaves the inference in the scope of its request.
INFERENCE = "lmaas.inference"
#: A protocol's own kind of request.
Request = TypeVar("Request", bound=EngineRequest)


class Answer(ABC):
    """Turns an engine's answer to one attempt into the client's.

    For a stream, `feed` is called with the engine's bytes as they arrive, then `close` if the engine's stream ended by itself, and `failed`
    if an error ends it. For an answer in one piece, `take` is called with the body of each of the engine's responses (one, unless the
    request has several parts). A class implements those of its form. `end` is called once, after the usage is settled and `Protocol.keep`
    has returned. `feed`, `close` and `take` raise ValueError for bytes that are no answer of an engine.
    """

    #: True if the usage of the whole request has arrived. Without it the end is not a success, because a dying engine ends its stream too.
    complete = False
    #: True if the end of the engine's stream has arrived.
    done = False
    #: The JSON of the engine's error event, if one has come.
    error: bytes | None = None
    #: True if the engine has aborted a choice. Later events still count for the usage, but are not sent to the client.
    aborted = False

    @property
    @abstractmethod
    def usage(self) -> dict[str, Any] | None:
        """The engine's `usage` object so far: totals of the request, with the names of OpenAI's chat completions."""

    @property
    def usage_if_left(self) -> dict[str, Any]:
        """Return the engine's count for a request whose receiver went away.

        The engine reports the prompt's tokens of a request that was cut before its first token, but has not finished or counted them.
        """
        usage = self.usage or {}
        return usage if usage.get("completion_tokens") else {}

    def feed(self, chunk: bytes) -> bytes:
        """Return the client's events that these bytes complete, without those of the end."""
        raise ValueError("a stream instead of a whole answer")

    def close(self) -> bytes:
        """Return the client's events that the end of the engine's stream completes."""
        return b""

    def take(self, text: bytes) -> None:
        """Read the body of one of the engine's responses."""
        raise ValueError("a whole answer instead of a stream")

    @abstractmethod
    def end(self) -> bytes:
        """Return the last bytes of a stream, or the whole body of an answer in one piece."""

    def failed(self, error: LmaasError) -> bytes:
        """Return the events that end a stream with this error. An answer in one piece has none: its client gets an error response."""
        return b""


@dataclass(slots=True)
class Inference(Generic[Request]):
    """One request, from its acceptance to its usage event.

    `request_id` is the service's own id of the request, or of the attempt if it is durable work. The fields below `work` are set by
    `Inferences.serve` on the way.
    """

    request_id: str
    protocol: "Protocol[Request]"
    request: Request
    work: Work = INTERACTIVE
    #: When the request had been read, and when the first event of a stream's answer was sent (monotonic seconds).
    began: float = field(default_factory=time.monotonic)
    first_sent: float | None = None
    #: Its trace, if it is sampled.
    trace: Trace | None = None
    tenant_id: str = field(init=False)
    model: ServedModel = field(init=False)
    record: UsageRecord = field(init=False)
    #: That of the latest attempt.
    answer: Answer = field(init=False)

    @property
    def engine_name(self) -> str:
        """The engine's name for the model."""
        return self.model.engine_name

    @property
    def first_s(self) -> float | None:
        """The seconds until the first event of a stream's answer was sent; None if there was none."""
        return None if self.first_sent is None else self.first_sent - self.began

    @property
    def facts(self) -> dict[str, str]:
        """Fields about the service that OpenAI's answers have."""
        tier = self.request.service_tier
        return {"service_tier": "default" if tier in ("auto", "scale") else tier, "system_fingerprint": self.model.fingerprint}


class Protocol(ABC, Generic[Request]):
    """A client protocol, or one endpoint of it. An instance is built once, in the composition root, and serves all requests."""

    #: The path of the clients' requests, which is also the label in metrics.
    path: str
    #: The path on the engine.
    engine_path: str
    #: The kind of pool that can serve it.
    kind = PoolKind.GENERATE
    #: The top-level fields whose strings are for a model: they may have NUL, and half a surrogate pair in them is replaced.
    texts: tuple[str, ...] = ()

    @abstractmethod
    def read(self, body: dict[str, Any]) -> Request:
        """Check a client's body, which is a parsed JSON object, and return the request for the engine. Raises InvalidRequest with the
        field that is wrong."""

    @abstractmethod
    def engine_ids(self, request_id: str, request: Request) -> list[str]:
        """Return the engine's ids of a request, by which it is aborted."""

    @abstractmethod
    def answer(self, inference: Inference[Request]) -> Answer:
        """Return a new answer for an attempt."""

    async def expand(self, tenant_id: str, request: Request) -> None:
        """Add what the request refers to, such as the items of an earlier response. Called once, after the model is resolved.

        Raises NotFound for what this tenant does not have.
        """

    async def keep(self, inference: Inference[Request]) -> None:
        """Store everything that outlives the request, before the client receives the end of its answer. Called only for complete
        answers."""

    def error_body(self, error: LmaasError, request_id: str) -> dict[str, Any]:
        """Return the body of an error response in the protocol's own shape."""
        return openai_body(error)

    def error_status(self, error: LmaasError) -> int:
        """Return the HTTP status of an error response."""
        return int(error.status)

    def limit_lines(self, left: Mapping[str, Sequence[int]]) -> bytes:
        """Return header lines about the limits per minute. `left` is as for `rate_limit_lines`."""
        return rate_limit_lines(left)

    def waiting(self, comments: Sequence[str]) -> bytes:
        """Return what a streaming client gets while its request waits. It must not end an event.

        No empty line follows a comment: it would end an event without data, which some clients (Go's) take for an empty response. The
        comments become part of the next event, where parsers skip them too.
        """
        return b"".join(f": {text}\n".encode() for text in comments)


#: An inference, and a protocol, of any kind of request.
AnyInference = Inference[Any]
AnyProtocol = Protocol[Any]
