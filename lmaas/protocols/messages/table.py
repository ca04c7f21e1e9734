"""The parameters of `POST /v1/messages` and of its `count_tokens`."""

from typing import Any

from lmaas.protocols.messages.blocks import system_text
from lmaas.protocols.messages.conversation import MAX_MESSAGES, read_conversation
from lmaas.protocols.messages.tools import MAX_TOOLS, read_tool_choice, read_tools
from lmaas.protocols.parameters import checks
from lmaas.protocols.parameters.checks import boolean, integer, number, one_of, without_nulls, wrong_type
from lmaas.protocols.parameters.formats import read_response_format
from lmaas.protocols.parameters.table import MAX_TOKENS, Table, accepted, forwarded, refused

#: The levels of `output_config.effort`.
EFFORTS = ("low", "medium", "high", "xhigh", "max")
#: The kinds of `thinking`, and whether the model thinks.
THINKING_KINDS = {"enabled": True, "adaptive": True, "between_tools": True, "disabled": False}
_DISPLAYS = ("summarized", "omitted", "updates")


def read_thinking(name: str, value: Any) -> tuple[bool, bool]:
    """Return whether the model shall think, and whether the client wants to see its thoughts."""
    given = without_nulls(value) if isinstance(value, dict) else {}
    kind = given.get("type")
    if not isinstance(kind, str) or kind not in THINKING_KINDS:
        raise wrong_type(name, f"an object whose type is one of: {', '.join(THINKING_KINDS)}")
    if "budget_tokens" in given:
        integer(1, MAX_TOKENS)(f"{name}.budget_tokens", given["budget_tokens"])
    if "display" in given:
        one_of(*_DISPLAYS)(f"{name}.display", given["display"])
    return THINKING_KINDS[kind], THINKING_KINDS[kind] and given.get("display") != "omitted"


def read_output_config(name: str, value: Any) -> dict[str, Any]:
    """Return the engine's parameters for `effort` and `format`. A `task_budget`, which is a hint, has no effect."""
    if not isinstance(value, dict):
        raise wrong_type(name, "an object")
    given = without_nulls(value)
    found: dict[str, Any] = {}
    if "effort" in given:
        found["reasoning_effort"] = one_of(*EFFORTS)(f"{name}.effort", given["effort"])
    if "format" in given:
        found["response_format"] = read_output_format(f"{name}.format", given["format"])
    return found


def read_output_format(name: str, value: Any) -> dict[str, Any]:
    """Return the engine's parameter for a format."""
    given = without_nulls(value) if isinstance(value, dict) else {}
    if given.get("type") != "json_schema":
        raise wrong_type(name, "an object whose type is 'json_schema', with a 'schema'")
    found: dict[str, Any] = read_response_format(name, {"type": "json_schema", "json_schema": {"schema": given.get("schema", {})}})
    return found


def read_stop_sequences(name: str, value: Any) -> list[str]:
    """Return the stop sequences."""
    if not isinstance(value, list):
        raise wrong_type(name, "a list of strings")
    found: list[str] = checks.stop(name, value)
    return found


def read_speed(name: str, value: Any) -> Any:
    """Read `speed`."""
    return one_of("standard", "fast")(name, value)


def read_metadata(name: str, value: Any) -> Any:
    """Read `metadata`."""
    if not isinstance(value, dict):
        raise wrong_type(name, "an object")
    return value


_PROMPT = (
    forwarded("messages", f"1 to {MAX_MESSAGES:,} messages of text, tool calls and their results", read_conversation),
    forwarded("system", "a string or a list of text blocks", system_text),
    forwarded("tools", f"at most {MAX_TOOLS:,} tools with an `input_schema`; server tools are refused", read_tools),
    forwarded("tool_choice", "auto, any, tool or none; `disable_parallel_tool_use`", read_tool_choice),
    forwarded(
        "thinking",
        f"{', '.join(THINKING_KINDS)}; without it a model does not think, or its thoughts are not shown. `budget_tokens` has no effect",
        read_thinking,
    ),
    forwarded(
        "output_config", f"`effort` ({', '.join(EFFORTS)}) and `format`, a JSON schema; `task_budget` has no effect", read_output_config
    ),
    forwarded("output_format", "the older place of `output_config.format`", read_output_format),
    accepted("cache_control", "prompts are cached by their content"),
    accepted("context_management", "the conversation is used as it was sent"),
    accepted("speed", "there is one speed", read_speed),
    accepted("user_profile_id", "for the client's own use"),
    accepted("workspace_id", "a key belongs to one tenant"),
    accepted("betas", "nothing here depends on them"),
    accepted("anthropic_beta", "nothing here depends on them"),
    accepted("anthropic_version", "there is one version"),
    refused("mcp_servers", "the service calls no other servers", []),
    refused("container", "there are no containers"),
    # With this code, the tool loops of Anthropic's libraries send the whole conversation instead.
    refused("thread", "conversations are not stored", code="thread_unsupported_request"),
    refused("compaction", "conversations are not summarised"),
    refused("billing_policy", "the tenant of the key is charged"),
)

MESSAGES = Table(
    "messages",
    "/v1/messages",
    required=("max_tokens", "messages"),
    parameters=(
        *_PROMPT,
        forwarded("max_tokens", f"1 to {MAX_TOKENS:,}; more than the model's context counts as its context", integer(1, MAX_TOKENS)),
        forwarded(
            "stop_sequences",
            f"at most {checks.MAX_STOP_STRINGS} strings of at most {checks.MAX_STOP_LENGTH:,} characters",
            read_stop_sequences,
        ),
        forwarded("stream", "true or false", boolean),
        forwarded("temperature", "0 to 2", number(0, 2)),
        forwarded("top_p", "0 to 1", checks.top_p),
        forwarded("top_k", "0 (off) to 1,000,000", integer(-1, 1_000_000)),
        accepted("metadata", "for the client's own use", read_metadata),
        accepted("service_tier", "auto or standard_only, which are the same", one_of("auto", "standard_only")),
        accepted("diagnostics", "the service reports no reasons of cache misses"),
        accepted("fallbacks", "nothing is passed on to another model"),
        accepted("fallback_credit_token", "nothing is passed on to another model"),
        refused("inference_geo", "the place of inference cannot be chosen", "global", "not_available"),
    ),
)

COUNT_TOKENS = Table("count_tokens", "/v1/messages/count_tokens", required=("messages",), parameters=_PROMPT)
