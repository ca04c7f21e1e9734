"""The parameters that reach an engine: an allowlist with ranges. Whatever is not on it is refused by name.

Engines have altered other requests' output, crashed or fetched from the network on parameters that nobody thought of; so an
engine sees only what is written here.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from lmaas.admission.tiers import SERVICE_TIERS
from lmaas.errors import InvalidRequest
from lmaas.gateway.schemas import MAX_DEPTH, check_schema, depth

#: An engine makes its grammar from these.
GRAMMAR_PARAMETERS = ("response_format", "tools", "tool_choice", "parallel_tool_calls", "structured_outputs")
MAX_CHOICES = 16
MAX_PROMPTS = 32
MAX_MESSAGES = 2048
MAX_TOOLS = 128

Check = Callable[[str, Any], None]


@dataclass(frozen=True, slots=True)
class Shielded:
    """A request as its engine may see it. `weight` is how many sequences it needs, `prompts` how many prompts it has.

    `include_usage` and `continuous_usage` say what the client wants to see of a stream's usage: the engine is always asked.
    """

    model: str
    stream: bool
    include_usage: bool
    continuous_usage: bool
    weight: int
    prompts: int
    #: One of SERVICE_TIERS.
    service_tier: str
    parameters: dict[str, Any]

    @property
    def constrained(self) -> bool:
        """Whether the engine compiles a grammar for the answer."""
        return bool(self.parameters.get("tools")) or self.parameters.get("response_format", {}).get("type", "text") != "text"

    @property
    def grammar(self) -> dict[str, Any]:
        """The parameters from which the engine makes its grammar, by name."""
        return {name: value for name in GRAMMAR_PARAMETERS if (value := self.parameters.get(name)) is not None}

    def body(self, engine_name: str, cache_salt: str) -> bytes:
        """The engine's request body. The salt keeps tenants from timing each other's cached prompts."""
        extra: dict[str, Any] = {"model": engine_name, "cache_salt": cache_salt, "stream": self.stream}
        if self.stream:
            extra["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        try:
            return msgspec.json.encode(self.parameters | extra)
        except OverflowError:
            # An integer of more than 64 bits, as a schema may hold one.
            return json.dumps(self.parameters | extra, ensure_ascii=False, separators=(",", ":")).encode()


def out_of_range(name: str, rule: str) -> InvalidRequest:
    """The error for a value of the right type that is not allowed."""
    return InvalidRequest(f"'{name}' must be {rule}.", code="out_of_range", param=name)


def wrong_type(name: str, rule: str) -> InvalidRequest:
    """The error for a value of another type."""
    return InvalidRequest(f"'{name}' must be {rule}.", code="invalid_type", param=name)


def _number(low: float, high: float) -> Check:
    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong_type(name, "a number")
        # Also false for NaN, infinity and integers of any size.
        if not low <= value <= high:
            raise out_of_range(name, f"between {low:g} and {high:g}")

    return check


def _integer(low: int, high: int) -> Check:
    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong_type(name, "an integer")
        if not low <= value <= high:
            raise out_of_range(name, f"between {low} and {high}")

    return check


def _boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise wrong_type(name, "true or false")


def _anything(name: str, value: Any) -> None:
    """Taken for the sake of OpenAI's client, and not forwarded."""


def _service_tier(name: str, value: Any) -> None:
    if not isinstance(value, str) or value not in SERVICE_TIERS:
        raise out_of_range(name, f"one of: {', '.join(SERVICE_TIERS)}")


def _stop(name: str, value: Any) -> None:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
        raise wrong_type(name, "a string or a list of strings")
    if len(values) > 16 or not all(0 < len(item) <= 1000 for item in values):
        raise out_of_range(name, "at most 16 strings of 1 to 1000 characters")


def _token_ids(name: str, value: Any) -> None:
    if not isinstance(value, list) or not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        raise wrong_type(name, "a list of token ids")
    if len(value) > 64 or not all(0 <= item < 2**31 for item in value):
        raise out_of_range(name, "at most 64 token ids")


def _logit_bias(name: str, value: Any) -> None:
    if not isinstance(value, dict) or len(value) > 1024:
        raise wrong_type(name, "an object of at most 1024 token ids")
    for token, bias in value.items():
        if not token.isascii() or not token.isdigit() or len(token) > 9:
            raise wrong_type(name, "an object whose keys are token ids")
        _number(-100, 100)(name, bias)


