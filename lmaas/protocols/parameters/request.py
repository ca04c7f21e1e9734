"""Reads a request for text (a chat or a completion) by the table of parameters, and builds the request for the engine."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmaas.admission.estimate import estimate
from lmaas.errors import InvalidRequest
from lmaas.inference.request import EngineRequest, context_exceeded
from lmaas.protocols.parameters.checks import out_of_range
from lmaas.protocols.parameters.prompts import count_prompts
from lmaas.protocols.parameters.reading import read_model, read_parameters
from lmaas.protocols.parameters.table import CHAT, COMPLETION, Table
from lmaas.protocols.parameters.tools import settle_tools
from lmaas.store.models import BaseModel

#: The maximum number of log probabilities in one answer, about 100 MB, which the engine collects in memory.
MAX_ALTERNATIVES = 1_000_000
#: Below this temperature vLLM samples greedily.
GREEDY = 1e-5
#: Read by the gateway; an engine does not receive them as they came.
_GATEWAYS_OWN = ("stream", "stream_options", "service_tier", "best_of")
_LOGPROBS = ("logprobs", "top_logprobs", "prompt_logprobs")
#: The client's field for each parameter that an engine's error may blame: the same name, for a client that uses the engine's own.
COMPLETION_NAMES: Mapping[str, str] = {name: name for name in COMPLETION.by_name}
CHAT_NAMES: Mapping[str, str] = {name: name for name in CHAT.by_name} | {"tool_calls": "messages"}
LEGACY_CHAT_NAMES: Mapping[str, str] = {**CHAT_NAMES, "tools": "functions", "tool_choice": "function_call"}


@dataclass(slots=True, kw_only=True)
class TextRequest(EngineRequest):
    """A checked request to generate text. `parameters` has either `messages` or `prompt`.

    `include_usage` and `continuous_usage` are the client's choices for a stream; the engine always sends usage.
    """

    include_usage: bool = False
    continuous_usage: bool = False

    @property
    def is_chat(self) -> bool:
        """True if the prompt is a list of messages."""
        return "messages" in self.parameters

    @property
    def only_echo(self) -> bool:
        """True if the client wants its prompt back and nothing generated."""
        return self.parameters.get("max_tokens") == 0

    @property
    def legacy_functions(self) -> bool:
        """True if the client used the deprecated `functions`, and so expects `function_call` in the answer."""
        return self.names is LEGACY_CHAT_NAMES

    def estimate(self, max_model_len: int) -> tuple[int, int]:
        """Return an estimate of the prompt tokens, and the most completion tokens that all choices together may have."""
        return estimate(self.parameters, self.prompts, max_model_len)

    def check(self, model: BaseModel) -> None:
        """Raise InvalidRequest for what cannot fit into the model's context, as far as that is known without counting tokens, and for
        more log probabilities than an engine should collect for one answer."""
        max_model_len = model.max_model_len
        for name in ("max_completion_tokens", "max_tokens", "truncate_prompt_tokens"):
            if self.parameters.get(name, 0) > max_model_len:
                field = self.clients_name(name) or name
                raise InvalidRequest(
                    f"'{field}' is {self.parameters[name]}, but the context of '{self.model}' has {max_model_len} tokens, prompt included. "
                    "Use a smaller value.",
                    code="out_of_range",
                    param=field,
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
        chat = self.is_chat
        # In chats the number of alternatives has a name of its own.
        name = "top_logprobs" if chat and asked.get("top_logprobs") else "logprobs"
        alternatives = 0
        if asked.get("logprobs") not in (None, False):
            alternatives = 1 + asked.get("top_logprobs" if chat else "logprobs", 0)
        of_prompt = max(asked["prompt_logprobs"] + 1 if "prompt_logprobs" in asked else 0, alternatives if asked.get("echo") else 0)
        if not alternatives and not of_prompt:
            return
        prompt_tokens, completion_tokens = self.estimate(max_model_len)
        # Each choice of a completion repeats those of its prompt.
        copies = 1 if chat else asked.get("n", 1)
        total = prompt_tokens * of_prompt * copies + (0 if self.stream else completion_tokens * alternatives)
        if total > MAX_ALTERNATIVES:
            blamed = name if alternatives else "prompt_logprobs"
            blamed = self.clients_name(blamed) or blamed
            raise InvalidRequest(
                f"The request asks for up to {total} log probabilities in one answer, and at most {MAX_ALTERNATIVES} are allowed. "
                f"Use a smaller '{blamed}', 'n' or 'max_tokens', or send fewer prompts.",
                code="out_of_range",
                param=blamed,
            )


def read_chat(body: dict[str, Any]) -> TextRequest:
    """Read a `/v1/chat/completions` request. Raises InvalidRequest with the parameter to blame."""
    return _read(body, CHAT)


def read_completion(body: dict[str, Any]) -> TextRequest:
    """Read a `/v1/completions` request. Raises InvalidRequest with the parameter to blame."""
    return _read(body, COMPLETION)


def _read(body: dict[str, Any], table: Table) -> TextRequest:
    model = read_model(body)
    given = read_parameters(table, body)
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
    return TextRequest(
        model=model,
        stream=stream,
        include_usage=bool(options.get("include_usage")),
        continuous_usage=bool(options.get("include_usage") and options.get("continuous_usage_stats")),
        weight=prompts * n,
        prompts=prompts,
        service_tier=own["service_tier"] or "default",
        parameters=given,
        names=COMPLETION_NAMES if table is COMPLETION else LEGACY_CHAT_NAMES if legacy else CHAT_NAMES,
        tools_as_sent=tools_as_sent,
    )


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
