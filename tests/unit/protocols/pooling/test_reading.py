"""Requests for embeddings, rankings and scores: accepted requests, the engine's bodies, and refusals by name."""

import json
from typing import Any

import pytest

from lmaas.errors import InvalidRequest
from lmaas.inference.engine_errors import meaning
from lmaas.protocols.parameters.table import Table, Treatment
from lmaas.protocols.pooling.embeddings import TABLE, Embeddings
from lmaas.protocols.pooling.ranking import PAIRS, RERANK, SCORE, Rerank, Score
from lmaas.protocols.pooling.requests import MAX_INPUTS
from tests.unit.protocols.pooling.build import base_model, inference_of, parts_of, sent

BODIES: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"input": "hello"},
    "/v1/rerank": {"query": "q", "documents": ["a", "b"]},
    "/v1/score": {"text_1": "q", "text_2": ["a", "b"]},
}
PROTOCOLS = {each.path: each for each in (Embeddings(), Rerank(), Score())}
EACH = pytest.mark.parametrize("table", [TABLE, RERANK, SCORE], ids=lambda table: table.path)


def refusal(path: str, body: dict[str, Any], **model: int) -> tuple[str, str | None, str]:
    """Return the code, the parameter and the message of the error."""
    with pytest.raises(InvalidRequest) as caught:
        inference_of(PROTOCOLS[path], body, base_model(**model))
    return caught.value.error_code, caught.value.param, caught.value.message


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("hello", ["hello"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (["\ud800 is mended before, \0 stays"], ["\ud800 is mended before, \0 stays"]),
    ],
)
def test_all_forms_of_input_reach_the_engine_as_a_list(given: Any, inputs: list[Any]) -> None:
    request = Embeddings().read({"model": "m", "input": given})
    assert list(request.inputs) == inputs
    assert (request.prompts, request.stream) == (len(inputs), False)


def test_the_engine_receives_the_parameters() -> None:
    body = {"input": "x", "encoding_format": "base64", "dimensions": 64.0, "add_special_tokens": False, "use_activation": False}
    expected = body | {"input": ["x"], "dimensions": 64}
    assert sent(inference_of(Embeddings(), body).request) == expected
    no_effect = {"user": "me", "metadata": {"a": 1}, "safety_identifier": "s", "service_tier": "flex", "stream": False, "dimensions": None}
    request = inference_of(Embeddings(), {"input": "x"} | no_effect).request
    assert sent(request) == {"input": ["x"]}
    assert request.service_tier == "flex"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, "missing_parameter"),
        ({"input": None}, "missing_parameter"),
        ({"input": ""}, "empty_input"),
        ({"input": []}, "empty_input"),
        ({"input": ["a", ""]}, "empty_input"),
        ({"input": [[]]}, "empty_input"),
        ({"input": ["a"] * (MAX_INPUTS + 1)}, "too_many_inputs"),
        ({"input": [[1]] * (MAX_INPUTS + 1)}, "too_many_inputs"),
        ({"input": 5}, "invalid_type"),
        ({"input": {"a": 1}}, "invalid_type"),
        ({"input": True}, "invalid_type"),
        ({"input": [True]}, "invalid_type"),
        ({"input": [1, True]}, "invalid_type"),
        ({"input": [1, "a"]}, "invalid_type"),
        ({"input": ["a", 1]}, "invalid_type"),
        ({"input": ["a", [1]]}, "invalid_type"),
        ({"input": [[1], "a"]}, "invalid_type"),
        ({"input": [None]}, "invalid_type"),
        ({"input": [1.5]}, "invalid_type"),
        ({"input": [-1]}, "invalid_type"),
        ({"input": [2**31]}, "invalid_type"),
        ({"input": [[1], [2.0]]}, "invalid_type"),
        ({"input": [[[1]]]}, "invalid_type"),
    ],
)
def test_inputs_that_are_refused(body: dict[str, Any], code: str) -> None:
    assert refusal("/v1/embeddings", body)[:2] == (code, "input")


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("encoding_format", "int8", "out_of_range"),
        ("encoding_format", 5, "out_of_range"),
        ("dimensions", 0, "out_of_range"),
        ("dimensions", "64", "invalid_type"),
        ("normalize", False, "unsupported_parameter"),
        ("embed_dtype", "float16", "unsupported_parameter"),
        ("endianness", "big", "unsupported_parameter"),
        ("input_type", "query", "unsupported_parameter"),
        ("messages", [{"role": "user", "content": "x"}], "unsupported_parameter"),
        ("truncate_prompt_tokens", 0, "out_of_range"),
        ("truncate_prompt_tokens", -2, "out_of_range"),
        ("truncate_prompt_tokens", 257, "out_of_range"),
        ("truncation_side", "middle", "out_of_range"),
        ("priority", 1, "unsupported_parameter"),
        ("cache_salt", "mine", "unsupported_parameter"),
        ("request_id", "mine", "unsupported_parameter"),
        ("stream", True, "unsupported_parameter"),
        ("temperature", 1, "unsupported_parameter"),
    ],
)
def test_parameters_that_are_refused(field: str, value: Any, code: str) -> None:
    assert refusal("/v1/embeddings", {"input": "x", field: value})[:2] == (code, field)


