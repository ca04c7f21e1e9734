"""The parameters that reach an engine, those without effect, and those that are refused by name."""

import json
from typing import Any

import pytest

from lmaas.errors import InvalidRequest
from lmaas.inference.work import BATCH, DETACHED, INTERACTIVE, Work
from lmaas.protocols.parameters.prompts import MAX_PROMPTS
from lmaas.protocols.parameters.request import read_chat, read_completion
from lmaas.protocols.parameters.table import CHAT as CHAT_TABLE
from lmaas.protocols.parameters.table import COMPLETION as COMPLETION_TABLE
from lmaas.protocols.parameters.table import Table, Treatment
from tests.unit.protocols.parameters.build import (
    BOTH,
    CHAT,
    COMPLETION,
    FUNCTION,
    USER,
    Read,
    chat,
    completion,
    each,
    model,
    nested,
    refusal,
    schema,
    sent,
)

MODELS: list[Any] = [None, "", 5, [], {"a": 1}]


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        *each("n", "out_of_range", 0, -1, 129, 10**30),
        *each("n", "invalid_type", 1.5, "1", True, [1]),
        *each("best_of", "out_of_range", 0, 2, 10**30),
        *each("temperature", "out_of_range", -0.1, 2.1, 1e308, float("nan"), float("inf"), -float("inf")),
        pytest.param("temperature", 10**400, "out_of_range", id="temperature-huge integer"),
        *each("temperature", "invalid_type", "1", True, [], {}),
        *each("top_p", "out_of_range", -0.1, 1.1, float("nan")),
        *each("top_k", "out_of_range", -2, 10**9),
        *each("min_p", "out_of_range", -0.1, 1.5),
        *each("presence_penalty", "out_of_range", -2.1, 2.1),
        *each("frequency_penalty", "out_of_range", -2.1, 2.1),
        *each("repetition_penalty", "out_of_range", 0, 11, float("nan")),
        *each("seed", "out_of_range", 2**63, -(2**63) - 1),
        *each("max_tokens", "out_of_range", 0, -1, 10**12, 1e300),
        *each("max_tokens", "invalid_type", "5", 5.5, True, float("nan"), float("inf")),
        *each("min_tokens", "out_of_range", -1, 10**12),
        *each("stop", "out_of_range", "", [""], ["x"] * 5, ["x" * 1001]),
        *each("stop", "invalid_type", 5, [5], {"a": "b"}),
        *each("stop_token_ids", "out_of_range", [-1], [2**31], [1] * 65),
        *each("stop_token_ids", "invalid_type", 5, ["a"], [True], [1.5]),
        *each("logit_bias", "out_of_range", {"5": 101}, {"5": float("nan")}, {"5": -1e308}),
        *each("logit_bias", "invalid_type", [], {"a": 1}, {"-1": 1}, {"٣": 1}, {"5": "x"}, {"9" * 10: 1}),
        ("logit_bias", {str(number): 0 for number in range(1025)}, "invalid_type"),
        *each("ignore_eos", "invalid_type", 1, "true"),
        *each("stream", "invalid_type", 1, "true", {}),
        *each("stream_options", "invalid_type", [], "x"),
        *each("service_tier", "out_of_range", "", "fast", 1, []),
        *each("truncate_prompt_tokens", "out_of_range", 0, -2, 10**12),
        *each("truncation_side", "out_of_range", "middle", 1),
        *each("prompt_logprobs", "out_of_range", -1, 21, 10**9),
        *each("prompt_logprobs", "invalid_type", True, "1", [1]),
        *each("include_stop_str_in_output", "invalid_type", 1, "x"),
        *each("return_token_ids", "invalid_type", 1, "x"),
        *each("modalities", "unsupported_parameter", ["text", "audio"], "text", ["audio"], {}),
    ],
)
@BOTH
def test_bad_parameters(read: Read, body: dict[str, Any], name: str, value: Any, code: str) -> None:
    assert refusal(read, body | {name: value}) == (code, name)


