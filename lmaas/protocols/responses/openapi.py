"""The part of the OpenAPI document for the creation of responses."""

from typing import Any

from lmaas.protocols.openapi import ANSWER_HEADERS, ERRORS, IDEMPOTENCY_KEY, WORDS, request_schema
from lmaas.protocols.openapi import OWN as OWN_OF_CHAT
from lmaas.protocols.openapi_parts import COUNT, FLAG, MAYBE_TEXT, NUMBER, OBJECT, TEXT, Schema, closed, content
from lmaas.protocols.responses.items import MAX_ITEMS, PREFIXES
from lmaas.protocols.responses.parameters import INCLUDABLE, MAX_KEY, MAX_PAIRS, MAX_VALUE, SUMMARIES, TABLE, VERBOSITIES

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
    "input": {"type": ["string", "array"], "items": OBJECT, "maxItems": MAX_ITEMS},
    "conversation": {"type": ["string", "object"]},
    "include": {"type": "array", "items": {"enum": list(INCLUDABLE)}},
    "reasoning": {"type": "object", "properties": {"effort": MAYBE_TEXT, "summary": {"enum": [*SUMMARIES, None]}}},
    "text": {"type": "object", "properties": {"format": OBJECT, "verbosity": {"enum": [*VERBOSITIES, None]}}},
    "metadata": _METADATA,
    **dict.fromkeys(
        (
            *("instructions", "previous_response_id", "user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
            "service_tier",
        ),
        TEXT,
    ),
}


_CACHE = closed(cached_tokens=COUNT, cache_write_tokens=COUNT)
SCHEMAS: dict[str, Schema] = {
    "ResponsesRequest": request_schema(TABLE, WORDS, OWN_OF_CHAT | OWN),
    "ResponseItem": {
        "type": "object",
        "description": "An item of an input or an output. The other fields depend on its type.",
        "properties": {"type": {"enum": list(PREFIXES)}, "id": TEXT, "status": {"enum": ["in_progress", "completed", "incomplete"]}},
        "required": ["type", "id", "status"],
    },
    "ResponseError": closed(code=TEXT, message=TEXT, param=MAYBE_TEXT, type=TEXT),
    "ResponseUsage": closed(
        input_tokens=COUNT,
        input_tokens_details=_CACHE,
        output_tokens=COUNT,
        output_tokens_details=closed(reasoning_tokens=COUNT),
        total_tokens=COUNT,
    ),
    "Response": closed(
        id=TEXT,
        object={"const": "response"},
        created_at=COUNT,
        completed_at=_MAYBE_COUNT,
        status={"enum": ["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]},
        error={"anyOf": [{"$ref": "#/components/schemas/ResponseError"}, {"type": "null"}]},
        incomplete_details={"type": ["object", "null"], "properties": {"reason": {"enum": ["max_output_tokens", "content_filter"]}}},
        output=_ITEMS,
        usage={"anyOf": [{"$ref": "#/components/schemas/ResponseUsage"}, {"type": "null"}]},
        background=FLAG,
        conversation={"type": ["object", "null"], "properties": {"id": TEXT}},
        frequency_penalty=NUMBER,
        instructions=MAYBE_TEXT,
        max_output_tokens=_MAYBE_COUNT,
        max_tool_calls=_MAYBE_COUNT,
        metadata=_METADATA,
        model=TEXT,
        parallel_tool_calls=FLAG,
        presence_penalty=NUMBER,
        previous_response_id=MAYBE_TEXT,
        prompt_cache_key=MAYBE_TEXT,
        prompt_cache_retention=MAYBE_TEXT,
        reasoning=OBJECT,
        safety_identifier=MAYBE_TEXT,
        service_tier=TEXT,
        store=FLAG,
        temperature=NUMBER,
        text=OBJECT,
        tool_choice={"type": ["string", "object"]},
        tools={"type": "array", "items": OBJECT},
        top_logprobs=COUNT,
        top_p=NUMBER,
        truncation={"enum": ["auto", "disabled"]},
        user=MAYBE_TEXT,
    ),
}
_STREAM = (
    "With `stream`: server-sent events, each with its type as `event` and in its data, numbered by `sequence_number`: `response.created`, "
    "with `background` then `response.queued`, `response.in_progress`, the events of the items, and `response.completed`, "
    "`response.incomplete` or `response.failed` with the Response. Lines that begin with a colon are comments: they report the place in "
    "the queue."
)


def responses_paths(headers: Schema, error: Any) -> dict[str, Any]:
    """Return the path of the creation of responses.

    `headers` are those of every response; `error` makes the description of a response that is an error from its words.
    """
    answer = content("Response") | {"text/event-stream": {"schema": {"type": "string", "description": _STREAM}}}
    errors = {status: error(words) for status, words in ERRORS.items()} | {"default": error("Another error.")}
    errors["404"] = error("The model, the previous response, the conversation or an item does not exist, or belongs to another tenant.")
    return {
        "/v1/responses": {
            "post": {
                "operationId": "create_response",
                "summary": "Create a response.",
                "tags": ["openai"],
                "parameters": [IDEMPOTENCY_KEY],
                "requestBody": {"required": True, "content": content("ResponsesRequest")},
                "responses": {"200": {"description": "Done.", "headers": headers | ANSWER_HEADERS, "content": answer}} | errors,
            }
        }
    }
