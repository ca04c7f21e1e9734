"""The part of the OpenAPI document for OpenAI's endpoints and those for load balancers. The parameters follow from their table."""

import functools
from collections.abc import Mapping
from typing import Any

from lmaas.protocols.openapi_parts import COUNT, FLAG, IDS, MAYBE_OBJECT, MAYBE_TEXT, OBJECT, TEXT, Schema, closed, content
from lmaas.protocols.parameters import checks
from lmaas.protocols.parameters.table import CHAT, COMPLETION, Parameter, Table, Treatment

_LIST_OF_TEXT: Schema = {"type": "array", "items": TEXT}
_MAYBE_IDS: Schema = {"type": ["array", "null"], "items": COUNT}

WORDS = "OpenAI's parameters and those of vLLM that are safe to forward."
#: The types of parameters that have their own reader, which contains the rest of the rule.
OWN: dict[str, Schema] = {
    "messages": {"type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/ChatMessage"}},
    "prompt": {"anyOf": [TEXT, _LIST_OF_TEXT, IDS, {"type": "array", "items": IDS}]},
    "stop": {"anyOf": [TEXT, {"type": "array", "items": MAYBE_TEXT, "maxItems": checks.MAX_STOP_STRINGS}]},
    "stop_token_ids": IDS,
    "top_p": {"type": "number", "minimum": 0, "maximum": 1},
    "logit_bias": {"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}},
    "logprobs": {"type": ["boolean", "integer"]},
    "tools": {"type": "array", "items": OBJECT},
    "functions": {"type": "array", "items": OBJECT},
    "tool_choice": {"type": ["string", "object"]},
    "function_call": {"type": ["string", "object"]},
    "response_format": OBJECT,
    "structured_outputs": OBJECT,
    "stream_options": OBJECT,
    "chat_template_kwargs": OBJECT,
    "guided_json": {"type": ["string", "object", "boolean"]},
    "guided_regex": TEXT,
    "guided_choice": _LIST_OF_TEXT,
    "guided_grammar": TEXT,
    "modalities": _LIST_OF_TEXT,
}


def _reader_schema(item: Parameter, own: Mapping[str, Schema]) -> Schema:
    read = item.read
    if read is checks.boolean:
        return FLAG
    if isinstance(read, functools.partial):
        if read.func is checks.read_one_of:
            return {"enum": list(read.args[0])}
        if read.func in (checks.read_number, checks.read_integer):
            kind = "integer" if read.func is checks.read_integer else "number"
            return {"type": kind, "minimum": read.args[0], "maximum": read.args[1]}
    return own.get(item.name, {})


def _parameter(item: Parameter, own: Mapping[str, Schema]) -> Schema:
    if item.treatment is Treatment.REFUSED:
        words = f"Refused, except for values that ask for nothing: {item.rule}."
        return {"enum": [*item.neutral, None], "description": words}
    schema = _reader_schema(item, own)
    if "type" in schema:
        kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        schema = schema | {"type": [*kinds, "null"]}
    elif "enum" in schema:
        schema = schema | {"enum": [*schema["enum"], None]}
    elif "anyOf" in schema:
        schema = {"anyOf": [*schema["anyOf"], {"type": "null"}]}
    words = f"No effect: {item.rule}." if item.treatment is Treatment.ACCEPTED else f"{item.rule[:1].upper()}{item.rule[1:]}."
    return schema | {"description": words}


def request_schema(table: Table, words: str, own: Mapping[str, Schema]) -> Schema:
    """Return the schema of an endpoint's requests. `own` has the types of parameters whose readers do not have them."""
    properties = {item.name: _parameter(item, own) for item in table.parameters}
    return {
        "type": "object",
        "description": f"{words} Null means that a parameter was not given.",
        "properties": {"model": TEXT | {"description": "A base model, an adapter, or a version of one as name@version."}} | properties,
        "required": ["model", *table.required],
        "additionalProperties": False,
    }


def _object(required: tuple[str, ...], **properties: Schema) -> Schema:
    # These objects come from the engine and may have further fields of vLLM's.
    return {"type": "object", "properties": properties, "required": list(required)}


