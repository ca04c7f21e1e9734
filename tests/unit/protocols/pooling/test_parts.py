"""Requests with many inputs are divided into parts, and the responses are joined into one."""

import base64
import json
from array import array
from typing import Any

import pytest

from lmaas.protocols.pooling.embeddings import Embeddings
from lmaas.protocols.pooling.ranking import Rerank, Score
from lmaas.protocols.pooling.requests import MAX_INPUTS, PART_INPUTS, PART_TOKENS, divide
from tests.unit.protocols.pooling.build import base_model, embedded, inference_of, parts_of, scored, vector


@pytest.mark.parametrize(
    ("sizes", "most_inputs", "most_tokens", "parts"),
    [
        ([5], 4, 10, [[0]]),
        ([1, 2, 3], 4, 10, [[0, 1, 2]]),
        ([1, 2, 3, 4], 2, 10, [[3, 2], [1, 0]]),
        ([1, 1, 1, 1, 1], 2, 10, [[0, 1], [2, 3], [4]]),
        ([4, 4, 4], 4, 8, [[0, 1], [2]]),
        ([50, 4, 60], 4, 8, [[2], [0], [1]]),
        ([0, 0], 1, 0, [[0], [1]]),
    ],
)
def test_inputs_are_divided_with_the_largest_first(sizes: list[int], most_inputs: int, most_tokens: int, parts: list[list[int]]) -> None:
    assert divide(sizes, most_inputs, most_tokens) == parts


@pytest.mark.parametrize(
    ("slots", "inputs", "parts", "weight"),
    [
        (16, 1, 1, 1),
        (16, 3, 1, 3),
        (16, 16, 1, 4),
        (16, 2048, 128, 4),
        (64, 2048, 32, 16),
        (256, 2048, 32, 64),
        (300, 2048, 32, 64),
        (1, 3, 3, 1),
        (2, 2, 1, 1),
    ],
)
def test_a_request_never_has_more_in_the_engine_than_it_can_run_nor_takes_a_whole_replica(
    slots: int, inputs: int, parts: int, weight: int
) -> None:
    request = inference_of(Embeddings(), {"input": ["x"] * inputs}, base_model(slots)).request
    assert (request.parts, request.weight) == (parts, weight)
    assert max(len(body["input"]) for body in parts_of(request)) <= min(slots, PART_INPUTS)


@pytest.mark.parametrize(
    ("body", "slots", "most"),
    [
        # The query is computed once for each part.
        ({"text_1": "q", "text_2": ["x"] * 100}, 16, 15),
        ({"text_1": ["q"] * 100, "text_2": ["x"] * 100}, 16, 8),
        ({"text_1": ["q"] * 100, "text_2": ["x"] * 100}, 1, 1),
        ({"text_1": "q", "text_2": ["x"] * 100}, 1, 1),
    ],
)
def test_pairs_take_the_slots_of_both_sides(body: dict[str, Any], slots: int, most: int) -> None:
    request = inference_of(Score(), body, base_model(slots)).request
    assert max(len(part["text_2"]) for part in parts_of(request)) == most
    assert request.weight == max(1, slots // 4)


def test_long_inputs_make_smaller_parts() -> None:
    request = inference_of(Embeddings(), {"input": [[1] * 4096] * 10}, base_model(256, context=PART_TOKENS)).request
    assert [len(part["input"]) for part in parts_of(request)] == [2] * 5
    assert request.estimate(PART_TOKENS) == (40_960, 0)


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        # By the estimate a document has three tokens and a query seven, and the query is computed in both parts.
        ({"queries": "q" * 20, "documents": ["d" * 8] * 20}, 20 * 3 + 2 * 7),
        ({"queries": ["q" * 20] * 20, "documents": ["d" * 8] * 20}, 20 * (3 + 7)),
        ({"queries": "q" * 20, "documents": ["d" * 8], "truncate_prompt_tokens": 2}, 2 + 2),
    ],
)
def test_the_estimate_has_both_sides_of_the_pairs(body: dict[str, Any], tokens: int) -> None:
    request = inference_of(Score(), body).request
    assert request.estimate(256) == (tokens, 0)


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("count", [1, 5, 16, 17, MAX_INPUTS])
def test_embeddings_are_joined_in_the_order_of_the_inputs(count: int, as_text: bool) -> None:
    inputs = ["word " * (1 + number % 7) + str(number) for number in range(count)]
    inference = inference_of(Embeddings(), {"input": inputs, "encoding_format": "base64" if as_text else "float"})
    answer = Embeddings().answer(inference)
    assert (answer.usage, answer.usage_if_left) == (None, {})
    for body in parts_of(inference.request):
        assert not answer.complete
        answer.take(embedded(body))
    assert answer.complete
    tokens = sum(map(len, inputs))
    assert answer.usage == answer.usage_if_left == {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
    found = json.loads(answer.end())
    assert list(found) == ["object", "data", "model", "usage"]
    assert (found["object"], found["model"]) == ("list", "asked")
    assert found["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert [each["index"] for each in found["data"]] == list(range(count))
    assert {each["object"] for each in found["data"]} == {"embedding"}
    vectors = [array("f", base64.b64decode(each["embedding"])).tolist() if as_text else each["embedding"] for each in found["data"]]
    assert vectors == [vector(each) for each in inputs]


def test_numbers_and_the_models_name_are_passed_on_as_they_were_written() -> None:
    inference = inference_of(Embeddings(), {"model": 'a "quoted" näme', "input": "x"})
    answer = Embeddings().answer(inference)
    raw = b'{"id":"embd-1","object":"list","created":1,"model":"internal","data":['
    raw += b'{"index":0,"object":"embedding","embedding":[0.1000,-1e-07]}]'
    answer.take(raw + b',"usage":{"prompt_tokens":4,"total_tokens":4}}')
    assert answer.end() == (
        b'{"object":"list","data":[{"object":"embedding","index":0,"embedding":[0.1000,-1e-07]}],"model":"a \\"quoted\\" n\xc3\xa4me",'
        b'"usage":{"prompt_tokens":4,"total_tokens":4}}'
    )


def test_a_request_that_its_client_has_left_counts_the_parts_that_were_finished() -> None:
    inference = inference_of(Embeddings(), {"input": ["abc"] * 20})
    answer = Embeddings().answer(inference)
    answer.take(embedded(parts_of(inference.request)[0]))
    assert not answer.complete
    assert answer.usage_if_left == {"prompt_tokens": 48, "completion_tokens": 0, "total_tokens": 48}


BODY = {"input": ["a", "b"]}


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b'{"data":[]}',
        embedded(BODY)[:-1],
        embedded({"input": ["a"]}),
        embedded({"input": ["a", "b", "c"]}),
        embedded(BODY, usage={}),
        embedded(BODY, usage={"prompt_tokens": "many"}),
        embedded(BODY, data=[{"index": 0, "embedding": [1]}, {"index": 0, "embedding": [1]}]),
        embedded(BODY, data=[{"index": 0, "embedding": [1]}, {"index": 5, "embedding": [1]}]),
        # vLLM's response for inputs that were aborted.
        embedded(BODY, data=[{"index": 0, "embedding": [1]}, {"index": 1, "embedding": []}]),
        embedded(BODY, data=[{"index": 0, "embedding": ""}, {"index": 1, "embedding": ""}]),
    ],
)
def test_bytes_that_are_no_answer_are_an_error(text: bytes) -> None:
    answer = Embeddings().answer(inference_of(Embeddings(), BODY))
    with pytest.raises(ValueError, match=r"."):
        answer.take(text)
    assert not answer.complete


