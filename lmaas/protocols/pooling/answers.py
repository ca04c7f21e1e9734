"""Answers of pooling engines: the parts of a request are joined into the client's answer."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

import msgspec

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


Asked = TypeVar("Asked", bound=PoolingRequest)
Parsed = TypeVar("Parsed", bound=Results)


class PooledAnswer(Answer, Generic[Asked, Parsed]):
    """The answer to a request of several parts, each of which has one result for each of its inputs. It is never streamed."""

    def __init__(self, inference: Inference[Asked]) -> None:
        self.request, self.request_id = inference.request, inference.request_id
        self._taken = self._tokens = 0

    @property
    def usage(self) -> dict[str, Any] | None:
        """The usage of the parts that have come."""
        return {"prompt_tokens": self._tokens, "completion_tokens": 0, "total_tokens": self._tokens} if self._taken else None

    @property
    def usage_if_left(self) -> dict[str, Any]:
        """The usage of the parts that have come. A part whose answer has not come does not count."""
        return self.usage or {}

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