_FINISH: Schema = {"enum": ["stop", "length", "tool_calls", "function_call", None]}
_ENDING = {"finish_reason": _FINISH, "stop_reason": {"type": ["string", "integer", "null"]}, "logprobs": MAYBE_OBJECT}
_TOOL_CALLS: Schema = {"type": ["array", "null"], "items": OBJECT}
_SAID = {
    "role": {"const": "assistant"},
    "content": MAYBE_TEXT,
    "reasoning": MAYBE_TEXT,
    "refusal": MAYBE_TEXT,
    "tool_calls": _TOOL_CALLS,
    "function_call": MAYBE_OBJECT,
}
_SERVICE = {"service_tier": MAYBE_TEXT, "system_fingerprint": MAYBE_TEXT}


def _answer(kind: str, choice: Schema, *, usage: Schema, complete: bool) -> Schema:
    required = ("id", "object", "created", "model", "choices", *(("usage",) if complete else ()))
    return _object(
        required,
        id=TEXT,
        object={"const": kind},
        created=COUNT,
        model=TEXT,
        choices={"type": "array", "items": choice},
        usage=usage,
        **_SERVICE,
    )


def _usage(*, nullable: bool) -> Schema:
    found: Schema = {"$ref": "#/components/schemas/TokenUsage"}
    return {"anyOf": [found, {"type": "null"}]} if nullable else found


_INDEX = {"index": COUNT}
_CHOICE = _object(("index", "message", "finish_reason"), **_INDEX, message=_object(("role", "content"), **_SAID), **_ENDING)
_DELTA = _object(("index", "delta", "finish_reason"), **_INDEX, delta=_object((), **_SAID), **_ENDING)
_TEXT_CHOICE = _object(("index", "text", "finish_reason"), **_INDEX, text=TEXT, **_ENDING)

SCHEMAS: dict[str, Schema] = {
    "ChatMessage": _object(
        ("role",),
        role={"enum": ["system", "developer", "user", "assistant", "tool", "function"]},
        content={"type": ["string", "array", "null"], "items": OBJECT},
        name=MAYBE_TEXT,
        tool_calls=_TOOL_CALLS,
        tool_call_id=MAYBE_TEXT,
    ),
    "ChatRequest": request_schema(CHAT, WORDS, OWN),
    "CompletionRequest": request_schema(COMPLETION, WORDS, OWN),
    "TokenUsage": _object(
        ("prompt_tokens", "completion_tokens", "total_tokens"),
        prompt_tokens=COUNT,
        completion_tokens=COUNT,
        total_tokens=COUNT,
        prompt_tokens_details=MAYBE_OBJECT,
        completion_tokens_details=MAYBE_OBJECT,
    ),
    "ChatCompletion": _answer("chat.completion", _CHOICE, usage=_usage(nullable=False), complete=True),
    "ChatCompletionChunk": _answer("chat.completion.chunk", _DELTA, usage=_usage(nullable=True), complete=False),
    "Completion": _answer("text_completion", _TEXT_CHOICE, usage=_usage(nullable=False), complete=True),
    "CompletionChunk": _answer("text_completion", _TEXT_CHOICE, usage=_usage(nullable=True), complete=False),
    "Health": closed(status={"enum": ["ok", "ready"]}),
}

