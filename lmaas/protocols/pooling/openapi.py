"""The part of the OpenAPI document for embeddings, rankings and scores."""

from typing import Any

from lmaas.protocols.openapi import ANSWER_HEADERS, ERRORS, IDEMPOTENCY_KEY, Schema, request_schema
from lmaas.protocols.pooling.embeddings import TABLE as EMBEDDINGS
from lmaas.protocols.pooling.ranking import PAIRS, RERANK, SCORE
from lmaas.protocols.pooling.requests import MAX_INPUTS

_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_NUMBER: Schema = {"type": "number"}
_IDS: Schema = {"type": "array", "items": _COUNT}


def _inputs(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1, "maxItems": MAX_INPUTS}


#: The types of parameters that have their own reader.
_INPUT = {"input": {"anyOf": [_TEXT | {"minLength": 1}, _IDS, _inputs(_TEXT | {"minLength": 1}), _inputs(_IDS | {"minItems": 1})]}}
_DOCUMENTS = {"query": _TEXT | {"minLength": 1}, "documents": {"anyOf": [_TEXT, _inputs({"type": ["string", "object"]})]}}
_SIDES = {name: {"anyOf": [_TEXT, _inputs(_TEXT)]} for pair in PAIRS for name in pair}


def _closed(required: tuple[str, ...], **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


_USAGE = _closed(("prompt_tokens", "total_tokens"), prompt_tokens=_COUNT, total_tokens=_COUNT)
_VECTOR: Schema = {"anyOf": [{"type": "array", "items": _NUMBER}, _TEXT], "description": "Numbers, or with base64 a string."}
_EMBEDDING = _closed(("object", "index", "embedding"), object={"const": "embedding"}, index=_COUNT, embedding=_VECTOR)
_SCORE = _closed(("index", "object", "score"), index=_COUNT, object={"const": "score"}, score=_NUMBER)
_RANKED = _closed(("index", "relevance_score"), index=_COUNT, relevance_score=_NUMBER, document=_closed(("text",), text=_TEXT))


def _answer(**properties: Schema) -> Schema:
    return _closed((*properties, "model", "usage"), **properties, model=_TEXT, usage=_USAGE)


SCHEMAS: dict[str, Schema] = {
    "EmbeddingsRequest": request_schema(EMBEDDINGS, "OpenAI's parameters and those of vLLM that are safe to forward.", _INPUT),
    "RerankRequest": request_schema(RERANK, "The parameters of Cohere, Jina and vLLM.", _DOCUMENTS),
    "ScoreRequest": request_schema(SCORE, "The parameters of vLLM.", _SIDES),
    "Embeddings": _answer(object={"const": "list"}, data={"type": "array", "items": _EMBEDDING}),
    "Ranking": _answer(id=_TEXT, results={"type": "array", "items": _RANKED}),
    "Scores": _answer(id=_TEXT, object={"const": "list"}, data={"type": "array", "items": _SCORE}),
}


def pooling_paths(headers: Schema, error: Any) -> dict[str, Any]:
    """Return the paths of the protocols.

    `headers` are those of every response; `error` makes the description of a response that is an error from its words.
    """
    errors = {status: error(words) for status, words in ERRORS.items()} | {"default": error("Another error.")}

    def path(operation_id: str, summary: str, request: str, answer: str) -> Schema:
        def content(name: str) -> Schema:
            return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}

        done = {"description": "Done.", "headers": headers | ANSWER_HEADERS, "content": content(answer)}
        operation = {"operationId": operation_id, "summary": summary, "tags": ["embeddings"], "parameters": [IDEMPOTENCY_KEY]}
        return {"post": operation | {"requestBody": {"required": True, "content": content(request)}, "responses": {"200": done} | errors}}

    return {
        EMBEDDINGS.path: path("embeddings", "Create embeddings.", "EmbeddingsRequest", "Embeddings"),
        RERANK.path: path("rerank", "Rank documents by their relevance to a query.", "RerankRequest", "Ranking"),
        SCORE.path: path("score", "Score pairs of texts.", "ScoreRequest", "Scores"),
    }
