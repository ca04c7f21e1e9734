"""What a request may use at most, before anything has counted its tokens."""

import json
from typing import Any

#: Characters of plain English that make a token, on the careful side; anything beyond ASCII counts as a token each.
CHARACTERS_PER_TOKEN = 3
#: What a chat template puts around a message.
MESSAGE_TOKENS = 8
#: Taken for a request that sets no limit itself. It is settled to the truth.
USUAL_COMPLETION = 512


def estimate(parameters: dict[str, Any], prompts: int, max_model_len: int) -> tuple[int, int]:
    """Prompt tokens (an estimate) and completion tokens (the most that all choices together may have)."""
    if "messages" in parameters:
        size = sum(_message(message) for message in parameters["messages"])
        if tools := parameters.get("tools"):
            size += _text(json.dumps(tools))
    else:
        size = _prompt(parameters["prompt"])
    size = min(max(1, size), max_model_len * prompts)
    limit = parameters.get("max_completion_tokens") or parameters.get("max_tokens") or USUAL_COMPLETION
    # The engine cuts off what does not fit in its context.
    return size, min(limit, max_model_len) * prompts * parameters.get("n", 1)


def _text(text: str) -> int:
    return len(text) // CHARACTERS_PER_TOKEN + 1 if text.isascii() else len(text) + 1


def _message(message: dict[str, Any]) -> int:
    content = message.get("content")
    size = MESSAGE_TOKENS
    if isinstance(content, str):
        size += _text(content)
    elif content is not None:
        size += sum(_text(part["text"]) for part in content)
    if calls := message.get("tool_calls"):
        size += _text(json.dumps(calls))
    return size


def _prompt(prompt: Any) -> int:
    if isinstance(prompt, str):
        return _text(prompt)
    if isinstance(prompt[0], int):
        return len(prompt)
    return sum(_prompt(part) for part in prompt)