IDEMPOTENCY_KEY: Schema = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[ -~]+$"},
    "description": "The request runs once: for 24 hours the tenant's other requests with this key and the same body get the same answer, "
    "at no cost. A failed request, or one whose answer was not read to its end, is not kept and runs anew.",
}
_RATE_LIMITS = {
    f"x-ratelimit-{what}-{unit}": {"description": f"{words} of the limit of {unit} per minute, if there is one.", "schema": TEXT}
    for unit in ("requests", "tokens")
    for what, words in (("limit", "The value"), ("remaining", "What is left"), ("reset", "When all is available again:"))
}
MODEL_HEADER: Schema = {
    "x-lmaas-model": {"description": "The model that served: a base model, or an adapter as name@version.", "schema": TEXT}
}
#: The headers of an answer to an inference.
ANSWER_HEADERS: Schema = (
    _RATE_LIMITS
    | MODEL_HEADER
    | {"idempotency-replayed": {"description": "`true` if the answer is that of an earlier request.", "schema": TEXT}}
)
_STREAM = (
    "With `stream`: server-sent events, each `data: ` and the JSON of a chunk, ending with `data: [DONE]`. An error after the first event "
    "is an event with an Error, and the stream ends without `[DONE]`. Lines that begin with a colon are comments: they report the place "
    "in the queue."
)
#: The meanings of the error responses of OpenAI's endpoints, by status.
ERRORS = {
    "400": "The request is malformed, or asks for something not offered (`invalid_type`, `out_of_range`, `unsupported_parameter`, …).",
    "401": "The API key is missing or not valid (`invalid_api_key`).",
    "403": "An operator's key cannot call models (`insufficient_permissions`).",
    "404": "The model does not exist, or belongs to another tenant (`model_not_found`).",
    "409": "The Idempotency-Key belongs to a request that is still running (`idempotency_in_progress`: retry), had another body "
    "(`idempotency_mismatch`), or had a response that was too large to be kept (`idempotency_answer_too_large`).",
    "413": "The body is too large (`request_too_large`).",
    "429": "The tenant or the key has reached a limit (`rate_limit_exceeded`, `insufficient_quota`, …).",
    "502": "The engine failed, also after one retry (`engine_failed`).",
    "503": "No engine had room in time, or a part of the service cannot be reached (`no_capacity`, …).",
}


def openai_paths(headers: Schema, error: Any) -> dict[str, Any]:
    """Return the paths of OpenAI's endpoints and of those for load balancers.

    `headers` are those of every response; `error` makes the description of a response that is an error from its words.
    """
    errors = {status: error(words) for status, words in ERRORS.items()} | {"default": error("Another error.")}

    def done(name: str, more: Schema | None = None, stream: str | None = None) -> Schema:
        found = content(name)
        if stream is not None:
            events = {"type": "string", "description": _STREAM, "contentSchema": {"$ref": f"#/components/schemas/{stream}"}}
            found["text/event-stream"] = {"schema": events}
        return {"description": "Done.", "headers": headers | (more or {}), "content": found}

    def completion(operation_id: str, summary: str, request: str, answer: str, chunk: str) -> Schema:
        return {
            "post": {
                "operationId": operation_id,
                "summary": summary,
                "tags": ["openai"],
                "parameters": [IDEMPOTENCY_KEY],
                "requestBody": {"required": True, "content": content(request)},
                "responses": {"200": done(answer, ANSWER_HEADERS, chunk)} | errors,
            }
        }

    def read(operation_id: str, summary: str, answer: Schema, **more: Any) -> Schema:
        return {"get": {"operationId": operation_id, "summary": summary, "tags": ["openai"], "responses": answer} | more}

    open_to_all: Schema = {"security": [], "tags": ["health"]}
    health = {"200": done("Health")}
    text = {"200": {"description": "Done.", "headers": headers, "content": {"text/plain": {"schema": TEXT}}}}
    spec = {"200": {"description": "Done.", "headers": headers, "content": {"application/json": {"schema": OBJECT}}}}
    return {
        "/v1/chat/completions": completion("chat", "Create a chat completion.", "ChatRequest", "ChatCompletion", "ChatCompletionChunk"),
        "/v1/completions": completion("completion", "Create a completion.", "CompletionRequest", "Completion", "CompletionChunk"),
        "/health": read("health", "Report that the gateway runs.", health, **open_to_all),
        "/healthz": read("healthz", "Report that the gateway runs.", health, **open_to_all),
        "/readyz": read("readyz", "Report whether tenants can be served.", health | {"503": errors["503"]}, **open_to_all),
        "/metrics": read("metrics", "Metrics of this gateway for Prometheus.", text, **open_to_all),
        "/openapi.json": read("openapi", "This document.", spec, **open_to_all),
    }