@pytest.mark.parametrize(
    "name",
    [
        *("chat_template", "mm_processor_kwargs", "media_io_kwargs", "allowed_token_ids", "bad_words", "thinking_token_budget"),
        *("cache_salt", "priority", "kv_transfer_params", "ec_transfer_params", "prompt_embeds", "lora_request", "documents", "request_id"),
        *("vllm_xargs", "logits_processors", "logprob_token_ids", "use_beam_search", "length_penalty", "early_stopping", "detokenize"),
        *("audio", "web_search_options", "guided_decoding_backend", "guided_whitespace_pattern", "repetition_detection", "watermarking"),
        *("return_prompt_text", "return_token_offsets", "routed_experts_prompt_start", "extra_body", "N", "", "x" * 5000),
    ],
)
@pytest.mark.parametrize("value", [7, "x", {"a": 1}, ["x"]])
@BOTH
def test_what_is_not_supported_is_refused_by_name(read: Read, body: dict[str, Any], name: str, value: Any) -> None:
    assert refusal(read, body | {name: value}) == ("unsupported_parameter", name[:100])


@BOTH
def test_null_means_not_given_for_every_parameter(read: Read, body: dict[str, Any]) -> None:
    rows = (*CHAT_TABLE.parameters, *COMPLETION_TABLE.parameters)
    nulls = {item.name: None for item in rows if item.name not in body} | {"unknown": None}
    assert sent(read(body | nulls)) == sent(read(body))


@pytest.mark.parametrize(
    ("table", "read", "body"), [(CHAT_TABLE, read_chat, CHAT), (COMPLETION_TABLE, read_completion, COMPLETION)], ids=["chat", "completion"]
)
def test_neutral_values_of_refused_parameters_are_accepted(table: Table, read: Read, body: dict[str, Any]) -> None:
    neutral = [(item.name, value) for item in table.parameters for value in item.neutral]
    assert ("priority", 0) in neutral
    for name, value in neutral:
        assert sent(read(body | {name: value})) == sent(read(body)), name
    # A value that equals a neutral value only in Python is another value.
    assert refusal(read, body | {"priority": False}) == ("unsupported_parameter", "priority")
    assert refusal(read, body | {"use_beam_search": 0}) == ("unsupported_parameter", "use_beam_search")


