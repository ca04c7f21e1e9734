"""The fake engine's answers with `--runner pooling`: embeddings, scores and rankings, as vLLM 0.32 writes them."""

import asyncio
import base64
import functools
import hashlib
import math
import secrets
import time
from array import array
from collections.abc import Callable, Coroutine
from typing import Any

from starlette.requests import Request

from lmaas.testing.answer import compact
from lmaas.testing.generation import Engine, Sequence

DIMENSIONS = 384
#: The tokens that a BERT model puts around every text.
SPECIAL_TOKENS = 2

#: Makes the exception for a request that the engine refuses: from a status, vLLM's type of the error, its message and its parameter.
Refuse = Callable[[int, str, str, str | None], Exception]

#: A method of Pooling: returns the body of the response to a request, or None if the engine was stopped before.
PoolingAnswer = Callable[[Request, dict[str, Any]], Coroutine[Any, Any, bytes | None]]


class Pooling:
    """Computes the answers of one engine. `matryoshka` is true if its model can shorten its vectors."""

    def __init__(self, engine: Engine, refuse: Refuse, *, matryoshka: bool) -> None:
        self._engine, self._refuse, self._matryoshka = engine, refuse, matryoshka

    async def embeddings(self, request: Request, body: dict[str, Any]) -> bytes | None:
        """Return the body of a response of `/v1/embeddings`, or None if the engine was stopped before."""
        given = body.get("input")
        inputs = [given] if isinstance(given, str) or (isinstance(given, list) and given and isinstance(given[0], int)) else given
        if not isinstance(inputs, list) or body.get("encoding_format", "float") not in ("float", "base64"):
            param = "body.input" if not isinstance(inputs, list) else "body.encoding_format"
            raise self._refuse(400, "Bad Request", "1 validation errors:\n  {'type': 'list_type'}", param)
        model = self._model(body)
        dimensions = self._dimensions(model, body.get("dimensions"))
        if not inputs:
            raise self._bad("You must pass at least one prompt")
        own_id, tokens = _own_id(request), [self._tokens(one, body) for one in inputs]
        if not await self._computed(own_id, model, tokens):
            return None
        encoded = _base64 if body.get("encoding_format") == "base64" else _floats
        items = b",".join(
            b'{"index":%d,"object":"embedding","embedding":%b}' % (index, encoded(model, tuple(one), dimensions))
            for index, one in enumerate(tokens)
        )
        head = b'{"id":%b,"object":"list","created":%d,"model":%b,"data":[' % (compact(f"embd-{own_id}"), time.time(), compact(model))
        return head + items + b'],"usage":%b}' % compact(_usage(sum(map(len, tokens))))

    async def scores(self, request: Request, body: dict[str, Any]) -> bytes | None:
        """Return the body of a response of `/score`, or None if the engine was stopped before."""
        first, second = _pairs(body)
        found = await self._scored(request, body, first, second)
        if found is None:
            return None
        own_id, model, scores, total = found
        items = [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)]
        answer = {"id": f"score-{own_id}", "object": "list", "created": int(time.time()), "model": model, "data": items}
        return compact(answer | {"usage": _usage(total)})

    async def ranking(self, request: Request, body: dict[str, Any]) -> bytes | None:
        """Return the body of a response of `/rerank`, or None if the engine was stopped before."""
        documents = _listed(body["documents"])
        found = await self._scored(request, body, [body["query"]], documents)
        if found is None:
            return None
        own_id, model, scores, total = found
        order = sorted(range(len(documents)), key=scores.__getitem__, reverse=True)[: body.get("top_n") or None]
        results = [
            {"index": index, "document": {"text": documents[index], "multi_modal": None}, "relevance_score": scores[index]}
            for index in order
        ]
        usage = {"prompt_tokens": total, "total_tokens": total}
        return compact({"id": f"score-{own_id}", "model": model, "usage": usage, "results": results})

    async def _scored(
        self, request: Request, body: dict[str, Any], first: list[str], second: list[str]
    ) -> tuple[str, str, list[float], int] | None:
        model = self._model(body)
        if not first or not second:
            raise self._bad(f"At least one text{'' if not first else '_pair'} element must be given")
        if len(first) not in (1, len(second)):
            raise self._bad("Input lengths must be either 1:1, 1:N or N:N")
        for name in ("max_tokens_per_query", "max_tokens_per_doc"):
            if body.get(name, 0) >= self._engine.max_model_len:
                raise self._bad(f"{name} ({body[name]}) must be less than max_model_len ({self._engine.max_model_len}).")
        cut = [body.get(name) or None for name in ("max_tokens_per_query", "max_tokens_per_doc")]
        sides = [
            [self._tokens(" ".join(one.split()[:most]) if most else one, body) for one in side]
            for side, most in zip((first, second), cut, strict=True)
        ]
        own_id = _own_id(request)
        if not await self._computed(own_id, model, sides[0] + sides[1]):
            return None
        vectors = [[vector(model, tuple(one), DIMENSIONS) for one in side] for side in sides]
        left = vectors[0] * len(second) if len(first) == 1 else vectors[0]
        scores = [math.fsum(a * b for a, b in zip(*pair, strict=True)) for pair in zip(left, vectors[1], strict=True)]
        return own_id, model, scores, sum(map(len, sides[0] + sides[1]))

    async def _computed(self, own_id: str, model: str, inputs: list[list[Any]]) -> bool:
        """Wait until all inputs are computed. Returns False if the engine is stopped before. The inputs end if the client goes."""
        wake = asyncio.Event()
        sequences = [Sequence(index, model, len(one), [], (), b"stop", b"null", wake, request=own_id) for index, one in enumerate(inputs)]
        self._engine.add(sequences)
        try:
            while any(sequence.finish is None for sequence in sequences):
                wake.clear()
                await wake.wait()
        finally:
            for sequence in sequences:
                self._engine.finish(sequence, b"abort")
        return all(sequence.finish == b"stop" for sequence in sequences)

    def _model(self, body: dict[str, Any]) -> str:
        model = body.get("model")
        if model != self._engine.name and model not in self._engine.adapters:
            raise self._refuse(404, "NotFoundError", f"The model `{model}` does not exist.", None)
        return str(model)

    def _dimensions(self, model: str, asked: int | None) -> int:
        if asked is None:
            return DIMENSIONS
        if not self._matryoshka:
            rule = "does not support Matryoshka embeddings; dimensions must be unset"
            raise self._bad(f"Model {self._engine.name!r} {rule} (received dimensions={asked}).")
        if not 1 <= asked <= DIMENSIONS:
            raise self._bad(f"Model {self._engine.name!r} only supports dimensions in range [1, {DIMENSIONS}], got {asked}.")
        return asked

    def _tokens(self, one: Any, body: dict[str, Any]) -> list[Any]:
        """Return the tokens of an input: its words between two special tokens, or the token ids that it consists of."""
        special = isinstance(one, str) and body.get("add_special_tokens", True)
        words = one.split() if isinstance(one, str) else one
        length, kept = self._engine.max_model_len, body.get("truncate_prompt_tokens")
        if kept is not None and kept > length:
            rule = "truncate_prompt_tokens value is greater than max_model_len. Please request a smaller truncation size."
            raise self._bad(rule)
        if kept is not None:
            most = max(0, (kept if kept > 0 else length) - (SPECIAL_TOKENS if special else 0))
            words = words[len(words) - min(most, len(words)) :] if body.get("truncation_side") == "left" else words[:most]
        tokens = ["[CLS]", *words, "[SEP]"] if special else list(words)
        if len(tokens) > length:
            about = f"at least {length + 1}" if isinstance(one, str) else str(len(tokens))
            message = (
                f"This model's maximum context length is {length} tokens. However, your prompt contains {about} input tokens, which "
                "exceeds this limit even without any output tokens. Please reduce the length of the input prompt. "
            )
            value = about.rpartition(" ")[2]
            raise self._refuse(400, "BadRequestError", f"{message}(parameter=input_tokens, value={value})", "input_tokens")
        if not tokens:
            raise self._bad("The decoder prompt cannot be empty")
        return tokens

    def _bad(self, message: str) -> Exception:
        return self._refuse(400, "BadRequestError", message, None)


