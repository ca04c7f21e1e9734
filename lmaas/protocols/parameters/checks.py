"""Readers: functions that check one value of a request and return what the engine receives for it."""

import functools
import math
from collections.abc import Callable
from typing import Any

from lmaas.admission.tiers import SERVICE_TIERS
from lmaas.errors import InvalidRequest

#: Takes a parameter's name and its value, which is never None. Returns the value to forward; raises InvalidRequest.
Reader = Callable[[str, Any], Any]

#: vLLM's own limit (VLLM_MAX_STOP_STRINGS), which is OpenAI's too.
MAX_STOP_STRINGS = 4
MAX_STOP_LENGTH = 1000
MAX_STOP_TOKENS = 64
MAX_BIASED_TOKENS = 1024
#: vLLM takes top_p in (0, 1]; with this value only the most likely token is left, as OpenAI's 0 means.
SMALLEST_TOP_P = 1e-6
#: The values of `reasoning_effort` in OpenAI's API and vLLM's "max".
REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
#: Variables of chat templates that switch a model's thinking or its date. Each template ignores those that it does not use.
TEMPLATE_KEYS = ("clear_thinking", "date_string", "enable_thinking", "preserve_thinking", "reasoning_effort", "thinking", "thinking_budget")


def out_of_range(name: str, rule: str) -> InvalidRequest:
    """Return the error for a value of the right type that is not allowed."""
    return InvalidRequest(f"'{name}' must be {rule}.", code="out_of_range", param=name)


def wrong_type(name: str, rule: str) -> InvalidRequest:
    """Return the error for a value of another type."""
    return InvalidRequest(f"'{name}' must be {rule}.", code="invalid_type", param=name)


UNSUPPORTED = "unsupported_parameter"


def unsupported(name: str, reason: str = "", code: str = UNSUPPORTED) -> InvalidRequest:
    """Return the error for a parameter that is refused by name."""
    shown = name[:100]
    message = f"The parameter '{shown}' is not supported{': ' + reason if reason else ''}."
    return InvalidRequest(f"{message} Remove it from the request.", code=code, param=shown)


def without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    """Return the object without the fields that are null: null means that a field was not given."""
    return {key: item for key, item in value.items() if item is not None}


def number(low: float, high: float) -> Reader:
    """Return a reader for a number between two bounds."""
    # A partial object, whose bounds the OpenAPI document reads, as those of `integer` and `one_of`.
    return functools.partial(read_number, low, high)


def read_number(low: float, high: float, name: str, value: Any) -> Any:
    """Read a number between two bounds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong_type(name, "a number")
    # Also false for NaN, infinity and integers of any size.
    if not low <= value <= high:
        raise out_of_range(name, f"between {low:g} and {high:g}")
    return value


def whole(name: str, value: Any) -> int:
    """Return the value as an integer. Some languages write every number with a decimal point, so 5.0 is 5."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong_type(name, "an integer")
    return value


def integer(low: int, high: int) -> Reader:
    """Return a reader for an integer between two bounds."""
    return functools.partial(read_integer, low, high)


def read_integer(low: int, high: int, name: str, value: Any) -> int:
    """Read an integer between two bounds."""
    found = whole(name, value)
    if not low <= found <= high:
        raise out_of_range(name, f"between {low} and {high}")
    return found


def boolean(name: str, value: Any) -> Any:
    """Read true or false."""
    if not isinstance(value, bool):
        raise wrong_type(name, "true or false")
    return value


def one_of(*allowed: str) -> Reader:
    """Return a reader for one of several strings."""
    return functools.partial(read_one_of, allowed)


def read_one_of(allowed: tuple[str, ...], name: str, value: Any) -> Any:
    """Read one of several strings."""
    if not isinstance(value, str) or value not in allowed:
        raise out_of_range(name, f"one of: {', '.join(allowed)}")
    return value


