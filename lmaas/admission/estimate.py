"""Estimate of the tokens that a request may use at most, made before its tokens are counted."""

import json
from typing import Any

#: Characters of plain English per token, a cautious figure. A text with other characters counts one token for each character.
CHARACTERS_PER_TOKEN = 3
#: Tokens that a chat template adds to a message.
MESSAGE_TOKENS = 8
#: Completion tokens assumed for a request without a limit. The reservation is settled at the request's end.
USUAL_COMPLETION = 512


def estimate(parameters: dict[str, Any], prompts: int, max_model_len: int) -> tuple[int, int]:
    """Return an estimate of the prompt tokens, and the most completion tokens that all choices together may have."""
    if "messages" in parameters:
        size = sum(_message(message) for message in parameters["messages"])
        if tools := parameters.get("tools"):
            size += text_tokens(json.dumps(tools))
    else:
        size = _prompt(parameters["prompt"])
    kept = parameters.get("truncate_prompt_tokens", -1)
    size = min(max(1, size), (min(kept, max_model_len) if kept > 0 else max_model_len) * prompts)
    limit = parameters.get("max_completion_tokens", parameters.get("max_tokens", USUAL_COMPLETION))
    # The engine cuts off what does not fit in its context, and generates one token even for a limit of 0.
    return size, max(1, min(limit, max_model_len)) * prompts * parameters.get("n", 1)


def text_tokens(text: str) -> int:
    """Return an estimate of the tokens of a text."""
    return len(text) // CHARACTERS_PER_TOKEN + 1 if text.isascii() else len(text) + 1


def _message(message: dict[str, Any]) -> int:
    content = message.get("content")
    size = MESSAGE_TOKENS
    if isinstance(content, str):
        size += text_tokens(content)
    elif content is not None:
        size += sum(text_tokens(part["text"]) for part in content)
    if calls := message.get("tool_calls"):
        size += text_tokens(json.dumps(calls))
    return size


def _prompt(prompt: Any) -> int:
    if isinstance(prompt, str):
        return text_tokens(prompt)
    if isinstance(prompt[0], int):
        return len(prompt)
    return sum(_prompt(part) for part in prompt)
