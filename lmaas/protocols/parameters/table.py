"""The table of all request parameters. docs/parameters.md is generated from it."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from lmaas.admission.tiers import SERVICE_TIERS
from lmaas.protocols.parameters import checks
from lmaas.protocols.parameters.checks import Reader, boolean, integer, number
from lmaas.protocols.parameters.formats import guided, read_response_format, read_structured_outputs
from lmaas.protocols.parameters.messages import MAX_MESSAGES, read_messages
from lmaas.protocols.parameters.prompts import MAX_PROMPTS, read_prompt
from lmaas.protocols.parameters.tools import MAX_TOOLS, read_function_call, read_functions, read_tool_choice, read_tools

MAX_CHOICES = 128
MAX_TOKENS = 1_000_000
#: vLLM's default limit of alternatives per token.
MAX_LOGPROBS = 20


class Endpoint(StrEnum):
    """The endpoints whose parameters the table describes."""

    CHAT = "chat completions"
    COMPLETION = "completions"


class Treatment(StrEnum):
    """The treatment of a parameter."""

    FORWARDED = "forwarded"
    ACCEPTED = "accepted"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter: what happens to it, and its rule or the reason in words.

    `read` checks a value that is forwarded or accepted. A refused parameter may have `neutral` values, which ask for nothing and are
    accepted.
    """

    name: str
    treatment: Treatment
    rule: str
    read: Reader = checks.anything
    endpoints: tuple[Endpoint, ...] = (Endpoint.CHAT, Endpoint.COMPLETION)
    neutral: tuple[Any, ...] = ()


def _forwarded(name: str, rule: str, read: Reader, *endpoints: Endpoint) -> Parameter:
    return Parameter(name, Treatment.FORWARDED, rule, read, endpoints or tuple(Endpoint))


def _accepted(name: str, rule: str, read: Reader = checks.anything) -> Parameter:
    return Parameter(name, Treatment.ACCEPTED, rule, read)


def _refused(name: str, rule: str, *neutral: Any, endpoints: tuple[Endpoint, ...] = tuple(Endpoint)) -> Parameter:
    return Parameter(name, Treatment.REFUSED, rule, endpoints=endpoints, neutral=neutral)


_CHAT, _COMPLETION = Endpoint.CHAT, Endpoint.COMPLETION
_LIMIT = f"1 to {MAX_TOKENS:,}, and at most the model's context"
_AFFECTS_OTHERS = "it can change the answers to other requests of the engine"
_OURS = "the service decides it"
_MEDIA = "the models here read and write text only"