def _own_id(request: Request) -> str:
    return request.headers.get("x-request-id") or secrets.token_hex(16)


def _usage(tokens: int) -> dict[str, Any]:
    counts = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
    return counts | {"prompt_tokens_details": None, "completion_tokens_details": None}


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else value


def _pairs(body: dict[str, Any]) -> tuple[list[str], list[str]]:
    for first, second in (("queries", "documents"), ("queries", "items"), ("data_1", "data_2")):
        if first in body and second in body:
            return _listed(body[first]), _listed(body[second])
    return _listed(body["text_1"]), _listed(body["text_2"])


@functools.lru_cache(10_000)
def vector(model: str, tokens: tuple[Any, ...], dimensions: int) -> "array[float]":
    """Return a vector of length 1 that depends only on the model's name and the tokens."""
    seed = hashlib.shake_128(f"{model}\0{tokens}".encode(errors="replace"))
    numbers = array("h", seed.digest(2 * dimensions))
    length = math.sqrt(sum(number * number for number in numbers))
    return array("f", [number / length for number in numbers])


@functools.lru_cache(10_000)
def _floats(model: str, tokens: tuple[Any, ...], dimensions: int) -> bytes:
    # Nine digits are enough for every 32-bit float.
    return b"[%b]" % ",".join(f"{number:.9g}" for number in vector(model, tokens, dimensions)).encode()


@functools.lru_cache(10_000)
def _base64(model: str, tokens: tuple[Any, ...], dimensions: int) -> bytes:
    return b'"%b"' % base64.b64encode(vector(model, tokens, dimensions).tobytes())
