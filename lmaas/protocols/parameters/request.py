"""Reads a client's request by the table of parameters, and builds the request for the engine."""

import json
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lmaas.admission.estimate import estimate
from lmaas.errors import InvalidRequest
from lmaas.protocols.parameters.checks import out_of_range, unsupported
from lmaas.protocols.parameters.prompts import count_prompts
from lmaas.protocols.parameters.table import BY_NAME, Endpoint, Parameter, Treatment
from lmaas.protocols.parameters.tools import settle_tools

#: The maximum number of log probabilities in one answer, about 100 MB, which the engine collects in memory.
MAX_ALTERNATIVES = 1_000_000
#: Below this temperature vLLM samples greedily.
GREEDY = 1e-5
#: Read by the gateway; an engine does not receive them as they came.
_GATEWAYS_OWN = ("stream", "stream_options", "service_tier", "best_of")
_LOGPROBS = ("logprobs", "top_logprobs", "prompt_logprobs")
#: The parameters from which an engine makes its grammar.
GRAMMAR_PARAMETERS = ("response_format", "tools", "tool_choice", "parallel_tool_calls", "structured_outputs")


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A checked request. `weight` is the number of sequences that it needs, `prompts` the number of its prompts.

    `include_usage` and `continuous_usage` are what the client asked to see in a stream; the engine is always asked for usage.
    `parameters` is what the engine receives, without what `body` adds.
    """

    model: str
    stream: bool
    include_usage: bool
    continuous_usage: bool
    weight: int
    prompts: int
    #: A key of SERVICE_TIERS.
    service_tier: str
    parameters: dict[str, Any]
    #: Whether the client used the deprecated `functions`, and so expects `function_call` in the answer.
    legacy_functions: bool = False
    #: The tools as the client sent them, if they were made strict here for a call that is required. Empty otherwise.
    tools_as_sent: list[Any] = field(default_factory=list)

    @property
    def constrained(self) -> bool:
        """True if the engine compiles a grammar for the answer."""
        asked = self.parameters
        if asked.get("structured_outputs") or asked.get("response_format", {}).get("type", "text") != "text":
            return True
        choice = asked.get("tool_choice", "auto")
        if not asked.get("tools") or choice == "none":
            return False
        # With `auto`, calls are free text unless a tool is strict or their number is limited.
        strict = any(tool["function"].get("strict") for tool in asked["tools"])
        return choice != "auto" or strict or asked.get("parallel_tool_calls") is False

    @property
    def must_be_checked(self) -> bool:
        """True if an engine may compile a grammar. Some tool parsers do so for every request with tools."""
        return self.constrained or (bool(self.parameters.get("tools")) and self.parameters.get("tool_choice") != "none")

    @property
    def grammar(self) -> dict[str, Any]:
        """The parameters from which the engine compiles its grammar, by name; without descriptions of tools, which agents change often."""
        found = {name: value for name in GRAMMAR_PARAMETERS if (value := self.parameters.get(name)) is not None}
        if tools := found.get("tools"):
            found["tools"] = [
                tool | {"function": {name: value for name, value in tool["function"].items() if name != "description"}} for tool in tools
            ]
        return found

    def loosen(self) -> bool:
        """Give the engine the tools as the client sent them, because it cannot enforce them. Returns whether that changes anything."""
        if not self.tools_as_sent:
            return False
        self.parameters["tools"] = self.tools_as_sent.copy()
        self.tools_as_sent.clear()
        return True

    @property
    def prompt_name(self) -> str:
        """The parameter that holds the prompt."""
        return "messages" if "messages" in self.parameters else "prompt"

    @property
    def only_echo(self) -> bool:
        """True if the client wants its prompt back and nothing generated."""
        return self.parameters.get("max_tokens") == 0

    def body(self, engine_name: str, cache_salt: str) -> bytes:
        """Return the engine's request body. The salt keeps tenants from timing each other's cached prompts."""
        extra: dict[str, Any] = {"model": engine_name, "cache_salt": cache_salt, "stream": self.stream}
        if self.stream:
            extra["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        try:
            return msgspec.json.encode(self.parameters | extra)
        except OverflowError:
            # An integer of more than 64 bits, as a schema may hold one.
            return json.dumps(self.parameters | extra, ensure_ascii=False, separators=(",", ":")).encode()

    def check_context(self, max_model_len: int) -> None:
        """Raise InvalidRequest for what cannot fit into the model's context, as far as that is known without counting tokens, and for
        more log probabilities than an engine should collect for one answer."""
        for name in ("max_completion_tokens", "max_tokens", "truncate_prompt_tokens"):
            if self.parameters.get(name, 0) > max_model_len:
                raise InvalidRequest(
                    f"'{name}' is {self.parameters[name]}, but the context of '{self.model}' has {max_model_len} tokens, prompt included. "
                    "Use a smaller value.",
                    code="out_of_range",
                    param=name,
                )
        prompt = self.parameters.get("prompt")
        if isinstance(prompt, list) and "truncate_prompt_tokens" not in self.parameters:
            for one in [prompt] if isinstance(prompt[0], int) else prompt:
                if isinstance(one, list) and len(one) > max_model_len:
                    raise context_exceeded("prompt", max_model_len, f"has {len(one)} tokens")
        if any(name in self.parameters for name in _LOGPROBS):
            self._check_logprobs(max_model_len)

    def _check_logprobs(self, max_model_len: int) -> None:
        asked = self.parameters
        chat = self.prompt_name == "messages"
        # In chats the number of alternatives has a name of its own.
        name = "top_logprobs" if chat and asked.get("top_logprobs") else "logprobs"
        alternatives = 0
        if asked.get("logprobs") not in (None, False):
            alternatives = 1 + asked.get("top_logprobs" if chat else "logprobs", 0)
        of_prompt = max(asked["prompt_logprobs"] + 1 if "prompt_logprobs" in asked else 0, alternatives if asked.get("echo") else 0)
        if not alternatives and not of_prompt:
            return
        prompt_tokens, completion_tokens = estimate(asked, self.prompts, max_model_len)
        # Each choice of a completion repeats those of its prompt.
        copies = 1 if chat else asked.get("n", 1)
        total = prompt_tokens * of_prompt * copies + (0 if self.stream else completion_tokens * alternatives)
        if total > MAX_ALTERNATIVES:
            blamed = name if alternatives else "prompt_logprobs"
            raise InvalidRequest(
                f"The request asks for up to {total} log probabilities in one answer, and at most {MAX_ALTERNATIVES} are allowed. "
                f"Use a smaller '{blamed}', 'n' or 'max_tokens', or send fewer prompts.",
                code="out_of_range",
                param=blamed,
            )


def context_exceeded(param: str, max_model_len: int, found: str) -> InvalidRequest:
    """Return the error for a prompt that is too long. It begins as OpenAI's does, because clients look for these words."""
    message = f"This model's maximum context length is {max_model_len} tokens. However, your prompt {found}. Please shorten it."
    return InvalidRequest(message, code="context_length_exceeded", param=param)


