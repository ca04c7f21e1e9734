"""Scores of pairs of texts (`/v1/score`, as vLLM has it) and rankings of documents (`/v1/rerank`, as Cohere, Jina and vLLM have it).

Both are computed by the engine's `/score`: its `/rerank` would send every document back, and could not rank the documents of several parts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from lmaas.errors import InvalidRequest
from lmaas.inference.protocol import Inference, Protocol
from lmaas.protocols.parameters.checks import boolean, integer, wrong_type
from lmaas.protocols.parameters.reading import read_model, read_parameters
from lmaas.protocols.parameters.table import MAX_TOKENS, Parameter, Table, forwarded, refused
from lmaas.protocols.pooling.answers import ENCODE, PooledAnswer, Usage
from lmaas.protocols.pooling.inputs import COMMON, check_count
from lmaas.protocols.pooling.requests import MAX_INPUTS, PoolingRequest, estimated, settle_truncation, shortened
from lmaas.states import PoolKind
from lmaas.store.models import BaseModel

_DOCUMENTS = "a list of strings, or of objects with a string 'text'"
_TEXTS = "a string, or a list of strings"


def read_query(name: str, value: Any) -> Any:
    """Read a query, which must have text."""
    if not isinstance(value, str):
        raise wrong_type(name, "a string")
    if not value:
        raise InvalidRequest(f"'{name}' must not be empty.", code="empty_input", param=name)
    return value


def read_documents(name: str, value: Any) -> Any:
    """Return the documents as a list of strings."""
    documents = [value] if isinstance(value, str) else value
    if not isinstance(documents, list):
        raise wrong_type(name, _DOCUMENTS)
    check_count(name, len(documents))
    texts = [each.get("text") if isinstance(each, dict) else each for each in documents]
    if not all(isinstance(each, str) for each in texts):
        raise wrong_type(name, _DOCUMENTS)
    return texts


def read_texts(name: str, value: Any) -> Any:
    """Return one side of the pairs as a list of strings."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(each, str) for each in texts):
        raise wrong_type(name, _TEXTS)
    check_count(name, len(texts))
    return texts


#: The names that vLLM has for the two sides of the pairs.
PAIRS = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))
_SIDE = f"a string, or a list of at most {MAX_INPUTS:,} strings"
_LIMITS = (
    forwarded("max_tokens_per_query", "1 up to the context, exclusive: longer queries are cut at their end", integer(0, MAX_TOKENS)),
    forwarded("max_tokens_per_doc", "1 up to the context, exclusive: longer documents are cut at their end", integer(0, MAX_TOKENS)),
)
_SCORING: tuple[Parameter, ...] = (
    *_LIMITS,
    forwarded("use_activation", "true (the default) or false; no effect on models that embed", boolean),
    *COMMON,
    refused("instruction", "put it into the query"),
)

RERANK = Table(
    "rerank",
    "/v1/rerank",
    ("query", "documents"),
    (
        forwarded("query", "a string", read_query),
        forwarded("documents", f"1 to {MAX_INPUTS:,} strings, or objects with `text`", read_documents),
        forwarded("top_n", "the number of documents in the answer; 0 (the default) means all", integer(0, MAX_TOKENS)),
        forwarded("return_documents", "true (the default) or false", boolean),
        *_SCORING,
        refused("rank_fields", "documents are ranked by their text"),
        refused("max_chunks_per_doc", "documents are not divided; max_tokens_per_doc cuts them"),
    ),
)
SCORE = Table(
    "score",
    "/v1/score",
    (),
    (
        *(
            forwarded(name, f"{_SIDE}{rule}", read_texts)
            for name, rule in (
                ("text_1", ": one for all of text_2, or one for each"),
                ("text_2", ""),
                ("queries", ": another name of text_1"),
                ("documents", ": another name of text_2, together with queries"),
                ("items", ": another name of text_2, together with queries"),
                ("data_1", ": another name of text_1"),
                ("data_2", ": another name of text_2, together with data_1"),
            )
        ),
        *_SCORING,
    ),
)


