"""The part of the OpenAPI document for the tokens of prompts."""

from typing import Any

from lmaas.protocols.messages.openapi import OWN as MESSAGES_OWN
from lmaas.protocols.messages.openapi import errors as messages_errors
from lmaas.protocols.messages.table import COUNT_TOKENS
from lmaas.protocols.openapi import ERRORS, MODEL_HEADER, OWN, WORDS, request_schema
from lmaas.protocols.openapi_parts import COUNT, IDS, TEXT, Schema, closed, content
from lmaas.protocols.responses.openapi import OWN as RESPONSES_OWN
from lmaas.protocols.tokens.counts import INPUT_TOKENS
from lmaas.protocols.tokens.tokenize import DETOKENIZE, TOKENIZE

SCHEMAS: dict[str, Schema] = {
    "TokenizeRequest": request_schema(TOKENIZE, "The parameters of vLLM: `prompt`, or a chat's.", OWN | {"prompt": TEXT}),
    "DetokenizeRequest": request_schema(DETOKENIZE, "The parameters of vLLM.", {"tokens": IDS}),
    "CountTokensRequest": request_schema(COUNT_TOKENS, "Anthropic's parameters.", MESSAGES_OWN),
    "InputTokensRequest": request_schema(INPUT_TOKENS, WORDS, OWN | RESPONSES_OWN),
    "TokenizedPrompt": closed(count=COUNT, max_model_len=COUNT, tokens=IDS, token_strs={"type": ["array", "null"], "items": TEXT}),
    "DetokenizedPrompt": closed(prompt=TEXT),
    "CountedTokens": closed(input_tokens=COUNT),
    "InputTokens": closed(object={"const": "response.input_tokens"}, input_tokens=COUNT),
}


def tokens_paths(headers: Schema, error: Any) -> dict[str, Any]:
    """Return the paths.

    `headers` are those of every response; `error` makes the description of a response that is an error from its words.
    """
    own = {status: error(words) for status, words in ERRORS.items() if status not in ("409", "502")} | {"default": error("Another error.")}
    theirs = {status: response for status, response in messages_errors(error).items() if status != "500"}

    def path(operation_id: str, summary: str, tag: str, request: str, answer: str, errors: Schema) -> Schema:
        done = {"description": "Done.", "headers": headers | MODEL_HEADER, "content": content(answer)}
        return {
            "post": {
                "operationId": operation_id,
                "summary": summary,
                "tags": [tag],
                "requestBody": {"required": True, "content": content(request)},
                "responses": {"200": done} | errors,
            }
        }

    return {
        TOKENIZE.path: path("tokenize", "Show the tokens of a text or a chat.", "tokens", "TokenizeRequest", "TokenizedPrompt", own),
        DETOKENIZE.path: path("detokenize", "Show the text of tokens.", "tokens", "DetokenizeRequest", "DetokenizedPrompt", own),
        INPUT_TOKENS.path: path(
            "input_tokens", "Count the tokens of a response's prompt.", "openai", "InputTokensRequest", "InputTokens", own
        ),
        COUNT_TOKENS.path: path(
            "count_tokens", "Count the tokens of a message's prompt.", "anthropic", "CountTokensRequest", "CountedTokens", theirs
        ),
    }