TEXTS = ["x" * (1 + number * 7 % 50) for number in range(50)]


def test_scores_are_joined_in_the_order_of_the_pairs() -> None:
    first = ["-" if number % 3 else "+" for number in range(50)]
    inference = inference_of(Score(), {"queries": first, "documents": TEXTS})
    answer = Score().answer(inference)
    for body in parts_of(inference.request):
        answer.take(scored(body))
    found = json.loads(answer.end())
    assert list(found) == ["id", "object", "model", "data", "usage"]
    assert (found["id"], found["object"], found["model"]) == ("score-req_1", "list", "asked")
    expected = [len(text) / 8 * (-1 if sign == "-" else 1) for sign, text in zip(first, TEXTS, strict=True)]
    assert found["data"] == [{"index": index, "object": "score", "score": score} for index, score in enumerate(expected)]
    assert found["usage"] == {"prompt_tokens": 70, "total_tokens": 70}


def test_a_ranking_shows_documents_that_were_cut_as_they_came() -> None:
    text = "x" * 9000
    inference = inference_of(Rerank(), {"query": "+", "documents": [text], "max_tokens_per_doc": 1})
    answer = Rerank().answer(inference)
    answer.take(scored(parts_of(inference.request)[0]))
    assert json.loads(answer.end())["results"] == [{"index": 0, "relevance_score": 8.0, "document": {"text": text}}]


@pytest.mark.parametrize(
    ("extra", "count", "shows"),
    [({}, 50, True), ({"top_n": 3}, 3, True), ({"top_n": 99, "return_documents": False}, 50, False), ({"top_n": 0}, 50, True)],
)
def test_a_ranking_is_over_all_parts(extra: dict[str, Any], count: int, shows: bool) -> None:
    inference = inference_of(Rerank(), {"query": "+", "documents": [{"text": text} for text in TEXTS]} | extra)
    assert inference.request.parts > 1
    answer = Rerank().answer(inference)
    for body in parts_of(inference.request):
        answer.take(scored(body))
    found = json.loads(answer.end())
    assert list(found) == ["id", "model", "results", "usage"]
    assert (found["id"], found["model"]) == ("rerank-req_1", "asked")
    order = sorted(range(50), key=lambda index: -len(TEXTS[index]))[:count]
    expected = [{"index": index, "relevance_score": len(TEXTS[index]) / 8} for index in order]
    assert [{name: each[name] for name in ("index", "relevance_score")} for each in found["results"]] == expected
    assert [each.get("document") for each in found["results"]] == [{"text": TEXTS[index]} if shows else None for index in order]