@EACH
def test_null_and_neutral_values_ask_for_nothing(table: Table) -> None:
    protocol, body = PROTOCOLS[table.path], BODIES[table.path]
    plain = parts_of(inference_of(protocol, body).request)
    nulls = {item.name: None for item in table.parameters if item.name not in body} | {"unknown": None}
    assert parts_of(inference_of(protocol, body | nulls).request) == plain
    neutral = [(item.name, value) for item in table.parameters for value in item.neutral]
    assert ("priority", 0) in neutral
    for name, value in neutral:
        assert parts_of(inference_of(protocol, body | {name: value}).request) == plain, name


@EACH
def test_nothing_that_is_refused_reaches_an_engine(table: Table) -> None:
    for item in table.parameters:
        if item.treatment is Treatment.REFUSED:
            assert refusal(table.path, BODIES[table.path] | {item.name: "surely not neutral"})[:2] == ("unsupported_parameter", item.name)


@pytest.mark.parametrize(
    ("given", "texts"),
    [(["a", "b"], ["a", "b"]), ("a", ["a"]), ([{"text": "a"}, "b"], ["a", "b"]), ([{"text": "a", "title": "t"}, ""], ["a", ""])],
)
def test_documents_are_strings_or_objects(given: Any, texts: list[str]) -> None:
    body = {"query": "q", "documents": given, "max_tokens_per_doc": 5, "max_tokens_per_query": 6, "top_n": 1, "return_documents": False}
    expected = {"text_1": ["q"], "text_2": texts, "max_tokens_per_doc": 5, "max_tokens_per_query": 6}
    assert sent(inference_of(Rerank(), body).request) == expected


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"query": None}, "missing_parameter", "query"),
        ({"query": ""}, "empty_input", "query"),
        ({"query": ["q"]}, "invalid_type", "query"),
        ({"documents": None}, "missing_parameter", "documents"),
        ({"documents": []}, "empty_input", "documents"),
        ({"documents": ["a"] * (MAX_INPUTS + 1)}, "too_many_inputs", "documents"),
        ({"documents": [5]}, "invalid_type", "documents"),
        ({"documents": [{"title": "a"}]}, "invalid_type", "documents"),
        ({"documents": {"text": "a"}}, "invalid_type", "documents"),
        ({"top_n": -1}, "out_of_range", "top_n"),
        ({"return_documents": "no"}, "invalid_type", "return_documents"),
        ({"max_tokens_per_doc": 256}, "out_of_range", "max_tokens_per_doc"),
        ({"max_tokens_per_query": 256}, "out_of_range", "max_tokens_per_query"),
        ({"rank_fields": ["title"]}, "unsupported_parameter", "rank_fields"),
        ({"instruction": "rank"}, "unsupported_parameter", "instruction"),
    ],
)
def test_rankings_that_are_refused(change: dict[str, Any], code: str, param: str) -> None:
    assert refusal("/v1/rerank", BODIES["/v1/rerank"] | change)[:2] == (code, param)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_scores_take_all_of_vllms_names(first: str, second: str) -> None:
    for one, other in (("q", "a"), ("q", ["a", "b"]), (["q", "r"], ["a", "b"])):
        request = inference_of(Score(), {first: one, second: other}).request
        assert sent(request) == {"text_1": list(one), "text_2": list(other)}
        assert (request.clients_name("text_1"), request.prompt_field) == (first, second)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "missing_parameter", "text_1"),
        ({"text_1": "a"}, "missing_parameter", "text_1"),
        ({"queries": "a", "text_2": "b"}, "missing_parameter", "queries"),
        ({"text_1": "a", "text_2": "b", "data_1": "c"}, "missing_parameter", "data_1"),
        ({"text_1": [], "text_2": "b"}, "empty_input", "text_1"),
        ({"text_1": "a", "text_2": []}, "empty_input", "text_2"),
        ({"text_1": ["a", "b"], "text_2": ["c"]}, "out_of_range", "text_1"),
        ({"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}, "out_of_range", "text_1"),
        ({"text_1": "a", "text_2": ["c", 5]}, "invalid_type", "text_2"),
        ({"text_1": "a", "text_2": "b", "max_tokens_per_doc": 999}, "out_of_range", "max_tokens_per_doc"),
    ],
)
def test_scores_that_are_refused(body: dict[str, Any], code: str, param: str) -> None:
    assert refusal("/v1/score", body)[:2] == (code, param)


