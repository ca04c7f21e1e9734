"""Requests to a pooling engine: many inputs, which are sent to the engine in parts of a bounded size."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from lmaas.admission.estimate import text_tokens
from lmaas.errors import InvalidRequest
from lmaas.inference.request import EngineRequest, context_exceeded
from lmaas.protocols.parameters.checks import out_of_range
from lmaas.store.models import BaseModel

#: The most inputs of one request, which is OpenAI's limit.
MAX_INPUTS = 2048
#: The most inputs of one part, and the most tokens by the estimate (a single input may have more). Smaller parts cost throughput, because
#: an engine is idle between them, and larger ones let other tenants wait longer behind one.
PART_INPUTS = 64
PART_TOKENS = 8_192
#: Of a text that is to be cut, an engine receives at most this many characters for each token that is kept, so that no tokenizer reads a
#: whole book for one page.
CHARACTERS_KEPT_PER_TOKEN = 64

#: A text, or its token ids.
Input = str | list[int]
Kept = TypeVar("Kept", str, list[int], Input)


@dataclass(slots=True, kw_only=True)
class PoolingRequest(EngineRequest):
    """A checked request whose answer has one result for each of `inputs`.

    A part is one request to the engine. The parts follow each other under one lease, so of a request with 2,048 inputs the engine has few
    at a time, and computes those of other tenants in between. The longest inputs come first: one that is too long for the model is then
    found before the others are computed.
    """

    inputs: Sequence[Input]
    #: The client's field that holds the inputs.
    inputs_name: str
    #: The inputs of each part, by their indices. Set by `check`.
    divided: list[list[int]] = field(default_factory=list)

    @property
    def parts(self) -> int:
        """The number of requests to the engine that make up this one."""
        return len(self.divided)

    @property
    def sequences_per_input(self) -> int:
        """The sequences that an engine computes for each input."""
        return 1

    @property
    def shared_sequences(self) -> int:
        """The sequences that an engine computes once for each part."""
        return 0

    def check(self, model: BaseModel) -> None:
        """Divide the request into parts for this model. Raises InvalidRequest for what cannot fit into the model's context."""
        longest = model.max_model_len
        kept: int | None = self.parameters.get("truncate_prompt_tokens")
        if kept is not None:
            if kept > longest:
                raise InvalidRequest(
                    f"'truncate_prompt_tokens' is {kept}, but the context of '{self.model}' has {longest} tokens. Use a smaller value.",
                    code="out_of_range",
                    param="truncate_prompt_tokens",
                )
            self.cut(kept if kept > 0 else longest, from_end=self.parameters.get("truncation_side") == "left")
        else:
            for one in self.inputs:
                if isinstance(one, list) and len(one) > longest:
                    raise context_exceeded(self.inputs_name, longest, f"has {len(one)} tokens")
        # A part is never more than the engine runs at once.
        most = (model.max_num_seqs - self.shared_sequences) // self.sequences_per_input
        self.divided = divide(self.sizes(longest), max(1, min(PART_INPUTS, most)), PART_TOKENS)
        # A request keeps its slots until its last part, so it takes at most a quarter of a replica: three large requests leave room for
        # others, whose inputs the engine computes between the parts.
        sequences = max(map(len, self.divided)) * self.sequences_per_input + self.shared_sequences
        self.weight = min(sequences, max(1, model.max_num_seqs // 4))

    def cut(self, tokens: int, *, from_end: bool) -> None:
        """Take off what an engine would read in vain of texts of which it keeps so many tokens."""
        self.inputs = [shortened(one, tokens, from_end=from_end) for one in self.inputs]

    def estimate(self, max_model_len: int) -> tuple[int, int]:
        """Return an estimate of the prompt tokens, and 0 completion tokens."""
        return sum(self.sizes(self.kept(max_model_len))), 0

    def kept(self, max_model_len: int) -> int:
        """Return how many tokens of a text are computed at most."""
        kept: int = self.parameters.get("truncate_prompt_tokens", -1)
        return kept if kept > 0 else max_model_len

    def sizes(self, most: int) -> list[int]:
        """Return estimates of the tokens for each input, of whose texts at most `most` are computed."""
        return [estimated(one, most) for one in self.inputs]

    def body(self, engine_name: str, cache_salt: str, part: int = 0, priority: int = 0) -> bytes:
        """Return the engine's request body of one part."""
        fields = {**self.parameters, **self.of_part(self.divided[part]), "model": engine_name, "cache_salt": cache_salt}
        if priority:
            fields["priority"] = priority
        return msgspec.json.encode(fields)

    @property
    def prompt_field(self) -> str:
        """The client's field that holds the inputs."""
        return self.inputs_name

    @abstractmethod
    def of_part(self, indices: Sequence[int]) -> Mapping[str, Any]:
        """Return the engine's parameters that hold the inputs with these indices."""


def shortened(one: Kept, tokens: int, *, from_end: bool = False) -> Kept:
    """Return the part of an input that an engine reads of which it keeps so many tokens."""
    length = tokens * CHARACTERS_KEPT_PER_TOKEN if isinstance(one, str) else tokens
    return one[-length:] if from_end else one[:length]


def estimated(one: Input, most: int) -> int:
    """Return an estimate of the tokens of an input, of which an engine computes at most `most`."""
    return min(most, text_tokens(one) if isinstance(one, str) else len(one))


def divide(sizes: Sequence[int], most_inputs: int, most_tokens: int) -> list[list[int]]:
    """Divide inputs of these sizes in tokens into parts of at most `most_inputs` inputs and `most_tokens` tokens, the largest first.

    An input that is larger than a part may be is a part of its own. Returns the inputs' indices. One part has them in their order.
    """
    parts: list[list[int]] = []
    room, part = 0, list[int]()
    for index in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        if not part or len(part) == most_inputs or sizes[index] > room:
            part, room = [], most_tokens
            parts.append(part)
        part.append(index)
        room -= sizes[index]
    if len(parts) == 1:
        part.sort()
    return parts


def settle_truncation(given: dict[str, Any]) -> None:
    """Change the parameters about truncation, in place, so that they keep a model's own special tokens.

    With `truncation_side`, vLLM cuts the tokens of the whole text, and with them the special token at the end. Without it, the tokenizer
    cuts the end of the text, which is the meaning of `right` and what the model was trained with.
    """
    if given.get("truncate_prompt_tokens") == 0:
        raise out_of_range("truncate_prompt_tokens", "-1, or at least 1")
    if "truncate_prompt_tokens" not in given or given.get("truncation_side") == "right":
        given.pop("truncation_side", None)