def _bounded(name: str, value: Any) -> None:
    """What is forwarded without a look at each field must not break a parser."""
    if depth(value) > MAX_DEPTH + 8:
        raise InvalidRequest(f"'{name}' is nested too deeply.", code="invalid_schema", param=name)


def _response_format(name: str, value: Any) -> None:
    _bounded(name, value)
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("text", "json_object", "json_schema"):
        raise wrong_type(name, "an object whose type is 'text', 'json_object' or 'json_schema'")
    if kind == "json_schema":
        wrapped = value.get("json_schema")
        if not isinstance(wrapped, dict) or not isinstance(wrapped.get("name", ""), str):
            raise InvalidRequest("'response_format.json_schema' must have a name and a schema.", code="invalid_schema", param=name)
        check_schema(name, wrapped.get("schema"))


def _tools(name: str, value: Any) -> None:
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise wrong_type(name, f"a list of at most {MAX_TOOLS} tools")
    _bounded(name, value)
    for tool in value:
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise wrong_type(name, "a list of tools of type 'function', each with a name")
        if function.get("parameters") is not None:
            check_schema(name, function["parameters"])


def _tool_choice(name: str, value: Any) -> None:
    if isinstance(value, str):
        if value not in ("none", "auto", "required"):
            raise out_of_range(name, "'none', 'auto', 'required' or a function")
        return
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise wrong_type(name, "'none', 'auto', 'required' or a function")