def read_chat(body: dict[str, Any]) -> EngineRequest:
    """Read a `/v1/chat/completions` request. Raises InvalidRequest with the parameter to blame."""
    return _read(body, Endpoint.CHAT, "messages")


def read_completion(body: dict[str, Any]) -> EngineRequest:
    """Read a `/v1/completions` request. Raises InvalidRequest with the parameter to blame."""
    return _read(body, Endpoint.COMPLETION, "prompt")


def _read(body: dict[str, Any], endpoint: Endpoint, required: str) -> EngineRequest:
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequest(
            "'model' must be the name of a model. GET /v1/models lists the names.", code="missing_parameter", param="model"
        )
    table = BY_NAME[endpoint]
    given: dict[str, Any] = {}
    for name, value in body.items():
        # OpenAI's clients may send null for "not given".
        if value is None or name == "model":
            continue
        parameter = table.get(name)
        if parameter is None:
            raise unsupported(name)
        if parameter.treatment is Treatment.REFUSED:
            if not _is_neutral(parameter, value):
                raise unsupported(name, parameter.rule)
            continue
        read = parameter.read(name, value)
        if parameter.treatment is Treatment.FORWARDED and read is not None:
            given[name] = read
    if required not in given:
        raise InvalidRequest(f"'{required}' is required. Add it to the request.", code="missing_parameter", param=required)
    legacy = _translate_functions(given)
    tools_as_sent = settle_tools(given, legacy=legacy)
    _settle_formats(given)
    _settle_prompt(given)
    _settle_limits(given)
    _settle_logprobs(given)
    own = {name: given.pop(name, None) for name in _GATEWAYS_OWN}
    n = _settle_choices(given, own["best_of"])
    stream, options = bool(own["stream"]), own["stream_options"] or {}
    if not stream and (options.get("include_usage") or options.get("continuous_usage_stats")):
        raise InvalidRequest("'stream_options' needs 'stream': true.", param="stream_options")
    if stream and given.get("prompt_logprobs"):
        raise InvalidRequest("'prompt_logprobs' is not available in a stream. Send the request without 'stream'.", param="prompt_logprobs")
    prompts = count_prompts(given.get("prompt"))
    return EngineRequest(
        model=model,
        stream=stream,
        include_usage=bool(options.get("include_usage")),
        continuous_usage=bool(options.get("include_usage") and options.get("continuous_usage_stats")),
        weight=prompts * n,
        prompts=prompts,
        service_tier=own["service_tier"] or "default",
        parameters=given,
        legacy_functions=legacy,
        tools_as_sent=tools_as_sent,
    )