def test_token_ids_that_do_not_fit_are_refused_before_an_engine_is_asked() -> None:
    code, param, message = refusal("/v1/embeddings", {"input": [[1] * 257]})
    assert (code, param) == ("context_length_exceeded", "input")
    assert message.startswith("This model's maximum context length is 256 tokens. However, your prompt has 257 tokens")
    inference_of(Embeddings(), {"input": [[1] * 256]})
    inference_of(Embeddings(), {"input": [[1] * 257], "truncate_prompt_tokens": -1})


def test_a_text_that_is_cut_is_bounded_from_the_side_that_is_kept() -> None:
    text = "a" * 10_000 + "b" * 10_000
    for extra, found in (
        ({"truncate_prompt_tokens": 2}, "a" * 128),
        ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, "a" * 128),
        ({"truncate_prompt_tokens": 2, "truncation_side": "left"}, "b" * 128),
        ({"truncate_prompt_tokens": -1}, text[: 256 * 64]),
        ({"truncation_side": "left"}, text),
    ):
        assert sent(inference_of(Embeddings(), {"input": text} | extra).request)["input"] == [found]


@pytest.mark.parametrize(
    ("limits", "query", "document"),
    [
        ({}, 9000, 9000),
        ({"truncate_prompt_tokens": 2}, 128, 128),
        ({"max_tokens_per_query": 3}, 192, 9000),
        ({"max_tokens_per_doc": 3}, 9000, 192),
        ({"max_tokens_per_query": 3, "truncate_prompt_tokens": -1}, 192, 9000),
        ({"max_tokens_per_query": 0, "max_tokens_per_doc": 0}, 9000, 9000),
    ],
)
def test_queries_and_documents_that_are_cut_are_bounded(limits: dict[str, int], query: int, document: int) -> None:
    body = {"query": "q" * 9000, "documents": ["d" * 9000]} | limits
    found = sent(inference_of(Rerank(), body).request)
    assert (len(found["text_1"][0]), len(found["text_2"][0])) == (query, document)


@pytest.mark.parametrize(
    ("given", "forwarded"),
    [
        # The tokenizer's own truncation keeps the special token at the end, which vLLM's explicit one cuts off.
        ({"truncate_prompt_tokens": 5, "truncation_side": "right"}, {"truncate_prompt_tokens": 5}),
        ({"truncate_prompt_tokens": 5, "truncation_side": "left"}, {"truncate_prompt_tokens": 5, "truncation_side": "left"}),
        ({"truncate_prompt_tokens": -1}, {"truncate_prompt_tokens": -1}),
        ({"truncation_side": "left"}, {}),
    ],
)
def test_truncation(given: dict[str, Any], forwarded: dict[str, Any]) -> None:
    assert sent(inference_of(Embeddings(), {"input": "x"} | given).request) == {"input": ["x"]} | forwarded


@pytest.mark.parametrize(
    ("message", "param", "code", "blamed", "words"),
    [
        (
            "Model 'base' does not support Matryoshka embeddings; dimensions must be unset (received dimensions=64).",
            None,
            "unsupported_parameter",
            "dimensions",
            "The vectors of the model 'asked' have a fixed length",
        ),
        ("Model 'base' only supports dimensions in range [1, 384], got 999.", None, "out_of_range", "dimensions", "in range [1, 384]"),
        ("Model 'base' only supports Matryoshka dimensions [64], got 9.", None, "out_of_range", "dimensions", "dimensions [64]"),
        ("The decoder prompt cannot be empty", None, "empty_input", "input", "without a token"),
        ("Token id 99999 is out of vocabulary", None, "out_of_range", "input", "Token id 99999"),
        (
            "This model's maximum context length is 256 tokens. However, your prompt contains at least 257 input tokens, which exceeds. "
            "(parameter=input_tokens, value=257)",
            "input_tokens",
            "context_length_exceeded",
            "input",
            "your prompt contains at least 257 input tokens. Please shorten it.",
        ),
        ("11 validation errors:\n  {'type': 'x'}", "body.encoding_format", "invalid_request", "encoding_format", "is not valid"),
    ],
)
def test_what_the_engine_refuses_is_named_in_the_clients_words(message: str, param: str | None, code: str, blamed: str, words: str) -> None:
    text = json.dumps({"error": {"message": message, "type": "BadRequestError", "param": param, "code": 400}}).encode()
    error = meaning(400, text, "internal", inference_of(Embeddings(), {"input": "x"}).request, 256)
    assert isinstance(error, InvalidRequest)
    assert (error.error_code, error.param) == (code, blamed)
    assert words in error.message
