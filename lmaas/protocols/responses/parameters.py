"""The table of the parameters of `/v1/responses`, and the readers of those that only this API has."""

from typing import Any

from lmaas.admission.tiers import SERVICE_TIERS
from lmaas.protocols.parameters import checks
from lmaas.protocols.parameters.checks import boolean, integer, one_of, unsupported, without_nulls, wrong_type
from lmaas.protocols.parameters.formats import read_response_format
from lmaas.protocols.parameters.table import CHAT, MAX_LOGPROBS, MAX_TOKENS, Table, accepted, forwarded, refused
from lmaas.protocols.parameters.tools import MAX_TOOLS
from lmaas.protocols.responses.items import MAX_ITEMS, read_items
from lmaas.protocols.responses.tools import read_tool_choice, read_tools

MAX_PAIRS, MAX_KEY, MAX_VALUE = 16, 64, 512
LOGPROBS = "message.output_text.logprobs"
#: Further values of `include`: fields of items that the models here never make, and encrypted reasoning, which nothing here encrypts.
_WITHOUT_EFFECT = (
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)
INCLUDABLE = (LOGPROBS, *_WITHOUT_EFFECT)
SUMMARIES = ("auto", "concise", "detailed")
VERBOSITIES = ("low", "medium", "high")
#: OpenAI's two names for one tier.
FAST = "fast"


def text(name: str, value: Any) -> Any:
    """Read a string."""
    if not isinstance(value, str):
        raise wrong_type(name, "a string")
    return value


def identifier(name: str, value: Any) -> Any:
    """Read the id of a stored object."""
    if not isinstance(value, str) or not 0 < len(value) <= 256:
        raise wrong_type(name, "a string of 1 to 256 characters")
    return value


def conversation(name: str, value: Any) -> Any:
    """Read a conversation, given by its id or as an object with its id. Returns the id."""
    return identifier(f"{name}.id" if isinstance(value, dict) else name, value.get("id") if isinstance(value, dict) else value)


def include(name: str, value: Any) -> Any:
    """Read `include`, a list of names of fields."""
    if not isinstance(value, list):
        raise wrong_type(name, "a list of strings")
    for item in value:
        if not isinstance(item, str):
            raise wrong_type(name, "a list of strings")
        if item not in INCLUDABLE:
            raise unsupported(name, f"it may not contain '{item[:100]}', only {', '.join(INCLUDABLE)}")
    return value


def metadata(name: str, value: Any) -> Any:
    """Read `metadata`: pairs of strings of bounded number and length."""
    if not isinstance(value, dict):
        raise wrong_type(name, "an object of strings")
    given = without_nulls(value)
    rule = f"at most {MAX_PAIRS} pairs, with keys of at most {MAX_KEY} characters and values of at most {MAX_VALUE}"
    if not all(isinstance(item, str) for item in given.values()):
        raise wrong_type(name, f"an object of strings with {rule}")
    if len(given) > MAX_PAIRS or any(len(key) > MAX_KEY or len(item) > MAX_VALUE for key, item in given.items()):
        raise checks.out_of_range(name, f"an object of {rule}")
    return given


def reasoning(name: str, value: Any) -> Any:
    """Read `reasoning`. Returns the fields that responses show."""
    if not isinstance(value, dict):
        raise wrong_type(name, "an object")
    given = without_nulls(value)
    found: dict[str, Any] = {"effort": None, "summary": None}
    if "effort" in given:
        found["effort"] = one_of(*checks.REASONING_EFFORTS)(f"{name}.effort", given["effort"])
    for field in ("generate_summary", "summary"):
        if field in given:
            found["summary"] = one_of(*SUMMARIES)(f"{name}.{field}", given[field])
    return found


def text_options(name: str, value: Any) -> Any:
    """Read `text`. Returns the format for the engine and the object that responses show."""
    if not isinstance(value, dict):
        raise wrong_type(name, "an object")
    given = without_nulls(value)
    shown: dict[str, Any] = {"format": {"type": "text"}}
    if "verbosity" in given:
        shown["verbosity"] = one_of(*VERBOSITIES)(f"{name}.verbosity", given["verbosity"])
    if "format" not in given:
        return None, shown
    form = without_nulls(given["format"]) if isinstance(given["format"], dict) else {}
    one_of("text", "json_object", "json_schema")(f"{name}.format.type", form.get("type"))
    if form["type"] == "json_schema":
        inner = form.get("json_schema", {field: form[field] for field in ("name", "description", "schema", "strict") if field in form})
        read = read_response_format(f"{name}.format", {"type": "json_schema", "json_schema": inner})
        described = {"description": None, "strict": False} | read["json_schema"]
        return read, shown | {"format": {"type": "json_schema", **described}}
    read = read_response_format(f"{name}.format", {"type": form["type"]})
    return (None if form["type"] == "text" else read), shown | {"format": read}