@BOTH
def test_what_has_no_effect_is_not_forwarded(read: Read, body: dict[str, Any]) -> None:
    extra = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": True,
        "safety_identifier": "x",
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "verbosity": "low",
        "prediction": {"type": "content", "content": "x"},
        "modalities": ["text"],
        "service_tier": "auto",
        "best_of": 1,
        "stream_interval": 4,
    }
    assert sent(read(body | extra)) == sent(read(body))
    assert all(
        table.by_name[name].treatment is not Treatment.REFUSED
        for table in (CHAT_TABLE, COMPLETION_TABLE)
        for name in extra
        if name in table.by_name
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0.5, "seed": -5},
        {"temperature": 2, "n": 128},
        {"stop": "x"},
        {"stop": ["x", "y"], "stop_token_ids": [0, 2**31 - 1]},
        {"stop": []},
        {"logit_bias": {"5": -100, "6": 100.0}},
        {"max_tokens": 5, "min_tokens": 5},
        {"response_format": {"type": "text"}},
        {"response_format": {"type": "json_object"}},
        {"response_format": schema(nested(32))},
        {"ignore_eos": True, "skip_special_tokens": False, "repetition_penalty": 1.1},
        {"include_stop_str_in_output": True, "return_token_ids": True, "return_tokens_as_token_ids": True},
        {"prompt_logprobs": 20, "spaces_between_special_tokens": False, "add_special_tokens": False},
        {"truncate_prompt_tokens": 100, "truncation_side": "right"},
    ],
)
@BOTH
def test_good_parameters_are_forwarded_as_they_came(read: Read, body: dict[str, Any], changes: dict[str, Any]) -> None:
    request = read(body | changes)
    given = {name: value for name, value in (body | changes).items() if name not in ("model", "stream")}
    assert sent(request) == given
    assert request.weight == changes.get("n", 1)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_tokens": 5.0, "n": 2.0, "seed": -3.0}, {"max_tokens": 5, "n": 2, "seed": -3}),
        ({"top_p": 0}, {"top_p": 1e-6}),
        ({"stop": ["a", None]}, {"stop": ["a"]}),
        ({"logit_bias": {"5": 1, "6": None}}, {"logit_bias": {"5": 1}}),
        ({"n": 2, "best_of": 2}, {"n": 2}),
        # vLLM refuses several greedy choices.
        ({"n": 2, "temperature": 0}, {"n": 2, "temperature": 1, "top_k": 1}),
        ({"n": 1, "temperature": 0}, {"n": 1, "temperature": 0}),
        # vLLM bounds the text before it reads it only if there is a side.
        ({"truncate_prompt_tokens": -1}, {"truncate_prompt_tokens": -1, "truncation_side": "left"}),
        ({"truncation_side": "right"}, {}),
        ({"stream_options": {"include_usage": None, "unknown": 1}}, {}),
        ({"stream_options": {"include_usage": False, "include_obfuscation": True}}, {}),
        ({"structured_outputs": {"json": None}}, {}),
        ({"structured_outputs": {}}, {}),
    ],
)
@BOTH
def test_values_that_are_translated(read: Read, body: dict[str, Any], changes: dict[str, Any], expected: dict[str, Any]) -> None:
    assert sent(read(body | changes)) == sent(read(body)) | expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"logprobs": 1, "top_logprobs": 3}, {"logprobs": True, "top_logprobs": 3}),
        ({"logprobs": 0}, {"logprobs": False}),
        ({"top_logprobs": 0}, {"top_logprobs": 0}),
        ({"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
        ({"include_reasoning": False}, {"include_reasoning": False}),
        (
            {"chat_template_kwargs": {"enable_thinking": False, "thinking": None, "reasoning_effort": "high", "thinking_budget": 512}},
            {"chat_template_kwargs": {"enable_thinking": False, "reasoning_effort": "high", "thinking_budget": 512}},
        ),
        ({"continue_final_message": True}, {"continue_final_message": True, "add_generation_prompt": False}),
        ({"add_generation_prompt": False}, {"add_generation_prompt": False}),
        ({"echo": False}, {}),
        ({"max_completion_tokens": 7, "max_tokens": 9}, {"max_completion_tokens": 7, "max_tokens": 9}),
    ],
)
def test_chats_own_parameters(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    assert chat(**changes) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # Requests of lm-eval's log-likelihood tasks.
        (
            {"echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1234},
            {"echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1234},
        ),
        ({"echo": True, "logprobs": 5, "max_tokens": 0}, {"echo": True, "logprobs": 5, "max_tokens": 0}),
        ({"logprobs": True}, {"logprobs": 1}),
        ({"logprobs": False}, {}),
        ({"suffix": ""}, {}),
    ],
)
def test_completions_own_parameters(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    assert completion(**changes) == expected


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"min_tokens": 11, "max_tokens": 10}, "out_of_range", "min_tokens"),
        ({"min_tokens": 11, "max_completion_tokens": 10, "max_tokens": 20}, "out_of_range", "min_tokens"),
        ({"stream_options": {"include_usage": True}}, "invalid_request", "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "invalid_type", "stream_options.include_usage"),
        ({"logprobs": 5}, "invalid_type", "logprobs"),
        ({"logprobs": "x"}, "invalid_type", "logprobs"),
        ({"top_logprobs": 21}, "out_of_range", "top_logprobs"),
        ({"top_logprobs": 2}, "invalid_request", "top_logprobs"),
        ({"top_logprobs": 2, "logprobs": False}, "invalid_request", "top_logprobs"),
        ({"messages": None}, "missing_parameter", "messages"),
        ({"n": 4, "best_of": 3}, "out_of_range", "best_of"),
        ({"n": 4, "best_of": 1}, "out_of_range", "best_of"),
        ({"prompt_logprobs": 1, "stream": True}, "invalid_request", "prompt_logprobs"),
        ({"echo": True}, "unsupported_parameter", "echo"),
        ({"reasoning_effort": "huge"}, "out_of_range", "reasoning_effort"),
        ({"chat_template_kwargs": []}, "invalid_type", "chat_template_kwargs"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "unsupported_parameter", "chat_template_kwargs.chat_template"),
        ({"chat_template_kwargs": {"tokenize": False}}, "unsupported_parameter", "chat_template_kwargs.tokenize"),
        ({"chat_template_kwargs": {"thinking": {"a": 1}}}, "invalid_type", "chat_template_kwargs.thinking"),
        ({"chat_template_kwargs": {"thinking": "x" * 101}}, "invalid_type", "chat_template_kwargs.thinking"),
        ({"chat_template_kwargs": {"thinking_budget": 1e400}}, "invalid_type", "chat_template_kwargs.thinking_budget"),
        ({"chat_template_kwargs": {"thinking_budget": 10**30}}, "invalid_type", "chat_template_kwargs.thinking_budget"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "invalid_request", "continue_final_message"),
        ({"continue_final_message": True, "messages": [USER | {"content": ""}]}, "invalid_request", "continue_final_message"),
        *[({"model": value}, "missing_parameter", "model") for value in MODELS],
    ],
)
def test_bad_chats(changes: dict[str, Any], code: str, param: str) -> None:
    assert refusal(read_chat, CHAT | changes) == (code, param)


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"max_tokens": 0}, "out_of_range", "max_tokens"),
        ({"max_tokens": 0, "echo": False}, "out_of_range", "max_tokens"),
        ({"max_tokens": 0, "echo": True, "min_tokens": 1}, "out_of_range", "min_tokens"),
        ({"logprobs": 21}, "out_of_range", "logprobs"),
        ({"logprobs": -1, "echo": True}, "out_of_range", "logprobs"),
        ({"suffix": "x"}, "unsupported_parameter", "suffix"),
        ({"messages": [USER]}, "unsupported_parameter", "messages"),
        ({"tools": [FUNCTION]}, "unsupported_parameter", "tools"),
    ],
)
def test_bad_completions(changes: dict[str, Any], code: str, param: str) -> None:
    assert refusal(read_completion, COMPLETION | changes) == (code, param)


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
    assert refusal(read_completion, COMPLETION | {"prompt": prompt}) == (code, "prompt")


