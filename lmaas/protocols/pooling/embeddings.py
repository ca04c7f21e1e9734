"""OpenAI's embeddings: `/v1/embeddings`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from lmaas.inference.protocol import Inference, Protocol
from lmaas.protocols.parameters.checks import boolean, integer, one_of
from lmaas.protocols.parameters.reading import read_model, read_parameters
from lmaas.protocols.parameters.table import Table, forwarded, refused
from lmaas.protocols.pooling.answers import PooledAnswer, Usage
from lmaas.protocols.pooling.inputs import COMMON, MEDIA, read_input
from lmaas.protocols.pooling.requests import MAX_INPUTS, Input, PoolingRequest, settle_truncation
from lmaas.states import PoolKind

#: More than any model has.
MAX_DIMENSIONS = 65_536

TABLE = Table(
    "embeddings",
    "/v1/embeddings",
    ("input",),
    (
        forwarded("input", f"text or token ids, at most {MAX_INPUTS:,} inputs, none empty", read_input),
        forwarded("encoding_format", "float (the default) or base64 (32-bit floats, little-endian)", one_of("float", "base64")),
        forwarded("dimensions", "1 up to the model's own; only models trained for it (Matryoshka) take it", integer(1, MAX_DIMENSIONS)),
        forwarded("add_special_tokens", "true (the default) or false", boolean),
        forwarded("use_activation", "true (the default: vectors have length 1, for models that normalise) or false", boolean),
        *COMMON,
        refused("embed_dtype", "numbers have 32 bits", "float32"),
        refused("endianness", "the least significant byte comes first", "native", "little"),
        refused("input_type", "put the model's prefix into the input"),
        refused("messages", "put the text into input"),
        refused("add_generation_prompt", "inputs are plain text", False),
        refused("continue_final_message", "inputs are plain text", False),
        refused("chat_template", "inputs are plain text"),
        refused("media_io_kwargs", MEDIA, {}),
    ),
)

#: The client's field for each parameter of the engine.
_NAMES = {
    name: name for name in ("input", "encoding_format", "dimensions", "add_special_tokens", "use_activation", "truncate_prompt_tokens")
}


@dataclass(slots=True, kw_only=True)
class EmbeddingsRequest(PoolingRequest):
    """A checked request for embeddings."""

    def of_part(self, indices: Sequence[int]) -> Mapping[str, Any]:
        """Return the inputs of a part."""
        return {"input": [self.inputs[index] for index in indices]}


def read_embeddings(body: dict[str, Any]) -> EmbeddingsRequest:
    """Read a `/v1/embeddings` request. Raises InvalidRequest with the parameter to blame."""
    model, given = read_model(body), read_parameters(TABLE, body)
    settle_truncation(given)
    inputs: list[Input] = given.pop("input")
    return EmbeddingsRequest(
        model=model,
        stream=False,
        weight=1,
        prompts=len(inputs),
        service_tier=given.pop("service_tier", "default"),
        parameters=given,
        names=_NAMES,
        inputs=inputs,
        inputs_name="input",
    )


class _Embedding(msgspec.Struct):
    index: int
    #: An array of numbers or a base64 string. It is passed on as it came, because parsing it would cost more than the rest of a request.
    embedding: msgspec.Raw


class _Embeddings(msgspec.Struct):
    data: list[_Embedding]
    usage: Usage


_EMBEDDINGS = msgspec.json.Decoder(_Embeddings)
#: The texts that an engine writes for an input that it did not compute, because it is being stopped.
_MISSING = (b"[]", b'""')


class EmbeddingsAnswer(PooledAnswer[EmbeddingsRequest, _Embeddings]):
    """OpenAI's list of embeddings, in the order of the inputs."""

    def __init__(self, inference: Inference[EmbeddingsRequest]) -> None:
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


class Embeddings(Protocol[EmbeddingsRequest]):
    """OpenAI's embeddings."""

    path = TABLE.path
    engine_path = "/v1/embeddings"
    kind = PoolKind.EMBED
    texts = ("input",)

    def read(self, body: dict[str, Any]) -> EmbeddingsRequest:
        """Check a client's body and return the request for the engine."""
        return read_embeddings(body)

    def engine_ids(self, request_id: str, request: EmbeddingsRequest) -> list[str]:
        """Return no ids: a pooling engine cannot abort by id. The part that runs is finished and counted, and no other part is sent."""
        return []

    def answer(self, inference: Inference[EmbeddingsRequest]) -> EmbeddingsAnswer:
        """Return a new answer for an attempt."""
        return EmbeddingsAnswer(inference)
