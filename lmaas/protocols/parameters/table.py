"""The machinery of tables of request parameters, and the tables of chat completions and completions.

Each protocol has a table, from which its requests are read (`reading.py`), docs/reference/parameters.md is generated, and the
OpenAPI document follows. To add the table of a protocol:

1. Write `TABLE = Table("embeddings", "/v1/embeddings", required=("input",), parameters=(...))` in a module of the protocol, from rows that
   `forwarded`, `accepted` and `refused` make. `model` has no row: every protocol has it.
2. Read requests with `read_model(body)` and `read_parameters(TABLE, body)` of `reading.py`.
3. Add the table to `GROUPS` in `documentation.py`, together with those that share most of its rows, and write the page anew.
"""

import functools
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


class Treatment(StrEnum):
    """The treatment of a parameter."""

    #: Checked, and then sent to the engine or applied by the service.
    FORWARDED = "forwarded"
    #: Checked if the row has a reader, and then left out.
    ACCEPTED = "accepted"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter: its treatment, and its rule or the reason in words.

    `read` checks a value that is forwarded or accepted. A refused parameter may have `neutral` values, which have no effect and are
    accepted. `code` is that of the refusal.
    """

    name: str
    treatment: Treatment
    rule: str
    read: Reader = checks.anything
    neutral: tuple[Any, ...] = ()
    code: str = checks.UNSUPPORTED


@dataclass(frozen=True)
class Table:
    """The parameters of one endpoint, except `model`, which every endpoint has. Those in `required` must be given."""

    #: The endpoint in words, such as "chat completions".
    name: str
    path: str
    required: tuple[str, ...]
    parameters: tuple[Parameter, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Parameter]:
        """The rows by the parameters' names."""
        return {item.name: item for item in self.parameters}


def forwarded(name: str, rule: str, read: Reader) -> Parameter:
    """Return the row of a parameter that has an effect. The rule describes the allowed values."""
    return Parameter(name, Treatment.FORWARDED, rule, read)


def accepted(name: str, rule: str, read: Reader = checks.anything) -> Parameter:
    """Return the row of a parameter that has no effect. The rule gives the reason why ignoring it does not mislead."""
    return Parameter(name, Treatment.ACCEPTED, rule, read)


def refused(name: str, rule: str, *neutral: Any, code: str = checks.UNSUPPORTED) -> Parameter:
    """Return the row of a parameter that is refused unless its value is `neutral`. The rule gives the reason."""
    return Parameter(name, Treatment.REFUSED, rule, neutral=neutral, code=code)


_LIMIT = f"1 to {MAX_TOKENS:,}, and at most the model's context"
_AFFECTS_OTHERS = "it can change the answers to other requests of the engine"
_OURS = "the service decides it"
_MEDIA = "the models here read and write text only"

_CHAT_ONLY = (
    # The prompt.
    forwarded("messages", f"1 to {MAX_MESSAGES:,} messages of text", read_messages),
    forwarded("add_generation_prompt", "true or false", boolean),
    forwarded("continue_final_message", "true or false; the last message must have text", boolean),
    forwarded("chat_template_kwargs", f"an object with any of {', '.join(checks.TEMPLATE_KEYS)}", checks.chat_template_kwargs),
    forwarded(
        "reasoning_effort",
        f"{', '.join(checks.REASONING_EFFORTS)}; no effect on a model that does not reason",
        checks.one_of(*checks.REASONING_EFFORTS),
    ),
    forwarded("include_reasoning", "true or false", boolean),
    # Tools and formats.
    forwarded("tools", f"at most {MAX_TOOLS} functions; an empty list means none", read_tools),
    forwarded(
        "tool_choice",
        "none, auto, required, a function, or allowed_tools; required calls follow the tool's schema",
        read_tool_choice,
    ),
    forwarded("parallel_tool_calls", "true or false", boolean),
    forwarded("functions", "deprecated: translated to tools, and the answer back to function_call", read_functions),
    forwarded("function_call", "deprecated: translated to tool_choice", read_function_call),
    # Length and end.
    forwarded("max_tokens", _LIMIT + "; deprecated in OpenAI's API", integer(1, MAX_TOKENS)),
    forwarded("max_completion_tokens", _LIMIT, integer(1, MAX_TOKENS)),
    # The form of the answer.
    forwarded("logprobs", "true or false", checks.chat_logprobs),
    forwarded("top_logprobs", f"0 to {MAX_LOGPROBS}; needs logprobs", integer(0, MAX_LOGPROBS)),
    # No effect.
    accepted("prompt_cache_options", "prompts are cached by their content"),
    # Refused.
    refused("echo", "it is offered for completions", False),
    refused("chat_template", "the model has its own"),
    refused("documents", "put them into the messages", []),
    refused("moderation", "there is no moderation"),
)

_COMPLETION_ONLY = (
    # The prompt.
    forwarded("prompt", f"text or token ids, at most {MAX_PROMPTS} prompts", read_prompt),
    forwarded("echo", "true or false; with max_tokens 0 the answer is the prompt", boolean),
    # Length and end.
    forwarded("max_tokens", _LIMIT + "; 0 with echo", integer(0, MAX_TOKENS)),
    # The form of the answer.
    forwarded("logprobs", f"0 to {MAX_LOGPROBS}; with echo also of the prompt", checks.completion_logprobs),
    # Refused.
    refused("suffix", "the models do not fill in the middle", ""),
)

