"""The order in which the lines of a batch run: by model, then by the beginning of their prompts, which engines keep in their caches."""

import hashlib
from typing import NamedTuple

import msgspec
from msgspec import Raw, Struct

from lmaas.admission.estimate import CHARACTERS_PER_TOKEN, USUAL_COMPLETION
from lmaas.protocols.parameters.table import MAX_CHOICES

#: The lengths of a prompt's beginning, in bytes, that a key compares. Requests that share a longer beginning are closer in the order.
_BEGINNINGS = (256, 1024, 4096, 16_384)
_DIGEST_BYTES = 6
#: The digits of a number that may be a limit of tokens.
_MAX_DIGITS = 9


class Outline(Struct):
    """The fields of a request that are read before it runs: its model, its prompt, and the bounds of its answer. Missing fields are
    empty."""

    model: Raw = Raw(b"")
    stream: Raw = Raw(b"")
    n: Raw = Raw(b"")
    max_tokens: Raw = Raw(b"")
    max_completion_tokens: Raw = Raw(b"")
    max_output_tokens: Raw = Raw(b"")
    # In the order in which most chat templates write them.
    tools: Raw = Raw(b"")
    system: Raw = Raw(b"")
    instructions: Raw = Raw(b"")
    messages: Raw = Raw(b"")
    prompt: Raw = Raw(b"")
    input: Raw = Raw(b"")

    @property
    def model_name(self) -> str:
        """The name of the model, empty if there is none."""
        name = bytes(self.model)
        return msgspec.json.decode(name, type=str) if name.startswith(b'"') else ""

    @property
    def texts(self) -> tuple[bytes, ...]:
        """The parts of the prompt."""
        parts = (self.tools, self.system, self.instructions, self.messages, self.prompt, self.input)
        return tuple(bytes(part) for part in parts)


_OUTLINE = msgspec.json.Decoder(Outline)


def outline(body: bytes | Raw) -> Outline:
    """Return the outline of a request, an empty one for what is no object. Raises ValueError or RecursionError for what is not JSON."""
    return _OUTLINE.decode(body) if bytes(body)[:1] == b"{" else Outline()


class Estimate(NamedTuple):
    """An estimate of a request's tokens, before its model is known: those of its prompt, of which there may be several, the most that one
    answer has, and the number of answers."""

    prompt: int
    several: bool
    answer: int
    choices: int

    def within(self, max_model_len: int) -> int:
        """Return the tokens of the request for a model with this context, which bounds its cost whatever its limits."""
        prompt = self.prompt if self.several else min(self.prompt, max_model_len)
        return prompt + min(self.answer, max_model_len) * self.choices


def tokens(request: Outline, *, generates: bool) -> Estimate:
    """Return an estimate of the tokens of a request, with those of its answer if engines generate one. It is quick and rough."""
    prompt = sum(map(len, request.texts)) // CHARACTERS_PER_TOKEN + 1
    # In chats, `input` is one list of items.
    several = bytes(request.prompt if generates else request.input).startswith(b"[")
    if not generates:
        return Estimate(prompt, several, 0, 0)
    limits = (request.max_completion_tokens, request.max_tokens, request.max_output_tokens)
    limit = next((count for each in limits if (count := _count(each)) is not None), USUAL_COMPLETION)
    choices = _count(request.n) or 1
    return Estimate(prompt, several, limit, choices if choices <= MAX_CHOICES else 1)


def prefix_key(request: Outline) -> bytes:
    """Return a key of bounded length. Keys of requests with the same first 256 bytes of their prompts are next to each other in the order;
    among these, those with the same first 1,024 bytes, and so on."""
    beginning = b"\n".join(part[: _BEGINNINGS[-1]] for part in request.texts if part)[: _BEGINNINGS[-1]]
    hashes = []
    for length in _BEGINNINGS:
        hashes.append(hashlib.blake2b(beginning[:length], digest_size=_DIGEST_BYTES).digest())
        if length >= len(beginning):
            break
    return b"".join(hashes)


def _count(value: Raw) -> int | None:
    digits = bytes(value)
    return int(digits) if digits.isdigit() and len(digits) <= _MAX_DIGITS else None