@dataclass(slots=True, kw_only=True)
class ScoreRequest(PoolingRequest):
    """A checked request for scores. Its inputs are the second sides of the pairs; `first` has one text for all of them, or one for each."""

    first: Sequence[str]
    first_name: str

    @property
    def sequences_per_input(self) -> int:
        """The sequences that an engine computes for each pair."""
        return 1 if len(self.first) == 1 else 2

    @property
    def shared_sequences(self) -> int:
        """The sequences that an engine computes once for each part: the one first side."""
        return 1 if len(self.first) == 1 else 0

    def check(self, model: BaseModel) -> None:
        """Divide the request into parts for this model. Raises InvalidRequest for limits that its context does not have."""
        for name in ("max_tokens_per_query", "max_tokens_per_doc"):
            if self.parameters.get(name, 0) >= model.max_model_len:
                raise InvalidRequest(
                    f"'{name}' is {self.parameters[name]}, but must be less than the context of '{self.model}', which has "
                    f"{model.max_model_len} tokens. Use a smaller value.",
                    code="out_of_range",
                    param=name,
                )
        if limit := self.parameters.get("max_tokens_per_query"):
            self.first = [shortened(each, limit) for each in self.first]
        if limit := self.parameters.get("max_tokens_per_doc"):
            self.inputs = [shortened(each, limit) for each in self.inputs]
        PoolingRequest.check(self, model)

    def cut(self, tokens: int, *, from_end: bool) -> None:
        """Take off what an engine would read in vain of texts of which it keeps so many tokens."""
        PoolingRequest.cut(self, tokens, from_end=from_end)
        self.first = [shortened(each, tokens, from_end=from_end) for each in self.first]

    def estimate(self, max_model_len: int) -> tuple[int, int]:
        """Return an estimate of the prompt tokens, and 0 completion tokens. One first side is computed in each part."""
        tokens, _ = PoolingRequest.estimate(self, max_model_len)
        shared = estimated(self.first[0], self.kept(max_model_len)) * max(1, self.parts) if len(self.first) == 1 else 0
        return tokens + shared, 0

    def sizes(self, most: int) -> list[int]:
        """Return estimates of the tokens for each pair, without a first side that all pairs share."""
        second = [estimated(each, most) for each in self.inputs]
        if len(self.first) == 1:
            return second
        return [size + estimated(each, most) for size, each in zip(second, self.first, strict=True)]

    def of_part(self, indices: Sequence[int]) -> Mapping[str, Any]:
        """Return the pairs of a part."""
        first = self.first if len(self.first) == 1 else [self.first[index] for index in indices]
        return {"text_1": first, "text_2": [self.inputs[index] for index in indices]}


@dataclass(slots=True, kw_only=True)
class RankingRequest(ScoreRequest):
    """A checked request for a ranking. `top_n` is the number of documents in the answer, None for all."""

    top_n: int | None
    #: The documents as the answer shows them, None if it does not.
    shown: Sequence[str] | None


def read_score(body: dict[str, Any]) -> ScoreRequest:
    """Read a `/v1/score` request. Raises InvalidRequest with the parameter to blame."""
    model, given = read_model(body), read_parameters(SCORE, body)
    names = {name for pair in PAIRS for name in pair if name in given}
    first_name, second_name = next((pair for pair in PAIRS if names == set(pair)), (None, None))
    if first_name is None or second_name is None:
        raise InvalidRequest(
            "The request needs both sides of the pairs: 'text_1' and 'text_2', or 'queries' and 'documents', and nothing else.",
            code="missing_parameter",
            param=min(names, default="text_1"),
        )
    first, second = given.pop(first_name), given.pop(second_name)
    if len(first) not in (1, len(second)):
        raise InvalidRequest(
            f"'{first_name}' has {len(first)} texts and '{second_name}' has {len(second)}. Send one, or as many as '{second_name}' has.",
            code="out_of_range",
            param=first_name,
        )
    return ScoreRequest(**_common(model, given, first_name, first, second_name, second))


def read_rerank(body: dict[str, Any]) -> RankingRequest:
    """Read a `/v1/rerank` request. Raises InvalidRequest with the parameter to blame."""
    model, given = read_model(body), read_parameters(RERANK, body)
    query, documents = given.pop("query"), given.pop("documents")
    top_n, shown = given.pop("top_n", 0) or None, documents if given.pop("return_documents", True) else None
    return RankingRequest(top_n=top_n, shown=shown, **_common(model, given, "query", [query], "documents", documents))


