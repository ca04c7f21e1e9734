"""Requests for tokens: the prompt that is read is the prompt of the request to generate."""

from typing import Any
from unittest.mock import Mock

import pytest

from lmaas.engine.grammars.verdict import Tokens
from lmaas.inference.counting import Counting, PromptRequest
from lmaas.protocols.messages.protocol import Messages
from lmaas.protocols.responses.protocol import Responses
from lmaas.protocols.text import ChatCompletions
from lmaas.protocols.tokens.counts import CountTokens, InputTokens
from lmaas.protocols.tokens.tokenize import Detokenize, Tokenize
from lmaas.store.models import BaseModel
from tests.unit.protocols.parameters.build import refusal

MODEL = BaseModel("bm_1", "m", "no-model", "float32", {}, 16, 8, 8, 16, 2048, 2**28, "")
USER = {"role": "user", "content": "Hello"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
#: The chat's parameters that decide about the prompt.
PROMPT = (
    *("messages", "tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs", "reasoning_effort", "response_format"),
    *("continue_final_message", "add_generation_prompt", "add_special_tokens"),
)


def input_tokens() -> InputTokens:
    return InputTokens(Responses(Mock()))


def prompt_of(parameters: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if name in PROMPT}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"tools": [FUNCTION]},
        {"tools": [FUNCTION], "tool_choice": "required"},
        {"tools": [FUNCTION], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}},
        {"messages": [USER, {"role": "assistant", "content": "Hel"}], "continue_final_message": True},
        {"messages": [USER, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{"}}]},
    ],
)
def test_tokenize_reads_a_chat_as_the_chat_endpoint_does(more: dict[str, Any]) -> None:
    body = {"model": "m", "messages": [USER]} | more
    asked = Tokenize().read(body | {"return_token_strs": True})
    assert (asked.path, asked.ids, asked.strings) == ("/v1/chat/completions", True, True)
    assert asked.parameters == ChatCompletions().read(body).parameters


def test_tokenize_reads_a_text() -> None:
    asked = Tokenize().read({"model": "m", "prompt": "", "add_special_tokens": False, "return_token_strs": None, "messages": None})
    assert asked == PromptRequest("m", "/v1/completions", {"prompt": "", "add_special_tokens": False}, ids=True)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"system": "Be terse.", "tools": [{"name": "f", "input_schema": SCHEMA}]},
        {"tools": [{"name": "f", "input_schema": SCHEMA}], "tool_choice": {"type": "any"}},
        {"thinking": {"type": "enabled", "budget_tokens": 2000}},
        {"messages": [USER, {"role": "assistant", "content": "Hel"}]},
        {"output_config": {"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}}},
        {"system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]},
    ],
)
def test_count_tokens_reads_what_a_message_would_be(more: dict[str, Any]) -> None:
    body = {"model": "m", "messages": [USER]} | more
    asked = CountTokens().read(body)
    assert asked.path == Messages.engine_path
    assert prompt_of(asked.parameters) == prompt_of(Messages().read(body | {"max_tokens": 9}).parameters)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"instructions": "Be terse.", "tools": [{"type": "function", "name": "f", "parameters": SCHEMA}]},
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}, "reasoning": {"effort": "low"}},
        {"input": [{"role": "developer", "content": "x"}, {"type": "message", "role": "user", "content": "y"}]},
    ],
)
def test_input_tokens_reads_what_a_response_would_be(more: dict[str, Any]) -> None:
    body = {"model": "m", "input": "Hello"} | more
    asked = input_tokens().read(body)
    assert asked.path == Responses.engine_path
    assert prompt_of(asked.parameters) == prompt_of(Responses(Mock()).read(body).parameters)


@pytest.mark.parametrize(
    ("counting", "body", "code", "param"),
    [
        (Tokenize(), {"prompt": "x"}, "missing_parameter", "model"),
        (Tokenize(), {"model": "m"}, "missing_parameter", "prompt"),
        (Tokenize(), {"model": "m", "prompt": "x", "messages": [USER]}, "invalid_request", "prompt"),
        (Tokenize(), {"model": "m", "prompt": ["x"]}, "invalid_type", "prompt"),
        (Tokenize(), {"model": "m", "prompt": "x", "tools": [FUNCTION]}, "invalid_request", "tools"),
        (Tokenize(), {"model": "m", "messages": []}, "empty_prompt", "messages"),
        (Tokenize(), {"model": "m", "prompt": "x", "chat_template": "{{ 7 }}"}, "unsupported_parameter", "chat_template"),
        (Tokenize(), {"model": "m", "prompt": "x", "max_tokens": 5}, "unsupported_parameter", "max_tokens"),
        (Detokenize(), {"model": "m"}, "missing_parameter", "tokens"),
        (Detokenize(), {"model": "m", "tokens": "x"}, "invalid_type", "tokens"),
        *((Detokenize(), {"model": "m", "tokens": [one]}, "invalid_type", "tokens") for one in (-1, 2**31, True, 1.0, "1", None)),
        (Detokenize(), {"model": "m", "tokens": [1] * 200_001}, "out_of_range", "tokens"),
        (CountTokens(), {"model": "m"}, "missing_parameter", "messages"),
        (CountTokens(), {"model": "m", "messages": [USER], "max_tokens": 5}, "unsupported_parameter", "max_tokens"),
        (CountTokens(), {"model": "m", "messages": [USER], "stream": True}, "unsupported_parameter", "stream"),
        (input_tokens(), {"model": "m"}, "missing_parameter", "input"),
        (input_tokens(), {"model": "m", "input": "x", "temperature": 0}, "unsupported_parameter", "temperature"),
        (input_tokens(), {"model": "m", "conversation": "c", "previous_response_id": "r"}, "invalid_request", "conversation"),
    ],
)
def test_what_is_refused(counting: Counting, body: dict[str, Any], code: str, param: str) -> None:
    assert refusal(counting.read, body) == (code, param)


@pytest.mark.parametrize(
    ("counting", "tokens", "answer"),
    [
        (Tokenize(), Tokens(count=2, ids=[5, 6]), {"count": 2, "max_model_len": 2048, "tokens": [5, 6], "token_strs": None}),
        (
            Tokenize(),
            Tokens(count=2, ids=[5, 6], strings=["a", "b"]),
            {"count": 2, "max_model_len": 2048, "tokens": [5, 6], "token_strs": ["a", "b"]},
        ),
        (Detokenize(), Tokens(count=2, text="ab"), {"prompt": "ab"}),
        (CountTokens(), Tokens(count=2), {"input_tokens": 2}),
        (input_tokens(), Tokens(count=2), {"object": "response.input_tokens", "input_tokens": 2}),
    ],
)
def test_answers(counting: Counting, tokens: Tokens, answer: dict[str, Any]) -> None:
    assert counting.answer(tokens, MODEL) == answer
