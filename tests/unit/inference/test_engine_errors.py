"""The translation of an engine's errors for clients, from the texts of vLLM 0.32."""

import json
from typing import Any

import pytest

from lmaas.errors import InvalidRequest, RequestFailed
from lmaas.inference.engine_errors import EngineLost, meaning
from lmaas.inference.request import EngineRequest
from lmaas.protocols.parameters.request import read_chat, read_completion

INTERNAL = "ten_1-" + "a" * 64
TOOL = {"type": "function", "function": {"name": "f"}}
CHAT = read_chat({"model": "bot", "messages": [{"role": "user", "content": "context length, max_model_len, 400"}]})
COMPLETION = read_completion({"model": "bot", "prompt": "grammar"})


def chat(**changes: Any) -> EngineRequest:
    return read_chat({"model": "bot", "messages": [{"role": "user", "content": "x"}]} | changes)


def told(request: EngineRequest, message: str, param: str | None = None, code: int = 400) -> Exception:
    error = {"message": message, "type": "BadRequestError", "param": param, "code": code}
    return meaning(code, json.dumps({"error": error}).encode(), INTERNAL, request, 2048)


def refused(request: EngineRequest, message: str, param: str | None = None) -> tuple[str, str | None, str]:
    error = told(request, message, param)
    assert isinstance(error, InvalidRequest)
    assert INTERNAL not in error.message
    assert "(parameter=" not in error.message
    assert "\n" not in error.message
    assert len(error.message) <= 510
    return error.error_code, error.param, error.message


TOO_LONG = (
    "This model's maximum context length is 2048 tokens. However, your prompt contains {} input tokens, which exceeds this limit even "
    "without any output tokens. Please reduce the length of the input prompt. (parameter=input_tokens, value=2049)"
)
TOO_MANY_CHARACTERS = (
    "This model's maximum context length is 2048 tokens. However, your prompt contains 90000 characters (more than 40960 characters, "
    "which is the upper bound for 2048 input tokens). Please reduce the length of the input prompt. (parameter=input_text, value=90000)"
)
NO_ROOM = "max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)"


@pytest.mark.parametrize(
    ("message", "param", "words"),
    [
        (TOO_LONG.format("at least 2049"), "input_tokens", "contains at least 2049 input tokens"),
        (TOO_LONG.format("5000"), "input_tokens", "contains 5000 input tokens"),
        (TOO_MANY_CHARACTERS, "input_text", "contains 90000 characters"),
        (NO_ROOM, "max_tokens", "leaves no room for an answer"),
        ("Input length (2049) exceeds model's maximum context length (2048).", None, "contains 2049 input tokens"),
    ],
)
@pytest.mark.parametrize(("request_", "name"), [(CHAT, "messages"), (COMPLETION, "prompt")])
def test_a_prompt_that_is_too_long(request_: EngineRequest, name: str, message: str, param: str | None, words: str) -> None:
    code, blamed, text = refused(request_, message, param)
    assert (code, blamed) == ("context_length_exceeded", name)
    assert text.startswith("This model's maximum context length is 2048 tokens. However, your prompt ")
    assert words in text


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "truncate_prompt_tokens"])
def test_a_limit_that_is_too_high(name: str) -> None:
    message = f"{name}=3000 cannot be greater than max_model_len=2048. Please request fewer output tokens. (parameter={name}, value=3000)"
    assert refused(CHAT, message, name)[:2] == ("out_of_range", name)


@pytest.mark.parametrize(
    ("message", "param", "expected"),
    [
        (
            "token_id(s) [99999] in logit_bias contain out-of-vocab token ids. (parameter=logit_bias, value=[99999])",
            "logit_bias",
            "logit_bias",
        ),
        ("token_id(s) [99999] in stop_token_ids contain out-of-vocab", "stop_token_ids", "stop_token_ids"),
        ("Stop options", "body.stop", "stop"),
        ("assistant tool_calls entries must be objects.", "tool_calls", "messages"),
        ("Invalid value for `function`", "tool_choice.function.name", "tool_choice"),
        # The engine's own parameter names are not shown to clients.
        ("Something about a token", "engine_core.x", None),
        # A client's own text, quoted in the message, does not decide the code.
        ("'max_model_len context length grammar schema' is odd", None, None),
    ],
)
def test_the_engines_parameter_is_kept(message: str, param: str | None, expected: str | None) -> None:
    assert refused(CHAT, message, param)[:2] == ("invalid_request", expected)


