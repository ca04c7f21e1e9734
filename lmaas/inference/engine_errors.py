"""Classifies an engine's errors: a mistake of the client, a missing adapter, a request that cannot be processed, or a lost engine."""

import json
import re

from lmaas.errors import InvalidRequest, RequestFailed
from lmaas.inference.request import EngineRequest, context_exceeded
from lmaas.scheduling.states import RetryReason

#: vLLM's messages when the whole engine has failed, and when it gave up a sequence. Another 500 is about one request.
_ENGINE_FAILED = ("EngineCore encountered an issue", "Internal server error", "Request failed; please retry", "Client disconnected")
#: The text that vLLM appends to the message of an error with a parameter.
_SUFFIX = re.compile(r"\s*\(parameter=.*\)\s*$", re.DOTALL)
_VALIDATOR = re.compile(r"\d+ validation errors?\b")
_PROMPT_TOO_LONG = re.compile(r"This model's maximum context length is|Input length \(\d+\) exceeds|max_tokens must be at least 1, got 0")
#: The beginnings or contents of messages about a grammar, for all of vLLM's grammar libraries.
_GRAMMAR = re.compile(
    r"grammar|regex|regular expression|json schema|structured.output|structural.tag|xgrammar|guidance|lark", re.IGNORECASE
)
#: The beginning of the messages of vLLM's sampling parameters, for which it names no parameter.
_RULE = re.compile(r"`?(\w+)`? (?:must|cannot)\b")
#: vLLM's messages about `dimensions`, for which it names no parameter, and about an input in which its tokenizer finds no tokens.
_FIXED_LENGTH = "does not support Matryoshka embeddings"
_DIMENSIONS = re.compile(r"Model \S+ only supports (?:Matryoshka )?dimensions")
_NO_TOKENS = "The decoder prompt cannot be empty"
_MAX_MESSAGE = 500


class EngineLost(Exception):
    """A delivery failed. `reason` is for the scheduler. `revoked` is true if the replica was taken out of service while its connection was
    open, as happens to an engine that stalls."""

    def __init__(self, reason: RetryReason, detail: str, *, revoked: bool = False) -> None:
        super().__init__(detail)
        self.reason, self.revoked = reason, revoked


def meaning(status: int, text: bytes, engine_name: str, request: EngineRequest, max_model_len: int) -> Exception:
    """Return the exception for an engine's error response, or for the error event of a stream."""
    message, code, param = text[:200].decode(errors="replace"), status, None
    formed = False
    try:
        error = json.loads(text)["error"]
        message, code = str(error["message"]), int(error.get("code") or status)
        param = error.get("param")
        formed = True
    except (ValueError, KeyError, TypeError):
        pass
    if code == 404:
        # The engine does not have the adapter, although it was reported as loaded.
        return EngineLost(RetryReason.ADAPTER, message)
    if 400 <= code < 500 or code == 501:
        # vLLM returns 501 for a request that the model's engine does not support.
        return _refusal(message, param if isinstance(param, str) else None, engine_name, request, max_model_len)
    if code == 500 and formed and message and not message.startswith(_ENGINE_FAILED):
        # vLLM's API server failed on this request before it reached the engine core. It would fail in the same way on every engine.
        return RequestFailed()
    return EngineLost(RetryReason.ENGINE, message)


def _refusal(message: str, param: str | None, engine_name: str, request: EngineRequest, max_model_len: int) -> InvalidRequest:
    # Tenants use only their own names for models.
    message = _SUFFIX.sub("", message.replace(engine_name, request.model))
    if param in ("input_tokens", "input_text") or _PROMPT_TOO_LONG.match(message):
        return context_exceeded(request.prompt_field, max_model_len, _counted(message))
    blamed = _parameter(param)
    name = request.clients_name(blamed)
    if _VALIDATOR.match(message):
        # The text comes from a validator inside the engine and contains internal names.
        subject = f"The value of '{name}'" if name else "The request"
        return InvalidRequest(f"{subject} is not valid for this model's engine.", param=name)
    code, text = None, _shown(message)
    rule = _RULE.match(message) if param is None else None
    if rule and request.clients_name(rule[1]):
        code, name = "out_of_range", request.clients_name(rule[1])
    elif _FIXED_LENGTH in message:
        code, name = "unsupported_parameter", request.clients_name("dimensions")
        text = f"The vectors of the model '{request.model}' have a fixed length, so '{name}' is not supported. Remove it from the request."
    elif _DIMENSIONS.match(message):
        code, name = "out_of_range", request.clients_name("dimensions")
    elif message.startswith(_NO_TOKENS):
        code, name = "empty_input", request.prompt_field
        text = f"'{name}' has a text without a token. Leave it out."
    elif message.startswith("Token id "):
        code, name = "out_of_range", request.prompt_field
    elif blamed in ("max_tokens", "max_completion_tokens", "min_tokens", "truncate_prompt_tokens", "dimensions"):
        code = "out_of_range"
    elif name is not None and blamed in ("response_format", "structured_outputs", "tools"):
        code = "invalid_schema"
    elif name is None and request.constrained and _GRAMMAR.search(message):
        code = "invalid_schema" if "schema" in message.lower() else "invalid_grammar"
        name = request.grammar_field
        text = f"The engine cannot compile the grammar of '{name}': {text}"
    return InvalidRequest(text, code=code, param=name)


def _counted(message: str) -> str:
    """Return the prompt's length as the engine counted it, as the end of a sentence."""
    found = re.search(r"contains (?:at least )?\d+ (?:input tokens|characters)", message)
    length = re.match(r"Input length \((\d+)\)", message)
    return found[0] if found else f"contains {length[1]} input tokens" if length else "leaves no room for an answer"


def _parameter(blamed: str | None) -> str:
    """Return the parameter in the path that an engine blames, such as `body.stop` or `tool_choice.function`; empty for None."""
    return re.split(r"[.\[]", (blamed or "").removeprefix("body."), maxsplit=1)[0]


def _shown(message: str) -> str:
    """Return an engine's message in one line of bounded length."""
    line = " ".join(message.split())
    return line if len(line) <= _MAX_MESSAGE else line[:_MAX_MESSAGE] + "..."