def service_tier(name: str, value: Any) -> Any:
    """Read `service_tier`, where `fast` is another name of `priority`."""
    return one_of(*SERVICE_TIERS, FAST)(name, value) if value != FAST else "priority"


#: Parameters of vLLM and of chat completions that are forwarded by the same rules.
AS_IN_CHAT = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "seed",
    "stop",
    "stop_token_ids",
    "min_tokens",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "parallel_tool_calls",
    "chat_template_kwargs",
)
_NO_WINDOWS = "background responses run as soon as possible"
_OTHER_NAME = "it is a parameter of chat completions; use "
_OWN_USE = "for the client's own use"
_BY_CONTENT = "prompts are cached by their content"

TABLE = Table(
    "responses",
    "/v1/responses",
    (),
    (
        # The prompt.
        forwarded(
            "input",
            f"a string or at most {MAX_ITEMS:,} items; required without previous_response_id and conversation",
            read_items,
        ),
        forwarded("instructions", "a string, which comes before everything else; not inherited from the previous response", text),
        forwarded("previous_response_id", "the id of a stored response, whose input and output come before the input", identifier),
        forwarded("conversation", "an id, or an object with an id; not together with previous_response_id", conversation),
        forwarded(
            "truncation",
            "disabled (the default), or auto: the oldest items are left out while the estimate of the prompt exceeds the context",
            one_of("auto", "disabled"),
        ),
        forwarded("reasoning", "effort as reasoning_effort of chat completions; summary and others have no effect", reasoning),
        # Tools and formats.
        forwarded("tools", f"at most {MAX_TOOLS} functions and custom tools, also in namespaces; others are refused by type", read_tools),
        forwarded("tool_choice", "none, auto, required, a function, a custom tool, or allowed_tools", read_tool_choice),
        forwarded("text", "format: text, json_object or json_schema; verbosity has no effect", text_options),
        # Length, and the form of the answer.
        forwarded("max_output_tokens", f"1 to {MAX_TOKENS:,}, and at most the model's context", integer(1, MAX_TOKENS)),
        forwarded("include", f"{LOGPROBS} adds log probabilities; without effect are {', '.join(_WITHOUT_EFFECT)}", include),
        forwarded("top_logprobs", f"0 to {MAX_LOGPROBS}; needs {LOGPROBS} in include", integer(0, MAX_LOGPROBS)),
        forwarded(
            "store", "true (the default) or false: without it a response cannot be retrieved or continued; not with conversation", boolean
        ),
        forwarded("background", "true: the response runs without its client; not with store: false. Or false", boolean),
        forwarded("stream", "true or false", boolean),
        forwarded("stream_options", "include_obfuscation, which has no effect", checks.stream_options),
        forwarded("service_tier", f"{', '.join(SERVICE_TIERS)}, {FAST}; the answer names the tier that was used", service_tier),
        *(CHAT.by_name[name] for name in AS_IN_CHAT),
        # Repeated in the response.
        forwarded("metadata", f"at most {MAX_PAIRS} pairs, keys of {MAX_KEY} characters, values of {MAX_VALUE}; repeated", metadata),
        forwarded("user", f"{_OWN_USE}; repeated", text),
        forwarded("safety_identifier", f"{_OWN_USE}; repeated", text),
        forwarded("prompt_cache_key", f"{_BY_CONTENT}; repeated", text),
        forwarded("prompt_cache_retention", f"{_BY_CONTENT}; repeated", text),
        forwarded("max_tool_calls", "it limits the calls of built-in tools, which there are none of; repeated", integer(1, MAX_TOKENS)),
        # No effect.
        accepted("prompt_cache_options", _BY_CONTENT),
        accepted("client_metadata", _OWN_USE),
        accepted("image", "there are no images"),
        accepted("access_programs", "the models are the same for all"),
        # Refused.
        refused("background_options", _NO_WINDOWS, {}, {"completion_window": "soonest"}),
        refused("prompt", "there are no stored prompts"),
        refused("context_management", "the context is not compacted; use truncation", []),
        refused("moderation", "there is no moderation"),
        refused("n", "a response is one answer", 1),
        refused("messages", f"{_OTHER_NAME}input"),
        refused("max_tokens", f"{_OTHER_NAME}max_output_tokens"),
        refused("max_completion_tokens", f"{_OTHER_NAME}max_output_tokens"),
        refused("response_format", f"{_OTHER_NAME}text.format"),
        refused("reasoning_effort", f"{_OTHER_NAME}reasoning.effort"),
        refused("verbosity", f"{_OTHER_NAME}text.verbosity"),
        refused("logprobs", f"{_OTHER_NAME}include and top_logprobs", False),
    ),
)