def _stream_options(name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise wrong_type(name, "an object")
    for option, wanted in value.items():
        if option not in ("include_usage", "continuous_usage_stats", "include_obfuscation"):
            raise _unsupported(f"{name}.{option}")
        _boolean(f"{name}.{option}", wanted)


def _messages(name: str, value: Any) -> None:
    if not isinstance(value, list):
        raise wrong_type(name, "a list of messages")
    if not 0 < len(value) <= MAX_MESSAGES:
        raise InvalidRequest(
            f"'{name}' must have between 1 and {MAX_MESSAGES} messages.", code="empty_prompt" if not value else "out_of_range", param=name
        )
    for index, message in enumerate(value):
        where = f"{name}[{index}]"
        if not isinstance(message, dict) or message.get("role") not in ("system", "developer", "user", "assistant", "tool"):
            raise wrong_type(where, "an object with the role system, developer, user, assistant or tool")
        for field in message:
            if field not in ("role", "content", "name", "tool_calls", "tool_call_id", "refusal", "reasoning_content", "reasoning"):
                raise _unsupported(f"{where}.{field}")
        for field in ("name", "tool_call_id", "refusal", "reasoning_content", "reasoning"):
            if not isinstance(message.get(field), str | None):
                raise wrong_type(f"{where}.{field}", "a string")
        _tool_calls(f"{where}.tool_calls", message.get("tool_calls"))
        _content(f"{where}.content", message)


def _tool_calls(where: str, calls: Any) -> None:
    if calls is None:
        return
    if not isinstance(calls, list) or len(calls) > MAX_TOOLS:
        raise wrong_type(where, f"a list of at most {MAX_TOOLS} tool calls")
    for call in calls:
        function = call.get("function") if isinstance(call, dict) and call.get("type") == "function" else None
        if not isinstance(function, dict) or not all(isinstance(function.get(field), str) for field in ("name", "arguments")):
            raise wrong_type(where, "a list of calls of functions, each with a name and arguments as a string")
        # The engine parses them: what it cannot parse, or only by breaking, must not get there.
        try:
            arguments = json.loads(function["arguments"] or "{}")
        except (ValueError, RecursionError):
            raise InvalidRequest(f"The arguments in '{where}' are not valid JSON.", code="invalid_json", param=where) from None
        if depth(arguments) > MAX_DEPTH:
            raise InvalidRequest(f"The arguments in '{where}' are nested too deeply.", code="invalid_json", param=where)


def _content(where: str, message: dict[str, Any]) -> None:
    content = message.get("content")
    if content is None:
        if message["role"] != "assistant":
            raise wrong_type(where, "a string")
        return
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise wrong_type(where, "a string or a list of text parts")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or set(part) != {"type", "text"} or not isinstance(part.get("text"), str):
            # Nothing is ever fetched for a tenant.
            raise InvalidRequest(f"Only text is supported in '{where}'.", code="unsupported_content", param=where)


def _prompt(name: str, value: Any) -> None:
    prompts = value if isinstance(value, list) and value and not isinstance(value[0], int) else [value]
    if len(prompts) > MAX_PROMPTS:
        raise InvalidRequest(f"'{name}' may have {MAX_PROMPTS} prompts at most.", code="too_many_prompts", param=name)
    for prompt in prompts:
        if isinstance(prompt, list):
            if not all(isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 2**31 for token in prompt):
                raise wrong_type(name, "a string, a list of strings, or token ids")
        elif not isinstance(prompt, str):
            raise wrong_type(name, "a string, a list of strings, or token ids")
        if len(prompt) == 0:
            raise InvalidRequest(f"'{name}' must not be empty.", code="empty_prompt", param=name)


_TOKENS = _integer(1, 1_000_000)

#: Forwarded to the engine, on both endpoints.
_COMMON: dict[str, Check] = {
    "temperature": _number(0, 2),
    "top_p": _number(0.000001, 1),
    "top_k": _integer(-1, 1_000_000),
    "min_p": _number(0, 1),
    "n": _integer(1, MAX_CHOICES),
    "stop": _stop,
    "stop_token_ids": _token_ids,
    "max_tokens": _TOKENS,
    "min_tokens": _integer(0, 1_000_000),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "repetition_penalty": _number(0.01, 10),
    "logit_bias": _logit_bias,
    "seed": _integer(-(2**63), 2**63 - 1),
    "ignore_eos": _boolean,
    "skip_special_tokens": _boolean,
    "response_format": _response_format,
}
_CHAT: dict[str, Check] = _COMMON | {
    "messages": _messages,
    "max_completion_tokens": _TOKENS,
    "logprobs": _boolean,
    "top_logprobs": _integer(0, 20),
    "tools": _tools,
    "tool_choice": _tool_choice,
    "parallel_tool_calls": _boolean,
}
_COMPLETION: dict[str, Check] = _COMMON | {
    "prompt": _prompt,
    "logprobs": _integer(0, 20),
    "echo": _boolean,
}
#: Understood here, and not forwarded as they came.
_OWN: dict[str, Check] = {
    "stream": _boolean,
    "stream_options": _stream_options,
    "best_of": _integer(1, 1),
    "service_tier": _service_tier,
    **dict.fromkeys(
        ("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "verbosity"),
        _anything,
    ),
}


def _unsupported(name: str) -> InvalidRequest:
    return InvalidRequest(f"The parameter '{name[:100]}' is not supported.", code="unsupported_parameter", param=name[:100])


def shield_chat(body: dict[str, Any]) -> Shielded:
    """A `/v1/chat/completions` request. Raises InvalidRequest with the parameter to blame."""
    return _shield(body, _CHAT, "messages")


def shield_completion(body: dict[str, Any]) -> Shielded:
    """A `/v1/completions` request. Raises InvalidRequest with the parameter to blame."""
    return _shield(body, _COMPLETION, "prompt")


def _shield(body: dict[str, Any], allowed: dict[str, Check], required: str) -> Shielded:
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequest("'model' must be the name of a model.", code="missing_parameter", param="model")
    parameters: dict[str, Any] = {}
    for name, value in body.items():
        if name == "model":
            continue
        check = allowed.get(name)
        own = _OWN.get(name)
        if check is None and own is None:
            raise _unsupported(name)
        if value is None:
            continue  # OpenAI's clients may send null for "not given"
        (check or own or _anything)(name, value)
        if check is not None:
            parameters[name] = value
    if required not in parameters:
        raise InvalidRequest(f"'{required}' is required.", code="missing_parameter", param=required)
    limit = parameters.get("max_completion_tokens", parameters.get("max_tokens"))
    if limit is not None and parameters.get("min_tokens", 0) > limit:
        raise out_of_range("min_tokens", "at most max_tokens")
    if parameters.get("echo") and parameters.get("logprobs") is not None:
        # The engine would make `prompt_logprobs` of it.
        raise _unsupported("logprobs")
    prompt = parameters.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    stream = bool(body.get("stream"))
    options = (body.get("stream_options") or {}) if stream else {}
    if body.get("stream_options") and not stream:
        raise InvalidRequest("'stream_options' needs 'stream': true.", code="invalid_request", param="stream_options")
    return Shielded(
        model=model,
        stream=stream,
        include_usage=bool(options.get("include_usage")),
        continuous_usage=bool(options.get("include_usage") and options.get("continuous_usage_stats")),
        weight=prompts * parameters.get("n", 1),
        prompts=prompts,
        service_tier=body.get("service_tier") or "default",
        parameters=parameters,
    )
