"""The part of the OpenAPI document for the creation of responses."""

from typing import Any

from lmaas.protocols.openapi import ANSWER_HEADERS, ERRORS, IDEMPOTENCY_KEY, Schema, request_schema
from lmaas.protocols.openapi import OWN as OWN_OF_CHAT
from lmaas.protocols.responses.items import MAX_ITEMS, PREFIXES
from lmaas.protocols.responses.parameters import INCLUDABLE, MAX_KEY, MAX_PAIRS, MAX_VALUE, SUMMARIES, TABLE, VERBOSITIES

_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_NUMBER: Schema = {"type": "number"}
_FLAG: Schema = {"type": "boolean"}
_OBJECT: Schema = {"type": "object"}
_MAYBE_TEXT: Schema = {"type": ["string", "null"]}
_MAYBE_COUNT: Schema = {"type": ["integer", "null"], "minimum": 0}
_ITEMS: Schema = {"type": "array", "items": {"$ref": "#/components/schemas/ResponseItem"}}
_METADATA: Schema = {
    "type": "object",
    "maxProperties": MAX_PAIRS,
    "propertyNames": {"maxLength": MAX_KEY},
    "additionalProperties": {"type": "string", "maxLength": MAX_VALUE},
}
#: The types of parameters that have their own reader.
OWN: dict[str, Schema] = {
    "input": {"type": ["string", "array"], "items": _OBJECT, "maxItems": MAX_ITEMS},
    "conversation": {"type": ["string", "object"]},
    "include": {"type": "array", "items": {"enum": list(INCLUDABLE)}},
    "reasoning": {"type": "object", "properties": {"effort": _MAYBE_TEXT, "summary": {"enum": [*SUMMARIES, None]}}},
    "text": {"type": "object", "properties": {"format": _OBJECT, "verbosity": {"enum": [*VERBOSITIES, None]}}},
    "metadata": _METADATA,
    **dict.fromkeys(
        (
            *("instructions", "previous_response_id", "user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
            "service_tier",
        ),
        _TEXT,
    ),
}
WORDS = "OpenAI's parameters and those of vLLM that are safe to forward."


def _closed(optional: tuple[str, ...] = (), **properties: Schema) -> Schema:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


_CACHE = _closed(cached_tokens=_COUNT, cache_write_tokens=_COUNT)
SCHEMAS: dict[str, Schema] = {
    "ResponsesRequest": request_schema(TABLE, WORDS, OWN_OF_CHAT | OWN),
    "ResponseItem": {
        "type": "object",
        "description": "An item of an input or an output. The other fields depend on its type.",
        "properties": {"type": {"enum": list(PREFIXES)}, "id": _TEXT, "status": {"enum": ["in_progress", "completed", "incomplete"]}},
        "required": ["type", "id", "status"],
    },
    "ResponseError": _closed(code=_TEXT, message=_TEXT, param=_MAYBE_TEXT, type=_TEXT),
    "ResponseUsage": _closed(
        input_tokens=_COUNT,
        input_tokens_details=_CACHE,
        output_tokens=_COUNT,
        output_tokens_details=_closed(reasoning_tokens=_COUNT),
        total_tokens=_COUNT,
    ),
    "Response": _closed(
        id=_TEXT,
        object={"const": "response"},
        created_at=_COUNT,
        completed_at=_MAYBE_COUNT,
        status={"enum": ["in_progress", "completed", "incomplete", "failed"]},
        error={"anyOf": [{"$ref": "#/components/schemas/ResponseError"}, {"type": "null"}]},
        incomplete_details={"type": ["object", "null"], "properties": {"reason": {"enum": ["max_output_tokens", "content_filter"]}}},
        output=_ITEMS,
        usage={"anyOf": [{"$ref": "#/components/schemas/ResponseUsage"}, {"type": "null"}]},
        background={"const": False},
        conversation={"type": ["object", "null"], "properties": {"id": _TEXT}},
        frequency_penalty=_NUMBER,
        instructions=_MAYBE_TEXT,
        max_output_tokens=_MAYBE_COUNT,
        max_tool_calls=_MAYBE_COUNT,
        metadata=_METADATA,
        model=_TEXT,
        parallel_tool_calls=_FLAG,
        presence_penalty=_NUMBER,
        previous_response_id=_MAYBE_TEXT,
        prompt_cache_key=_MAYBE_TEXT,
        prompt_cache_retention=_MAYBE_TEXT,
        reasoning=_OBJECT,
        safety_identifier=_MAYBE_TEXT,
        service_tier=_TEXT,
        store=_FLAG,
        temperature=_NUMBER,
        text=_OBJECT,
        tool_choice={"type": ["string", "object"]},
        tools={"type": "array", "items": _OBJECT},
        top_logprobs=_COUNT,
        top_p=_NUMBER,
        truncation={"enum": ["auto", "disabled"]},
        user=_MAYBE_TEXT,
    ),
}
_STREAM = (
    "With `stream`: server-sent events, each with its type as `event` and in its data, numbered by `sequence_number`: `response.created`, "
    "`response.in_progress`, the events of the items, and `response.completed`, `response.incomplete` or `response.failed` with the "
    "Response. Lines that begin with a colon are comments: they report the place in the queue."
)


def responses_paths(headers: Schema, error: Any) -> dict[str, Any]:
    """Return the path of the creation of responses.

    `headers` are those of every response; `error` makes the description of a response that is an error from its words.
    """
    content: Schema = {
        "application/json": {"schema": {"$ref": "#/components/schemas/Response"}},
        "text/event-stream": {"schema": {"type": "string", "description": _STREAM}},
    }
    errors = {status: error(words) for status, words in ERRORS.items()} | {"default": error("Another error.")}
    errors["404"] = error("The model, the previous response, the conversation or an item does not exist, or belongs to another tenant.")
    return {
        "/v1/responses": {
            "post": {
                "operationId": "create_response",
                "summary": "Create a response.",
                "tags": ["openai"],
                "parameters": [IDEMPOTENCY_KEY],
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ResponsesRequest"}}},
                },
                "responses": {"200": {"description": "Done.", "headers": headers | ANSWER_HEADERS, "content": content}} | errors,
            }
        }
    }