@pytest.mark.parametrize(
    ("prompt", "n", "weight", "prompts"),
    [("x", 1, 1, 1), ("x", 4, 4, 1), (["x", "y"], 3, 6, 2), ([1, 2, 3], 1, 1, 1), ([[1, 2], [3]], 2, 4, 2), (["x"] * 32, 128, 4096, 32)],
)
def test_the_weight_counts_sequences(prompt: Any, n: int, weight: int, prompts: int) -> None:
    request = read_completion(COMPLETION | {"prompt": prompt, "n": n})
    assert (request.weight, request.prompts) == (weight, prompts)


@pytest.mark.parametrize(
    ("options", "include", "continuous"),
    [
        (None, False, False),
        ({}, False, False),
        ({"include_usage": None}, False, False),
        ({"include_usage": True}, True, False),
        ({"include_usage": True, "continuous_usage_stats": True}, True, True),
        ({"continuous_usage_stats": True}, False, False),
        ({"include_obfuscation": True}, False, False),
        ({"include_usage": True, "x": 5}, True, False),
    ],
)
def test_the_engine_is_always_asked_for_usage(options: Any, include: bool, continuous: bool) -> None:
    request = read_chat(CHAT | {"stream": True, "stream_options": options})
    assert (request.stream, request.include_usage, request.continuous_usage) == (True, include, continuous)
    body = json.loads(request.body("engine", "salt"))
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}


@pytest.mark.parametrize(("work", "priority"), [(INTERACTIVE, None), (DETACHED, None), (BATCH, 1)])
def test_only_background_work_has_a_priority_in_the_engine(work: Work, priority: int | None) -> None:
    assert json.loads(read_chat(CHAT).body("engine", "salt", priority=work.engine_priority)).get("priority") == priority


