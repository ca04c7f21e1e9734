"""Answers of pooling engines: the parts of a request are joined into the client's answer."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from lmaas.errors import LmaasError
from lmaas.inference.protocol import Answer, Inference
from lmaas.protocols.pooling.requests import PoolingRequest

ENCODE = msgspec.json.Encoder().encode


class Usage(msgspec.Struct):
    """The part of an engine's usage that is read."""

    prompt_tokens: int


class Result(Protocol):
    """One result of an engine, with the place of its input in the part."""

    @property
    def index(self) -> int:
        """The place of the input in the part."""


class Results(Protocol):
    """An engine's response, parsed."""

    @property
    def data(self) -> Sequence[Result]:
        """The results."""

    @property
    def usage(self) -> Usage:
        """The usage."""


class _Embedding(msgspec.Struct):
    index: int
    #: An array of numbers or a base64 string. It is passed on as it came, because parsing it would cost more than the rest of a request.
    embedding: msgspec.Raw


class _Embeddings(msgspec.Struct):
    data: list[_Embedding]
    usage: Usage


Parsed = TypeVar("Parsed", bound=Results)
_EMBEDDINGS = msgspec.json.Decoder(_Embeddings)
#: What an engine writes for an input that it did not compute, because it is being stopped.
_MISSING = (b"[]", b'""')


class PooledAnswer(Answer, Generic[Parsed]):
    """The answer to a request of several parts, each of which has one result for each of its inputs.

    These answers are never streamed, so `feed` and `close` are not called.
    """

    def __init__(self, inference: Inference) -> None:
        request = inference.request
        if not isinstance(request, PoolingRequest):
            raise TypeError("a request of another protocol")
        self.request, self.request_id = request, inference.request_id
        self._taken = self._tokens = 0

    @property
    def usage(self) -> dict[str, Any] | None:
        """The usage of the parts that have come."""
        return {"prompt_tokens": self._tokens, "completion_tokens": 0, "total_tokens": self._tokens} if self._taken else None

    def feed(self, chunk: bytes) -> bytes:
        """Raise ValueError: these answers come in one piece."""
        raise ValueError("a stream of a pooling engine")

    def close(self) -> bytes:
        """Raise ValueError: these answers come in one piece."""
        raise ValueError("a stream of a pooling engine")

    def failed(self, error: LmaasError) -> bytes:
        """Return nothing: no stream has begun."""
        return b""

    def take(self, text: bytes) -> None:
        """Read the results of the next part. Raises ValueError if the engine's bytes cannot be read or a result is missing."""
        indices = self.request.divided[self._taken]
        try:
            result = self.read(text)
        except msgspec.DecodeError as error:
            raise ValueError(str(error)) from error
        if sorted(each.index for each in result.data) != list(range(len(indices))):
            raise ValueError("the engine's results are not those of the inputs")
        self.keep(result, indices)
        self._tokens += result.usage.prompt_tokens
        self._taken += 1
        self.complete = self.done = self._taken == len(self.request.divided)

    @abstractmethod
    def read(self, text: bytes) -> Parsed:
        """Parse the body of one of the engine's responses."""

    @abstractmethod
    def keep(self, result: Parsed, indices: list[int]) -> None:
        """Keep the results of a part, whose inputs have these indices in the client's request."""

    def written_usage(self) -> bytes:
        """Return the field of the usage."""
        return b'"usage":{"prompt_tokens":%d,"total_tokens":%d}' % (self._tokens, self._tokens)

    def written_model(self) -> bytes:
        """Return the field of the model."""
        return b'"model":' + ENCODE(self.request.model)


class EmbeddingsAnswer(PooledAnswer[_Embeddings]):
    """OpenAI's list of embeddings, in the order of the inputs."""

    def __init__(self, inference: Inference) -> None:
        super().__init__(inference)
        self._found: list[bytes] = [b""] * len(self.request.inputs)

    def read(self, text: bytes) -> _Embeddings:
        """Parse the body of one of the engine's responses."""
        return _EMBEDDINGS.decode(text)

    def keep(self, result: _Embeddings, indices: list[int]) -> None:
        """Keep the embeddings of a part."""
        for each in result.data:
            place, vector = indices[each.index], bytes(each.embedding)
            if vector in _MISSING:
                raise ValueError("an embedding is empty")
            self._found[place] = b'{"object":"embedding","index":%d,"embedding":%b}' % (place, vector)

    def end(self) -> bytes:
        """Return the whole body."""
        return b'{"object":"list","data":[%b],%b,%b}' % (b",".join(self._found), self.written_model(), self.written_usage())
