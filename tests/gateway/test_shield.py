"""What reaches an engine, and what is refused by name."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from lmaas.errors import InvalidRequest
from lmaas.gateway.shield import MAX_MESSAGES, MAX_PROMPTS, Shielded, shield_chat, shield_completion

USER = {"role": "user", "content": "Hello"}
CHAT: dict[str, Any] = {"model": "m", "messages": [USER]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "Hello"}
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


MODELS: list[Any] = [None, "", 5, [], {"a": 1}]


def each(name: str, code: str, *values: Any) -> list[tuple[str, Any, str]]:
    return [(name, value, code) for value in values]


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth - 1):
        value = {"a": value}
    return value


def schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": value}}


def refusal(shield: Callable[[dict[str, Any]], Shielded], body: dict[str, Any]) -> tuple[str, str | None]:
    with pytest.raises(InvalidRequest) as caught:
        shield(body)
    assert caught.value.status == 400
    assert len(caught.value.message) < 400
    return caught.value.error_code, caught.value.param


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        *each("n", "out_of_range", 0, -1, 17, 10**30),
        *each("n", "invalid_type", 1.0, "1", True, [1]),
        *each("best_of", "out_of_range", 0, 2, 10**30),
        *each("temperature", "out_of_range", -0.1, 2.1, 1e308, float("nan"), float("inf"), -float("inf")),
        pytest.param("temperature", 10**400, "out_of_range", id="temperature-huge integer"),
        *each("temperature", "invalid_type", "1", True, [], {}),
        *each("top_p", "out_of_range", 0, 1.1, float("nan")),
        *each("top_k", "out_of_range", -2, 10**9),
        *each("min_p", "out_of_range", -0.1, 1.5),
        *each("presence_penalty", "out_of_range", -2.1, 2.1),
        *each("frequency_penalty", "out_of_range", -2.1, 2.1),
        *each("repetition_penalty", "out_of_range", 0, 11, float("nan")),
        *each("seed", "out_of_range", 2**63, -(2**63) - 1),
        *each("max_tokens", "out_of_range", 0, -1, 10**12),
        *each("min_tokens", "out_of_range", -1, 10**12),
        *each("stop", "out_of_range", "", [""], ["x"] * 17, ["x" * 1001]),
        *each("stop", "invalid_type", 5, [5], {"a": "b"}),
        *each("stop_token_ids", "out_of_range", [-1], [2**31], [1] * 65),
        *each("stop_token_ids", "invalid_type", 5, ["a"], [True], [1.5]),
        *each("logit_bias", "out_of_range", {"5": 101}, {"5": float("nan")}, {"5": -1e308}),
        *each("logit_bias", "invalid_type", [], {"a": 1}, {"-1": 1}, {"٣": 1}, {"5": "x"}, {"9" * 10: 1}),
        ("logit_bias", {str(number): 0 for number in range(1025)}, "invalid_type"),
        *each("ignore_eos", "invalid_type", 1, "true"),
        *each("stream", "invalid_type", 1, "true", {}),
        *each("response_format", "invalid_type", "json", {}, {"type": "grammar"}, {"type": "structural_tag"}, []),
        ("response_format", {"type": "json_schema"}, "invalid_schema"),
        ("response_format", {"type": "json_schema", "json_schema": {"name": 5, "schema": {}}}, "invalid_schema"),
        *each("response_format", "invalid_schema", schema(None), schema("x"), schema([]), schema(True)),
        ("response_format", schema(nested(33)), "invalid_schema"),
        ("response_format", schema({"description": "x" * 70_000}), "invalid_schema"),
        pytest.param("response_format", schema(nested(5000)), "invalid_schema"),
    ],
)
@pytest.mark.parametrize(("shield", "body"), [(shield_chat, CHAT), (shield_completion, COMPLETION)], ids=["chat", "completion"])
def test_bad_parameters(shield: Callable[[dict[str, Any]], Shielded], body: dict[str, Any], name: str, value: Any, code: str) -> None:
    assert refusal(shield, body | {name: value}) == (code, name)


@pytest.mark.parametrize(
    "name",
    [
        *("chat_template", "chat_template_kwargs", "mm_processor_kwargs", "allowed_token_ids", "bad_words", "thinking_token_budget"),
        *("prompt_logprobs", "cache_salt", "priority", "kv_transfer_params", "prompt_embeds", "guided_json", "guided_regex"),
        *("structured_outputs", "lora_request", "documents", "add_generation_prompt", "continue_final_message", "request_id"),
        *("vllm_xargs", "return_token_ids", "logits_processors", "use_beam_search", "length_penalty", "truncate_prompt_tokens"),
        *("media_io_kwargs", "echo", "suffix", "functions", "function_call", "audio", "modalities", "prediction", "N", "", "x" * 5000),
    ],
)
@pytest.mark.parametrize("value", [None, 1, "x"])
def test_what_is_not_on_the_list_is_refused_by_name(name: str, value: Any) -> None:
    assert refusal(shield_chat, CHAT | {name: value}) == ("unsupported_parameter", name[:100])
    if name != "echo":
        assert refusal(shield_completion, COMPLETION | {name: value}) == ("unsupported_parameter", name[:100])


@pytest.mark.parametrize(
    ("messages", "code", "param"),
    [
        ([], "empty_prompt", "messages"),
        ([USER] * (MAX_MESSAGES + 1), "out_of_range", "messages"),
        ("Hello", "invalid_type", "messages"),
        (["Hello"], "invalid_type", "messages[0]"),
        ([USER, {"role": "root", "content": "x"}], "invalid_type", "messages[1]"),
        ([{"role": {}, "content": "x"}], "invalid_type", "messages[0]"),
        ([{"content": "x"}], "invalid_type", "messages[0]"),
        ([USER | {"audio": "x"}], "unsupported_parameter", "messages[0].audio"),
        ([{"role": "user"}], "invalid_type", "messages[0].content"),
        ([{"role": "user", "content": None}], "invalid_type", "messages[0].content"),
        ([{"role": "user", "content": 5}], "invalid_type", "messages[0].content"),
        *(
            ([{"role": "user", "content": [part]}], "unsupported_content", "messages[0].content")
            for part in (
                {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}},
                {"type": "image_url", "image_url": "file:///etc/passwd"},
                {"type": "image_embeds", "image_embeds": "AAAA"},
                {"type": "input_audio", "input_audio": {}},
                {"type": "video_url", "video_url": {"url": "http://x"}},
                {"type": "text", "text": "x", "image_url": "http://x"},
                {"image_url": "http://x"},
                {"type": "text", "text": 5},
                {"type": "text"},
                "text",
                None,
            )
        ),
    ],
)
def test_bad_messages(messages: Any, code: str, param: str) -> None:
    assert refusal(shield_chat, CHAT | {"messages": messages}) == (code, param)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "x", "name": {}},
        {"role": "tool", "content": "x", "tool_call_id": 5},
        {"role": "assistant", "content": "x", "refusal": []},
        {"role": "assistant", "content": "x", "reasoning_content": 5},
        {"role": "assistant", "content": None, "tool_calls": "x"},
        {"role": "assistant", "content": None, "tool_calls": [{}]},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]},
        {"role": "assistant", "content": None, "tool_calls": [nested(900)]},
    ],
)
def test_bad_fields_of_messages(message: dict[str, Any]) -> None:
    # An engine's own failure would be taken for a lost engine, and retried.
    code, param = refusal(shield_chat, CHAT | {"messages": [message]})
    assert code == "invalid_type"
    assert str(param).startswith("messages[0].")


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        *((value, code) for _, value, code in each("prompt", "empty_prompt", "", [], [""], ["a", ""], [[]], [[1], []])),
        *((value, code) for _, value, code in each("prompt", "too_many_prompts", ["a"] * (MAX_PROMPTS + 1), [[1]] * (MAX_PROMPTS + 1))),
        *(
            (value, code)
            for _, value, code in each(
                "prompt", "invalid_type", 5, {}, True, [1.5], ["a", 5], [1, "a"], [True], [[True]], [[-1]], [2**31], [None]
            )
        ),
        (None, "missing_parameter"),
    ],
)
def test_bad_prompts(prompt: Any, code: str) -> None:
    assert refusal(shield_completion, COMPLETION | {"prompt": prompt}) == (code, "prompt")


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"min_tokens": 11, "max_tokens": 10}, "out_of_range", "min_tokens"),
        ({"min_tokens": 11, "max_completion_tokens": 10, "max_tokens": 20}, "out_of_range", "min_tokens"),
        ({"stream_options": {"include_usage": True}}, "invalid_request", "stream_options"),
        ({"stream": True, "stream_options": {"x": True}}, "unsupported_parameter", "stream_options.x"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "invalid_type", "stream_options.include_usage"),
        ({"stream": True, "stream_options": []}, "invalid_type", "stream_options"),
        ({"tools": {}}, "invalid_type", "tools"),
        ({"tools": [FUNCTION] * 129}, "invalid_type", "tools"),
        ({"tools": [{"type": "code_interpreter"}]}, "invalid_type", "tools"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "invalid_type", "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "invalid_schema", "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": nested(40)}}]}, "invalid_schema", "tools"),
        ({"tool_choice": "maybe"}, "out_of_range", "tool_choice"),
        ({"tool_choice": 5}, "invalid_type", "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "invalid_type", "tool_choice"),
        pytest.param({"tool_choice": {"type": "function", "function": "f"}}, "invalid_type", "tool_choice"),
        ({"logprobs": 5}, "invalid_type", "logprobs"),
        ({"top_logprobs": 21}, "out_of_range", "top_logprobs"),
        ({"messages": None}, "missing_parameter", "messages"),
        *[({"model": value}, "missing_parameter", "model") for value in MODELS],
    ],
)
def test_bad_chats(changes: dict[str, Any], code: str, param: str) -> None:
    assert refusal(shield_chat, CHAT | changes) == (code, param)


def test_logprobs_of_the_prompt_are_refused_in_disguise() -> None:
    # vLLM takes `echo` with `logprobs` for `prompt_logprobs`.
    assert refusal(shield_completion, COMPLETION | {"echo": True, "logprobs": 1}) == ("unsupported_parameter", "logprobs")


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0.5, "seed": -5, "n": 16},
        {"stop": None, "max_tokens": None, "n": None, "stream": None, "logit_bias": None},
        {"stop": "x"},
        {"stop": ["x", "y"], "stop_token_ids": [0, 2**31 - 1]},
        {"logit_bias": {"5": -100, "6": 100.0}},
        {"max_tokens": 5, "min_tokens": 5},
        {"response_format": {"type": "text"}},
        {"response_format": {"type": "json_object"}},
        {"response_format": schema(nested(32))},
        {"ignore_eos": True, "skip_special_tokens": False, "repetition_penalty": 1.1},
    ],
)
@pytest.mark.parametrize(("shield", "body"), [(shield_chat, CHAT), (shield_completion, COMPLETION)], ids=["chat", "completion"])
def test_good_parameters_are_forwarded_as_they_came(
    shield: Callable[[dict[str, Any]], Shielded], body: dict[str, Any], changes: dict[str, Any]
) -> None:
    shielded = shield(body | changes)
    sent = json.loads(shielded.body("engine", "salt"))
    given = {name: value for name, value in (body | changes).items() if value is not None and name not in ("model", "stream")}
    assert sent == given | {"model": "engine", "cache_salt": "salt", "stream": False}
    assert shielded.weight == (changes.get("n") or 1)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "developer", "content": "Be brief."}, USER],
        [{"role": "system", "content": [{"type": "text", "text": "ünï"}]}, USER | {"name": "Ann"}],
        [
            USER,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "content": "5", "tool_call_id": "c"},
        ],
        [{"role": "user", "content": ""}],
    ],
)
def test_good_messages(messages: list[dict[str, Any]]) -> None:
    body = shield_chat(CHAT | {"messages": messages, "tools": [FUNCTION], "tool_choice": {"type": "function", "function": {"name": "f"}}})
    assert json.loads(body.body("engine", "salt"))["messages"] == messages


@pytest.mark.parametrize(
    ("prompt", "n", "weight", "prompts"),
    [("x", 1, 1, 1), ("x", 4, 4, 1), (["x", "y"], 3, 6, 2), ([1, 2, 3], 1, 1, 1), ([[1, 2], [3]], 2, 4, 2), (["x"] * 32, 16, 512, 32)],
)
def test_the_weight_counts_sequences(prompt: Any, n: int, weight: int, prompts: int) -> None:
    shielded = shield_completion(COMPLETION | {"prompt": prompt, "n": n})
    assert (shielded.weight, shielded.prompts) == (weight, prompts)


@pytest.mark.parametrize(
    ("options", "include", "continuous"),
    [
        (None, False, False),
        ({}, False, False),
        ({"include_usage": True}, True, False),
        ({"include_usage": True, "continuous_usage_stats": True}, True, True),
        ({"continuous_usage_stats": True}, False, False),
        ({"include_obfuscation": True}, False, False),
    ],
)
def test_the_engine_is_always_asked_for_usage(options: Any, include: bool, continuous: bool) -> None:
    shielded = shield_chat(CHAT | {"stream": True, "stream_options": options})
    assert (shielded.stream, shielded.include_usage, shielded.continuous_usage) == (True, include, continuous)
    sent = json.loads(shielded.body("engine", "salt"))
    assert sent["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}


def test_what_only_openai_knows_is_taken_and_not_forwarded() -> None:
    extra = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "best_of": 1, "safety_identifier": "x"}
    sent = json.loads(shield_chat(CHAT | extra).body("engine", "salt"))
    assert set(sent) == {"messages", "model", "cache_salt", "stream"}


@pytest.mark.parametrize("number", [2**64 - 1, 2**64, -(2**70), 10**30, 1e300, 0.1])
def test_numbers_of_any_size_reach_the_engine_as_they_are(number: float) -> None:
    schema = {"type": "object", "properties": {"ü": {"type": "number", "maximum": number}}}
    asked = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    request = shield_chat({"model": "m", "messages": [{"role": "user", "content": "é\U0001f600"}], "response_format": asked})
    sent = json.loads(request.body("engine", cache_salt="salt"))
    assert sent["response_format"] == asked
    assert sent["messages"] == [{"role": "user", "content": "é\U0001f600"}]