PARAMETERS = (
    # The prompt.
    _forwarded("messages", f"1 to {MAX_MESSAGES:,} messages of text", read_messages, _CHAT),
    _forwarded("prompt", f"text or token ids, at most {MAX_PROMPTS} prompts", read_prompt, _COMPLETION),
    _forwarded("add_generation_prompt", "true or false", boolean, _CHAT),
    _forwarded("continue_final_message", "true or false; the last message must have text", boolean, _CHAT),
    _forwarded("chat_template_kwargs", f"an object with any of {', '.join(checks.TEMPLATE_KEYS)}", checks.chat_template_kwargs, _CHAT),
    _forwarded(
        "reasoning_effort",
        f"{', '.join(checks.REASONING_EFFORTS)}; no effect on a model that does not reason",
        checks.one_of(*checks.REASONING_EFFORTS),
        _CHAT,
    ),
    _forwarded("include_reasoning", "true or false", boolean, _CHAT),
    _forwarded("add_special_tokens", "true or false", boolean),
    _forwarded("truncate_prompt_tokens", "-1 (to the context), or 1 up to the context", integer(-1, MAX_TOKENS)),
    _forwarded(
        "truncation_side", "left (the default: keeps the end) or right; needs truncate_prompt_tokens", checks.one_of("left", "right")
    ),
    _forwarded("echo", "true or false; with max_tokens 0 the answer is the prompt", boolean, _COMPLETION),
    # Tools and formats.
    _forwarded("tools", f"at most {MAX_TOOLS} functions; an empty list means none", read_tools, _CHAT),
    _forwarded(
        "tool_choice",
        "none, auto, required, a function, or allowed_tools; required calls follow the tool's schema",
        read_tool_choice,
        _CHAT,
    ),
    _forwarded("parallel_tool_calls", "true or false", boolean, _CHAT),
    _forwarded("functions", "deprecated: translated to tools, and the answer back to function_call", read_functions, _CHAT),
    _forwarded("function_call", "deprecated: translated to tool_choice", read_function_call, _CHAT),
    _forwarded("response_format", "text, json_object, json_schema or structural_tag", read_response_format),
    _forwarded(
        "structured_outputs",
        "one of json, regex, choice, grammar, json_object, structural_tag; disable_any_whitespace, disable_additional_properties",
        read_structured_outputs,
    ),
    *(
        _forwarded(f"guided_{name}", f"the older name of structured_outputs.{name}", guided(name))
        for name in ("json", "regex", "choice", "grammar")
    ),
    # Sampling.
    _forwarded("temperature", "0 to 2", number(0, 2)),
    _forwarded("top_p", "0 to 1", checks.top_p),
    _forwarded("top_k", "-1 or 0 (off) to 1,000,000", integer(-1, 1_000_000)),
    _forwarded("min_p", "0 to 1", number(0, 1)),
    _forwarded("presence_penalty", "-2 to 2", number(-2, 2)),
    _forwarded("frequency_penalty", "-2 to 2", number(-2, 2)),
    _forwarded("repetition_penalty", "0.01 to 10", number(0.01, 10)),
    _forwarded("logit_bias", f"at most {checks.MAX_BIASED_TOKENS:,} token ids, each -100 to 100", checks.logit_bias),
    _forwarded("seed", "a 64-bit integer", integer(-(2**63), 2**63 - 1)),
    _forwarded("n", f"1 to {MAX_CHOICES}", integer(1, MAX_CHOICES)),
    _forwarded("best_of", "1, or the same as n", integer(1, MAX_CHOICES)),
    # Length and end.
    _forwarded("max_tokens", _LIMIT + "; deprecated in OpenAI's API", integer(1, MAX_TOKENS), _CHAT),
    _forwarded("max_completion_tokens", _LIMIT, integer(1, MAX_TOKENS), _CHAT),
    _forwarded("max_tokens", _LIMIT + "; 0 with echo", integer(0, MAX_TOKENS), _COMPLETION),
    _forwarded("min_tokens", "0 up to max_tokens", integer(0, MAX_TOKENS)),
    _forwarded("stop", f"at most {checks.MAX_STOP_STRINGS} strings of at most {checks.MAX_STOP_LENGTH:,} characters", checks.stop),
    _forwarded("stop_token_ids", f"at most {checks.MAX_STOP_TOKENS} token ids", checks.token_ids),
    _forwarded("include_stop_str_in_output", "true or false", boolean),
    _forwarded("ignore_eos", "true or false", boolean),
    # The form of the answer.
    _forwarded("logprobs", "true or false", checks.chat_logprobs, _CHAT),
    _forwarded("top_logprobs", f"0 to {MAX_LOGPROBS}; needs logprobs", integer(0, MAX_LOGPROBS), _CHAT),
    _forwarded("logprobs", f"0 to {MAX_LOGPROBS}; with echo also of the prompt", checks.completion_logprobs, _COMPLETION),
    _forwarded("prompt_logprobs", f"0 to {MAX_LOGPROBS}; not in a stream", integer(0, MAX_LOGPROBS)),
    _forwarded("return_token_ids", "true or false", boolean),
    _forwarded("return_tokens_as_token_ids", "true or false", boolean),
    _forwarded("skip_special_tokens", "true or false", boolean),
    _forwarded("spaces_between_special_tokens", "true or false", boolean),
    _forwarded("stream", "true or false", boolean),
    _forwarded(
        "stream_options", "include_usage, continuous_usage_stats and include_obfuscation (no effect); needs stream", checks.stream_options
    ),
    _forwarded("service_tier", f"{', '.join(SERVICE_TIERS)}; the answer names the tier that was used", checks.service_tier),
    # No effect.
    _accepted("user", "for the client's own use"),
    _accepted("metadata", "for the client's own use"),
    _accepted("safety_identifier", "for the client's own use"),
    _accepted("session_id", "for the client's own use"),
    _accepted("store", "answers are not stored"),
    _accepted("modalities", 'only ["text"], which is what the models produce', checks.modalities),
    _accepted("prediction", "an optimisation, which does not change the answer"),
    _accepted("prompt_cache_key", "prompts are cached by their content"),
    _accepted("prompt_cache_retention", "prompts are cached by their content"),
    _accepted("verbosity", "a hint, which the models do not know"),
    _accepted("stream_interval", "streams are sent as they are made"),
    # Refused.
    _refused("audio", _MEDIA),
    _refused("web_search_options", "there is no web search"),
    _refused("suffix", "the models do not fill in the middle", "", endpoints=(_COMPLETION,)),
    _refused("echo", "it is offered for completions", False, endpoints=(_CHAT,)),
    _refused("use_beam_search", "there is no beam search", False),
    _refused("length_penalty", "there is no beam search", 1, 1.0),
    _refused("early_stopping", "there is no beam search", False),
    _refused("detokenize", "answers are text; return_token_ids adds the ids", True),
    _refused("allowed_token_ids", _AFFECTS_OTHERS),
    _refused("bad_words", _AFFECTS_OTHERS, []),
    _refused("logits_processors", _AFFECTS_OTHERS, []),
    _refused("logprob_token_ids", _AFFECTS_OTHERS, []),
    _refused("thinking_token_budget", _AFFECTS_OTHERS, -1),
    _refused("repetition_detection", _AFFECTS_OTHERS),
    _refused("vllm_xargs", _AFFECTS_OTHERS, {}),
    _refused("cache_salt", _OURS),
    _refused("priority", "it is " + "the service's; use service_tier", 0),
    _refused("request_id", "the service makes the id, which the answer has in x-request-id"),
    _refused("lora_request", "the model's name chooses the adapter"),
    _refused("kv_transfer_params", _OURS, {}),
    _refused("ec_transfer_params", _OURS, {}),
    _refused("guided_decoding_backend", _OURS, "auto", "xgrammar"),
    _refused("guided_whitespace_pattern", _OURS),
    _refused("watermarking", _OURS, False),
    _refused("chat_template", "the model has its own", endpoints=(_CHAT,)),
    _refused("documents", "put them into the messages", [], endpoints=(_CHAT,)),
    _refused("prompt_embeds", _MEDIA, []),
    _refused("mm_processor_kwargs", _MEDIA, {}),
    _refused("media_io_kwargs", _MEDIA, {}),
    _refused("mm_payload", _MEDIA, "none"),
    _refused("return_mm_kwargs", _MEDIA, False),
    _refused("routed_experts_prompt_start", "routing data is not returned", 0),
    _refused("return_token_offsets", "offsets are not returned", False),
    _refused("return_prompt_text", "the rendered prompt is not returned", False),
)

BY_NAME = {endpoint: {item.name: item for item in PARAMETERS if endpoint in item.endpoints} for endpoint in Endpoint}