def _is_neutral(parameter: Parameter, value: Any) -> bool:
    # True equals 1 in Python, and is another value in JSON.
    return any(value == neutral and type(value) is type(neutral) for neutral in parameter.neutral)


def _translate_functions(given: dict[str, Any]) -> bool:
    """Turn the deprecated `functions` and `function_call` into tools and a choice, in place. Returns whether the request uses them."""
    functions, call = given.pop("functions", None), given.pop("function_call", None)
    if functions is None and call is None:
        return False
    if "tools" in given or "tool_choice" in given:
        name = "functions" if functions is not None else "function_call"
        raise InvalidRequest(f"'{name}' cannot be used together with 'tools' and 'tool_choice'. Remove '{name}'.", param=name)
    given |= {"tools": functions, "tool_choice": call}
    return True


def _settle_formats(given: dict[str, Any]) -> None:
    """Bring `guided_*` to `structured_outputs`, and see that a request has one constraint at most, in place."""
    names: list[str] = [
        name for name in ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar") if name in given
    ]
    if not names:
        return
    if given.get("response_format", {}).get("type", "text") != "text":
        names.insert(0, "response_format")
    if len(names) > 1:
        raise InvalidRequest(f"{' and '.join(repr(name) for name in names)} cannot be used together. Send one of them.", param=names[-1])
    if isinstance(given.get("tool_choice"), dict):
        raise InvalidRequest(f"'{names[0]}' and a 'tool_choice' of one function cannot be used together. Send one of them.", param=names[0])
    given["structured_outputs"] = given.pop(names[0])


def _settle_prompt(given: dict[str, Any]) -> None:
    if given.get("continue_final_message"):
        last = given["messages"][-1]
        if not last["content"] or last.get("tool_calls"):
            raise InvalidRequest("'continue_final_message' needs text in the last message.", param="continue_final_message")
        if given.get("add_generation_prompt"):
            raise InvalidRequest(
                "'continue_final_message' and 'add_generation_prompt' cannot both be true. Set one to false.",
                param="continue_final_message",
            )
        given["add_generation_prompt"] = False
    if given.get("truncate_prompt_tokens") == 0:
        raise out_of_range("truncate_prompt_tokens", "-1, or at least 1")
    if "truncate_prompt_tokens" in given:
        # vLLM's default, given by name: only then does it bound the text before it reads it.
        given.setdefault("truncation_side", "left")
    else:
        given.pop("truncation_side", None)


def _settle_limits(given: dict[str, Any]) -> None:
    limit = given.get("max_completion_tokens", given.get("max_tokens"))
    if limit == 0 and not given.get("echo"):
        raise out_of_range("max_tokens", "at least 1, or 0 together with 'echo'")
    if limit is not None and given.get("min_tokens", 0) > limit:
        raise out_of_range("min_tokens", "at most max_tokens")


def _settle_logprobs(given: dict[str, Any]) -> None:
    if given.get("top_logprobs") and not given.get("logprobs"):
        raise InvalidRequest("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")


def _settle_choices(given: dict[str, Any], best_of: int | None) -> int:
    n: int = given.get("n", 1)
    if best_of is not None and best_of not in (1, n):
        raise out_of_range("best_of", f"1, or the same as 'n', which is {n}: there is no selection among more answers")
    if best_of == 1 and n > 1:
        raise out_of_range("best_of", f"at least 'n', which is {n}")
    if n > 1 and given.get("temperature", 1) < GREEDY:
        # vLLM refuses several greedy answers. Sampling among the one most likely token gives the same answer n times.
        given |= {"temperature": 1, "top_k": 1}
    return n