def anything(_: str, value: Any) -> Any:
    """Read a value that has no effect."""
    return value


service_tier = one_of(*SERVICE_TIERS)


def top_p(name: str, value: Any) -> Any:
    """Read `top_p`. OpenAI allows 0, which vLLM refuses."""
    return number(0, 1)(name, value) or SMALLEST_TOP_P


def chat_logprobs(name: str, value: Any) -> Any:
    """Read chat's `logprobs`, a boolean. 0 and 1 are taken for one; another number is what `top_logprobs` is for."""
    if isinstance(value, bool):
        return value
    if value in (0, 1):
        return bool(value)
    raise wrong_type(name, "true or false; the number of alternatives per token goes into 'top_logprobs'")


def completion_logprobs(name: str, value: Any) -> Any:
    """Read completions' `logprobs`, a number of alternatives. Chat's true and false mean 1 and none."""
    if isinstance(value, bool):
        return 1 if value else None
    return integer(0, 20)(name, value)


def stop(name: str, value: Any) -> Any:
    """Read `stop`: a string, or a list of strings."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list):
        raise wrong_type(name, "a string or a list of strings")
    given = [item for item in values if item is not None]
    if not all(isinstance(item, str) for item in given):
        raise wrong_type(name, "a string or a list of strings")
    if len(given) > MAX_STOP_STRINGS or not all(0 < len(item) <= MAX_STOP_LENGTH for item in given):
        raise out_of_range(name, f"at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_LENGTH} characters")
    return value if isinstance(value, str) else given


def token_ids(name: str, value: Any) -> Any:
    """Read a list of token ids."""
    if not isinstance(value, list) or not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        raise wrong_type(name, "a list of token ids")
    if len(value) > MAX_STOP_TOKENS or not all(0 <= item < 2**31 for item in value):
        raise out_of_range(name, f"at most {MAX_STOP_TOKENS} token ids")
    return value


def logit_bias(name: str, value: Any) -> Any:
    """Read `logit_bias`: an object from token ids, as strings, to numbers."""
    if not isinstance(value, dict) or len(value) > MAX_BIASED_TOKENS:
        raise wrong_type(name, f"an object of at most {MAX_BIASED_TOKENS} token ids")
    given = without_nulls(value)
    for token, bias in given.items():
        if not token.isascii() or not token.isdigit() or len(token) > 9:
            raise wrong_type(name, "an object whose keys are token ids")
        number(-100, 100)(name, bias)
    return given


def stream_options(name: str, value: Any) -> Any:
    """Read `stream_options`. Options that are not known have no effect."""
    if not isinstance(value, dict):
        raise wrong_type(name, "an object")
    given = without_nulls(value)
    for option in ("include_usage", "continuous_usage_stats", "include_obfuscation"):
        if option in given:
            boolean(f"{name}.{option}", given[option])
    return given


def modalities(name: str, value: Any) -> Any:
    """Read `modalities`, whose only supported value is text."""
    if not isinstance(value, list) or any(item != "text" for item in value):
        raise unsupported(name, 'the models here produce text only, so it may only be ["text"]')
    return value


def chat_template_kwargs(name: str, value: Any) -> Any:
    """Read `chat_template_kwargs`: variables of the chat template, of an allowlist, with plain values."""
    if not isinstance(value, dict):
        raise wrong_type(name, "an object")
    given = without_nulls(value)
    for key, item in given.items():
        if key not in TEMPLATE_KEYS:
            raise unsupported(f"{name}.{key}", f"allowed are {', '.join(TEMPLATE_KEYS)}")
        plain = isinstance(item, bool | int | float) or (isinstance(item, str) and len(item) <= 100)
        if not plain or (isinstance(item, float) and not math.isfinite(item)) or (isinstance(item, int) and abs(item) >= 2**31):
            raise wrong_type(f"{name}.{key}", "true, false, a number, or a string of at most 100 characters")
    return given
