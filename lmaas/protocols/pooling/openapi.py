"""The part of the OpenAPI document for embeddings, rankings and scores."""

from typing import Any

from lmaas.protocols.openapi import ANSWER_HEADERS, ERRORS, IDEMPOTENCY_KEY, WORDS, request_schema
from lmaas.protocols.openapi_parts import COUNT, IDS, NUMBER, TEXT, Schema, closed, content
from lmaas.protocols.pooling.embeddings import TABLE as EMBEDDINGS
from lmaas.protocols.pooling.ranking import PAIRS, RERANK, SCORE
from lmaas.protocols.pooling.requests import MAX_INPUTS


def _inputs(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1, "maxItems": MAX_INPUTS}


#: The types of parameters that have their own reader.
_INPUT = {"input": {"anyOf": [TEXT | {"minLength": 1}, IDS, _inputs(TEXT | {"minLength": 1}), _inputs(IDS | {"minItems": 1})]}}
_DOCUMENTS = {"query": TEXT | {"minLength": 1}, "documents": {"anyOf": [TEXT, _inputs({"type": ["string", "object"]})]}}
_SIDES = {name: {"anyOf": [TEXT, _inputs(TEXT)]} for pair in PAIRS for name in pair}


_USAGE = closed(prompt_tokens=COUNT, total_tokens=COUNT)
_VECTOR: Schema = {"anyOf": [{"type": "array", "items": NUMBER}, TEXT], "description": "Numbers, or with base64 a string."}
_EMBEDDING = closed(object={"const": "embedding"}, index=COUNT, embedding=_VECTOR)
_SCORE = closed(index=COUNT, object={"const": "score"}, score=NUMBER)
_RANKED = closed(("document",), index=COUNT, relevance_score=NUMBER, document=closed(text=TEXT))


def _answer(**properties: Schema) -> Schema:
    return closed(**properties, model=TEXT, usage=_USAGE)


SCHEMAS: dict[str, Schema] = {
    "EmbeddingsRequest": request_schema(EMBEDDINGS, WORDS, _INPUT),
    "RerankRequest": request_schema(RERANK, "The parameters of Cohere, Jina and vLLM.", _DOCUMENTS),
    "ScoreRequest": request_schema(SCORE, "The parameters of vLLM.", _SIDES),
    "Embeddings": _answer(object={"const": "list"}, data={"type": "array", "items": _EMBEDDING}),
    "Ranking": _answer(id=TEXT, results={"type": "array", "items": _RANKED}),
    "Scores": _answer(id=TEXT, object={"const": "list"}, data={"type": "array", "items": _SCORE}),
}


def pooling_paths(headers: Schema, error: Any) -> dict[str, Any]:
    """Return the paths of the protocols.

    `headers` are those of every response; `error` makes the description of a response that is an error from its words.
    """
    errors = {status: error(words) for status, words in ERRORS.items()} | {"default": error("Another error.")}

    def path(operation_id: str, summary: str, request: str, answer: str) -> Schema:
        done = {"description": "Done.", "headers": headers | ANSWER_HEADERS, "content": content(answer)}
        operation = {"operationId": operation_id, "summary": summary, "tags": ["embeddings"], "parameters": [IDEMPOTENCY_KEY]}
        return {"post": operation | {"requestBody": {"required": True, "content": content(request)}, "responses": {"200": done} | errors}}

    return {
        EMBEDDINGS.path: path("embeddings", "Create embeddings.", "EmbeddingsRequest", "Embeddings"),
        RERANK.path: path("rerank", "Rank documents by their relevance to a query.", "RerankRequest", "Ranking"),
        SCORE.path: path("score", "Score pairs of texts.", "ScoreRequest", "Scores"),
    }
