"""The part of the OpenAPI document for Anthropic's Messages protocol."""

from typing import Any

from lmaas.protocols.messages.table import EFFORTS, MESSAGES, THINKING_KINDS
from lmaas.protocols.openapi import ANSWER_HEADERS, IDEMPOTENCY_KEY, request_schema
from lmaas.protocols.openapi_parts import COUNT, OBJECT, TEXT, Schema, closed, content
from lmaas.protocols.parameters.checks import MAX_STOP_STRINGS

_BLOCKS: Schema = {"type": ["string", "array"], "items": OBJECT}
_FORMAT: Schema = {"type": "object", "properties": {"type": {"const": "json_schema"}, "schema": OBJECT}}
_MAYBE_FORMAT: Schema = {"anyOf": [_FORMAT, {"type": "null"}]}
#: The types of parameters that have their own reader.
OWN: dict[str, Schema] = {
    "messages": {"type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/InputMessage"}},
    "system": _BLOCKS,
    "tools": {"type": "array", "items": OBJECT},
    "tool_choice": {"type": "object", "properties": {"type": {"enum": ["auto", "any", "tool", "none"]}}},
    "thinking": {"type": "object", "properties": {"type": {"enum": list(THINKING_KINDS)}}},
    "output_config": {
        "type": "object",
        "properties": {"effort": {"enum": [*EFFORTS, None]}, "format": {"anyOf": [_FORMAT, {"type": "null"}]}},
    },
    "output_format": _FORMAT,
    "stop_sequences": {"type": "array", "items": TEXT, "maxItems": MAX_STOP_STRINGS},
    "top_p": {"type": "number", "minimum": 0, "maximum": 1},
    "metadata": OBJECT,
}
WORDS = "Anthropic's parameters."
_USAGE_COUNTS = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens")
_STOP_REASONS = ["end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal", "model_context_window_exceeded"]


SCHEMAS: dict[str, Schema] = {
    "InputMessage": {
        "type": "object",
        "properties": {"role": {"enum": ["user", "assistant", "system"]}, "content": _BLOCKS},
        "required": ["role", "content"],
    },
    "MessagesRequest": request_schema(MESSAGES, WORDS, OWN),
    "Message": closed(
        id=TEXT,
        type={"const": "message"},
        role={"const": "assistant"},
        model=TEXT,
        content={"type": "array", "items": OBJECT, "description": "Blocks of the types text, thinking and tool_use."},
        stop_reason={"enum": _STOP_REASONS},
        stop_sequence={"type": ["string", "null"]},
        usage={"$ref": "#/components/schemas/MessageUsage"},
    ),
    "MessageUsage": closed(
        ("output_tokens_details",),
        **dict.fromkeys(_USAGE_COUNTS, COUNT),
        service_tier={"const": "standard"},
        output_tokens_details={"type": "object", "properties": {"thinking_tokens": COUNT}},
    ),
    "MessageError": closed(
        type={"const": "error"},
        request_id=TEXT,
        error={
            "type": "object",
            "properties": {"type": TEXT, "message": TEXT, "code": TEXT, "param": {"type": ["string", "null"]}, "details": OBJECT},
            "required": ["type", "message", "code", "param", "details"],
        },
    ),
}
_ERRORS = {
    "400": "The request is malformed, or asks for something not offered (`invalid_request_error`).",
    "401": "The API key is missing or not valid (`authentication_error`).",
    "403": "An operator's key cannot call models (`permission_error`).",
    "404": "The model does not exist, or belongs to another tenant (`not_found_error`).",
    "413": "The body is too large (`request_too_large`).",
    "429": "The tenant or the key has reached a limit (`rate_limit_error`).",
    "500": "The engine failed, also after one retry (`api_error`).",
    "529": "No engine had room in time, or a part of the service cannot be reached (`overloaded_error`).",
    "default": "Another error.",
}
_STREAM = (
    "With `stream`: server-sent events, each with its type as `event` and in its data: `message_start`, blocks of `content_block_start`, "
    "`content_block_delta` and `content_block_stop`, then `message_delta` and `message_stop`. `ping` events come while the request waits. "
    "A failed stream ends with an `error` event, whose data is a MessageError."
)


def errors(error: Any) -> dict[str, Any]:
    """Return the descriptions of the protocol's error responses."""
    return {status: error(words) | {"content": content("MessageError")} for status, words in _ERRORS.items()}


def messages_paths(headers: Schema, error: Any) -> dict[str, Any]:
    """Return the paths of the protocol.

    `headers` are those of every response; `error` makes the description of a response that is an error from its words.
    """
    answer = content("Message") | {"text/event-stream": {"schema": {"type": "string", "description": _STREAM}}}
    return {
        "/v1/messages": {
            "post": {
                "operationId": "create_message",
                "summary": "Create a message.",
                "tags": ["anthropic"],
                "parameters": [IDEMPOTENCY_KEY],
                "requestBody": {"required": True, "content": content("MessagesRequest")},
                "responses": {"200": {"description": "Done.", "headers": headers | ANSWER_HEADERS, "content": answer}} | errors(error),
            }
        }
    }
