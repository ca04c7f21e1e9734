"""The `prompt` of a completion: text or token ids, one or several."""

from typing import Any

from lmaas.errors import InvalidRequest
from lmaas.protocols.parameters.checks import wrong_type

MAX_PROMPTS = 32
_FORMS = "a string, a list of strings, a list of token ids, or a list of such lists"


def read_prompt(name: str, value: Any) -> Any:
    """Return the prompt as it came."""
    prompts = value if isinstance(value, list) and value and not isinstance(value[0], int) else [value]
    if len(prompts) > MAX_PROMPTS:
        raise InvalidRequest(
            f"'{name}' has {len(prompts)} prompts; at most {MAX_PROMPTS} are allowed. Send the others in another request.",
            code="too_many_prompts",
            param=name,
        )
    for prompt in prompts:
        if isinstance(prompt, list):
            if not all(isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 2**31 for token in prompt):
                raise wrong_type(name, _FORMS)
        elif not isinstance(prompt, str):
            raise wrong_type(name, _FORMS)
        if len(prompt) == 0:
            raise InvalidRequest(f"'{name}' must not be empty.", code="empty_prompt", param=name)
    return value


def count_prompts(prompt: Any) -> int:
    """Return how many prompts there are; a chat has one."""
    return len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