_BOTH = (
    # The prompt.
    forwarded("add_special_tokens", "true or false", boolean),
    forwarded("truncate_prompt_tokens", "-1 (to the context), or 1 up to the context", integer(-1, MAX_TOKENS)),
    forwarded(
        "truncation_side", "left (the default: keeps the end) or right; needs truncate_prompt_tokens", checks.one_of("left", "right")
    ),
    # Tools and formats.
    forwarded("response_format", "text, json_object, json_schema or structural_tag", read_response_format),
    forwarded(
        "structured_outputs",
        "one of json, regex, choice, grammar, json_object, structural_tag; disable_any_whitespace, disable_additional_properties",
        read_structured_outputs,
    ),
    *(
        forwarded(f"guided_{name}", f"the older name of structured_outputs.{name}", guided(name))
        for name in ("json", "regex", "choice", "grammar")
    ),
    # Sampling.
    forwarded("temperature", "0 to 2", number(0, 2)),
    forwarded("top_p", "0 to 1", checks.top_p),
    forwarded("top_k", "-1 or 0 (off) to 1,000,000", integer(-1, 1_000_000)),
    forwarded("min_p", "0 to 1", number(0, 1)),
    forwarded("presence_penalty", "-2 to 2", number(-2, 2)),
    forwarded("frequency_penalty", "-2 to 2", number(-2, 2)),
    forwarded("repetition_penalty", "0.01 to 10", number(0.01, 10)),
    forwarded("logit_bias", f"at most {checks.MAX_BIASED_TOKENS:,} token ids, each -100 to 100", checks.logit_bias),
    forwarded("seed", "a 64-bit integer", integer(-(2**63), 2**63 - 1)),
    forwarded("n", f"1 to {MAX_CHOICES}", integer(1, MAX_CHOICES)),
    forwarded("best_of", "1, or the same as n", integer(1, MAX_CHOICES)),
    # Length and end.
    forwarded("min_tokens", "0 up to max_tokens", integer(0, MAX_TOKENS)),
    forwarded("stop", f"at most {checks.MAX_STOP_STRINGS} strings of at most {checks.MAX_STOP_LENGTH:,} characters", checks.stop),
    forwarded("stop_token_ids", f"at most {checks.MAX_STOP_TOKENS} token ids", checks.token_ids),
    forwarded("include_stop_str_in_output", "true or false", boolean),
    forwarded("ignore_eos", "true or false", boolean),
    # The form of the answer.
    forwarded("prompt_logprobs", f"0 to {MAX_LOGPROBS}; not in a stream", integer(0, MAX_LOGPROBS)),
    forwarded("return_token_ids", "true or false", boolean),
    forwarded("return_tokens_as_token_ids", "true or false", boolean),
    forwarded("skip_special_tokens", "true or false", boolean),
    forwarded("spaces_between_special_tokens", "true or false", boolean),
    forwarded("stream", "true or false", boolean),
    forwarded(
        "stream_options", "include_usage, continuous_usage_stats and include_obfuscation (no effect); needs stream", checks.stream_options
    ),
    forwarded("service_tier", f"{', '.join(SERVICE_TIERS)}; the answer names the tier that was used", checks.service_tier),
    # No effect.
    accepted("user", "for the client's own use"),
    accepted("metadata", "for the client's own use"),
    accepted("safety_identifier", "for the client's own use"),
    accepted("session_id", "for the client's own use"),
    accepted("store", "answers are not stored"),
    accepted("modalities", 'only ["text"], which is what the models produce', checks.modalities),
    accepted("prediction", "an optimisation, which does not change the answer"),
    accepted("prompt_cache_key", "prompts are cached by their content"),
    accepted("prompt_cache_retention", "prompts are cached by their content"),
    accepted("verbosity", "a hint, which the models do not know"),
    accepted("stream_interval", "streams are sent as they are made"),
    # Refused.
    refused("audio", _MEDIA),
    refused("web_search_options", "there is no web search"),
    refused("use_beam_search", "there is no beam search", False),
    refused("length_penalty", "there is no beam search", 1, 1.0),
    refused("early_stopping", "there is no beam search", False),
    refused("detokenize", "answers are text; return_token_ids adds the ids", True),
    refused("allowed_token_ids", _AFFECTS_OTHERS),
    refused("bad_words", _AFFECTS_OTHERS, []),
    refused("logits_processors", _AFFECTS_OTHERS, []),
    refused("logprob_token_ids", _AFFECTS_OTHERS, []),
    refused("thinking_token_budget", _AFFECTS_OTHERS, -1),
    refused("repetition_detection", _AFFECTS_OTHERS),
    refused("vllm_xargs", _AFFECTS_OTHERS, {}),
    refused("cache_salt", _OURS),
    refused("priority", "it is " + "the service's; use service_tier", 0),
    refused("request_id", "the service makes the id, which the answer has in x-request-id"),
    refused("lora_request", "the model's name chooses the adapter"),
    refused("kv_transfer_params", _OURS, {}),
    refused("ec_transfer_params", _OURS, {}),
    refused("guided_decoding_backend", _OURS, "auto", "xgrammar"),
    refused("guided_whitespace_pattern", _OURS),
    refused("watermarking", _OURS, False),
    refused("prompt_embeds", _MEDIA, []),
    refused("mm_processor_kwargs", _MEDIA, {}),
    refused("media_io_kwargs", _MEDIA, {}),
    refused("mm_payload", _MEDIA, "none"),
    refused("return_mm_kwargs", _MEDIA, False),
    refused("routed_experts_prompt_start", "routing data is not returned", 0),
    refused("return_token_offsets", "offsets are not returned", False),
    refused("return_prompt_text", "the rendered prompt is not returned", False),
)

CHAT = Table("chat completions", "/v1/chat/completions", ("messages",), (*_CHAT_ONLY, *_BOTH))
COMPLETION = Table("completions", "/v1/completions", ("prompt",), (*_COMPLETION_ONLY, *_BOTH))