@pytest.mark.parametrize("number", [2**64 - 1, 2**64, -(2**70), 10**30, 1e300, 0.1])
def test_numbers_of_any_size_reach_the_engine_as_they_are(number: float) -> None:
    asked = schema({"type": "object", "properties": {"ü": {"type": "number", "maximum": number}}})
    request = read_chat({"model": "m", "messages": [{"role": "user", "content": "é\U0001f600"}], "response_format": asked})
    body = sent(request)
    assert body["response_format"] == asked
    assert body["messages"][0]["content"] == "é\U0001f600"


@pytest.mark.parametrize(
    ("read", "body", "code", "param"),
    [
        (read_chat, CHAT | {"max_tokens": 101}, "out_of_range", "max_tokens"),
        (read_chat, CHAT | {"max_completion_tokens": 101, "max_tokens": 5}, "out_of_range", "max_completion_tokens"),
        (read_completion, COMPLETION | {"max_tokens": 101}, "out_of_range", "max_tokens"),
        (read_completion, COMPLETION | {"truncate_prompt_tokens": 101}, "out_of_range", "truncate_prompt_tokens"),
        (read_completion, COMPLETION | {"prompt": [1] * 101}, "context_length_exceeded", "prompt"),
        (read_completion, COMPLETION | {"prompt": [[1], [1] * 101]}, "context_length_exceeded", "prompt"),
    ],
)
def test_what_cannot_fit_into_the_context_is_told_before_it_waits(read: Read, body: dict[str, Any], code: str, param: str) -> None:
    request = read(body)
    request.check(model(101))
    with pytest.raises(InvalidRequest) as caught:
        request.check(model(100))
    assert (caught.value.error_code, caught.value.param) == (code, param)
    assert "100 tokens" in caught.value.message


@pytest.mark.parametrize(
    ("read", "body", "param"),
    [
        (read_chat, CHAT | {"logprobs": True, "top_logprobs": 20, "n": 128}, "top_logprobs"),
        (read_chat, CHAT | {"logprobs": True, "n": 128, "max_tokens": 10_000}, "logprobs"),
        (read_completion, COMPLETION | {"logprobs": 20, "n": 128, "max_tokens": 512}, "logprobs"),
        (read_completion, COMPLETION | {"prompt": [[1] * 8000] * 32, "prompt_logprobs": 20, "max_tokens": 1}, "prompt_logprobs"),
        (read_completion, COMPLETION | {"prompt": [1] * 8000, "echo": True, "logprobs": 5, "n": 128, "max_tokens": 0}, "logprobs"),
        (read_completion, COMPLETION | {"prompt": [1] * 8000, "prompt_logprobs": 0, "n": 128, "max_tokens": 1}, "prompt_logprobs"),
    ],
)
def test_an_answer_has_a_bounded_number_of_log_probabilities(read: Read, body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(body).check(model(10_000))
    assert (caught.value.error_code, caught.value.param) == ("out_of_range", param)


@pytest.mark.parametrize(
    ("read", "body"),
    [
        (read_chat, CHAT | {"logprobs": True, "top_logprobs": 20}),
        (read_chat, CHAT | {"logprobs": True, "top_logprobs": 20, "n": 128, "max_tokens": 128}),
        (read_chat, CHAT | {"logprobs": True, "top_logprobs": 20, "n": 128, "stream": True}),
        (read_chat, CHAT | {"logprobs": False, "n": 128}),
        # A batch of lm-eval.
        (read_completion, COMPLETION | {"prompt": [[1] * 8000] * 32, "echo": True, "logprobs": 1, "max_tokens": 1}),
    ],
)
def test_usual_numbers_of_log_probabilities_are_allowed(read: Read, body: dict[str, Any]) -> None:
    read(body).check(model(10_000))


def test_a_prompt_that_is_cut_may_be_longer_than_the_context() -> None:
    read_completion(COMPLETION | {"prompt": [1] * 101, "truncate_prompt_tokens": -1}).check(model(100))
