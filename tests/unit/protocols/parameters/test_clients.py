"""The tables know every parameter that the clients' libraries can send."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from anthropic import Anthropic
from openai import OpenAI

from lmaas.protocols.messages.table import COUNT_TOKENS, MESSAGES
from lmaas.protocols.parameters.table import CHAT, COMPLETION, Table
from lmaas.protocols.pooling.embeddings import TABLE as EMBEDDINGS
from lmaas.protocols.responses.parameters import TABLE as RESPONSES
from lmaas.protocols.tokens.counts import INPUT_TOKENS

OPENAI, ANTHROPIC = OpenAI(api_key="none"), Anthropic(api_key="none")
#: Arguments that a library uses itself, and the name that every request has.
OF_THE_LIBRARY = {"model", "extra_headers", "extra_query", "extra_body", "timeout"}
_STREAMED = {"text_format", "response_id", "starting_after"}
METHODS: list[tuple[Callable[..., Any], Table, set[str]]] = [
    (OPENAI.responses.create, RESPONSES, set()),
    (OPENAI.responses.parse, RESPONSES, {"text_format", "parse_as"}),
    (OPENAI.responses.stream, RESPONSES, _STREAMED),
    (OPENAI.responses.input_tokens.count, INPUT_TOKENS, set()),
    (OPENAI.chat.completions.create, CHAT, set()),
    (OPENAI.chat.completions.parse, CHAT, {"parse_as"}),
    (OPENAI.chat.completions.stream, CHAT, set()),
    (OPENAI.completions.create, COMPLETION, set()),
    (OPENAI.embeddings.create, EMBEDDINGS, set()),
    (ANTHROPIC.messages.create, MESSAGES, set()),
    (ANTHROPIC.messages.stream, MESSAGES, set()),
    (ANTHROPIC.messages.parse, MESSAGES, set()),
    (ANTHROPIC.messages.count_tokens, COUNT_TOKENS, set()),
    (ANTHROPIC.beta.messages.create, MESSAGES, set()),
    (ANTHROPIC.beta.messages.stream, MESSAGES, set()),
    (ANTHROPIC.beta.messages.parse, MESSAGES, set()),
    (ANTHROPIC.beta.messages.tool_runner, MESSAGES, {"run_tools_eagerly", "max_iterations"}),
    (ANTHROPIC.beta.messages.count_tokens, COUNT_TOKENS, set()),
]


@pytest.mark.parametrize(("method", "table", "own"), METHODS, ids=lambda value: getattr(value, "__qualname__", ""))
def test_a_table_has_every_parameter_of_a_library(method: Callable[..., Any], table: Table, own: set[str]) -> None:
    assert set(inspect.signature(method).parameters) - OF_THE_LIBRARY - own <= table.by_name.keys()