def test_a_token_that_does_not_exist() -> None:
    assert refused(COMPLETION, "Token id 49152 is out of vocabulary")[:2] == ("out_of_range", "prompt")


@pytest.mark.parametrize(
    ("message", "name"),
    [
        ("min_tokens must be less than or equal to max_tokens=16, got 20.", "min_tokens"),
        ("n must be 1 when using greedy sampling, got 2.", "n"),
        ("stop cannot contain an empty string.", "stop"),
    ],
)
def test_a_rule_that_begins_with_its_parameter(message: str, name: str) -> None:
    assert refused(CHAT, message)[:2] == ("out_of_range", name)
    assert refused(CHAT, "engine_depth must be small")[:2] == ("invalid_request", None)


def test_a_validators_text_is_not_shown() -> None:
    raw = "2 validation errors:\n  {'type': 'too_long', 'loc': ('body', 'stop', 'list[constrained-str]'), 'input': ['a']}"
    assert refused(CHAT, raw, "body.stop") == ("invalid_request", "stop", "The value of 'stop' is not valid for this model's engine.")
    assert refused(CHAT, raw, None) == ("invalid_request", None, "The request is not valid for this model's engine.")


def test_names_and_lengths() -> None:
    assert refused(CHAT, f"The model {INTERNAL} is odd")[2] == "The model bot is odd"
    assert refused(CHAT, "x" * 5000)[2].endswith("...")


FORMAT = {"type": "json_schema", "json_schema": {"schema": {}}}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"response_format": FORMAT}, "response_format"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tools"),
        ({"tools": [TOOL], "tool_choice": "required", "response_format": FORMAT}, "tools"),
        ({"tools": [TOOL], "response_format": FORMAT}, "response_format"),
        ({"functions": [{"name": "f"}], "function_call": {"name": "f"}}, "functions"),
    ],
)
def test_a_grammars_error_names_where_the_grammar_comes_from(changes: dict[str, Any], name: str) -> None:
    request = chat(**changes)
    assert refused(request, "Failed to transform json schema into a grammar: x")[:2] == ("invalid_schema", name)
    assert refused(request, "Failed to convert the regex: x")[:2] == ("invalid_grammar", name)


def test_an_engine_that_blames_a_format_by_name() -> None:
    error = refused(chat(response_format=FORMAT), "Invalid response_format structural_tag specification.", "response_format")
    assert error[:2] == ("invalid_schema", "response_format")


@pytest.mark.parametrize(
    "message",
    [
        "EngineCore encountered an issue. See stack trace (above) for the root cause.",
        "Internal server error",
        "Request failed; please retry",
        "",
    ],
)
def test_an_engine_that_has_failed(message: str) -> None:
    error = told(CHAT, message, code=500)
    assert isinstance(error, EngineLost)
    assert error.reason == "engine"


@pytest.mark.parametrize(
    "message", ["maximum recursion depth exceeded", "'NoneType' object is not subscriptable", "[12:00:00] x.cc:5: error"]
)
def test_a_request_that_fails_by_itself_is_not_tried_on_another_engine(message: str) -> None:
    error = told(CHAT, message, code=500)
    assert isinstance(error, RequestFailed)
    assert (error.status, error.retryable) == (500, False)
    assert message not in error.message


@pytest.mark.parametrize("text", [b"", b"<html>", b"{}", b'{"error": "x"}', b'{"error": {"code": "x"}}', b"null", b"[]"])
@pytest.mark.parametrize("status", [500, 502, 503])
def test_an_answer_that_is_no_error_of_vllms_is_a_lost_engine(text: bytes, status: int) -> None:
    assert isinstance(meaning(status, text, INTERNAL, CHAT, 2048), EngineLost)


def test_something_that_the_engine_does_not_have_is_refused() -> None:
    assert isinstance(told(CHAT, "Beam search is not implemented here", code=501), InvalidRequest)


def test_an_adapter_that_is_not_there() -> None:
    error = told(CHAT, f"The model `{INTERNAL}` does not exist.", "model", code=404)
    assert isinstance(error, EngineLost)
    assert error.reason == "adapter"