def _common(
    model: str, given: dict[str, Any], first_name: str, first: Sequence[str], second_name: str, second: Sequence[str]
) -> dict[str, Any]:
    """Return the fields that both kinds of requests share."""
    settle_truncation(given)
    service_tier = given.pop("service_tier", "default")
    return {
        "model": model,
        "stream": False,
        "weight": 1,
        "prompts": len(second),
        "service_tier": service_tier,
        "parameters": given,
        "names": {name: name for name in given} | {"text_1": first_name, "text_2": second_name},
        "inputs": second,
        "inputs_name": second_name,
        "first": first,
        "first_name": first_name,
    }


class _Score(msgspec.Struct):
    index: int
    score: float


class _Scores(msgspec.Struct):
    data: list[_Score]
    usage: Usage


_SCORES = msgspec.json.Decoder(_Scores)


ScoreAsked = TypeVar("ScoreAsked", bound=ScoreRequest)


class _ScoresAnswer(PooledAnswer[ScoreAsked, _Scores]):
    def __init__(self, inference: Inference[ScoreAsked]) -> None:
        super().__init__(inference)
        self.scores: list[float] = [0.0] * len(self.request.inputs)

    def read(self, text: bytes) -> _Scores:
        """Parse the body of one of the engine's responses."""
        return _SCORES.decode(text)

    def keep(self, result: _Scores, indices: list[int]) -> None:
        """Keep the scores of a part."""
        for each in result.data:
            self.scores[indices[each.index]] = each.score


class ScoresAnswer(_ScoresAnswer[ScoreRequest]):
    """vLLM's list of scores, in the order of the pairs."""

    def end(self) -> bytes:
        """Return the whole body."""
        items = [b'{"index":%d,"object":"score","score":%b}' % (index, ENCODE(score)) for index, score in enumerate(self.scores)]
        head = b'{"id":%b,"object":"list",' % ENCODE(f"score-{self.request_id}")
        return head + self.written_model() + b',"data":[%b],%b}' % (b",".join(items), self.written_usage())


class RankingAnswer(_ScoresAnswer[RankingRequest]):
    """The documents by their scores, the best first."""

    def end(self) -> bytes:
        """Return the whole body."""
        request = self.request
        order = sorted(range(len(self.scores)), key=self.scores.__getitem__, reverse=True)
        items = []
        for index in order[: request.top_n]:
            shown = b',"document":{"text":%b}' % ENCODE(request.shown[index]) if request.shown is not None else b""
            items.append(b'{"index":%d,"relevance_score":%b%b}' % (index, ENCODE(self.scores[index]), shown))
        head = b'{"id":%b,' % ENCODE(f"rerank-{self.request_id}")
        return head + self.written_model() + b',"results":[%b],%b}' % (b",".join(items), self.written_usage())


class _Scoring(Protocol[ScoreAsked]):
    engine_path = "/score"
    kind = PoolKind.EMBED

    def engine_ids(self, request_id: str, request: ScoreAsked) -> list[str]:
        """Return no ids: a pooling engine cannot abort by id."""
        return []


class Score(_Scoring[ScoreRequest]):
    """vLLM's scores."""

    path = SCORE.path
    texts = tuple(sorted({name for pair in PAIRS for name in pair}))

    def read(self, body: dict[str, Any]) -> ScoreRequest:
        """Check a client's body and return the request for the engine."""
        return read_score(body)

    def answer(self, inference: Inference[ScoreRequest]) -> ScoresAnswer:
        """Return a new answer for an attempt."""
        return ScoresAnswer(inference)


class Rerank(_Scoring[RankingRequest]):
    """Cohere's, Jina's and vLLM's rankings."""

    path = RERANK.path
    texts = ("query", "documents")

    def read(self, body: dict[str, Any]) -> RankingRequest:
        """Check a client's body and return the request for the engine."""
        return read_rerank(body)

    def answer(self, inference: Inference[RankingRequest]) -> RankingAnswer:
        """Return a new answer for an attempt."""
        return RankingAnswer(inference)
