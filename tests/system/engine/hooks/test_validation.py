"""A grammar that an engine has validated is not validated again."""

import json
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.structured_output import backend_xgrammar

from lmaas.engine.hooks import validation
from lmaas.engine.hooks.validation import MAX_REWRITTEN, Known, digest

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TAG = json.dumps(
    {"structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<f"]},
)


@pytest.fixture
def validated(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The requests that vLLM itself validated, while the hook is installed."""
    real, seen = backend_xgrammar.validate_xgrammar_grammar, list[Any]()

    def validate_xgrammar_grammar(params: Any) -> None:
        seen.append(params)
        real(params)

    monkeypatch.setattr(backend_xgrammar, "validate_xgrammar_grammar", validate_xgrammar_grammar)
    validation.install()
    return seen


def ask(**grammar: Any) -> StructuredOutputsParams:
    params = StructuredOutputsParams(**grammar)
    backend_xgrammar.validate_xgrammar_grammar(SamplingParams(structured_outputs=params))
    return params


@pytest.mark.parametrize(
    "grammar",
    [
        *({"json": SCHEMA}, {"json": json.dumps(SCHEMA)}, {"regex": "(a|b){1,5}"}, {"grammar": 'root ::= "a"'}),
        *({"choice": ["yes", "no"]}, {"structural_tag": TAG}, {"json_object": True}),
    ],
    ids=str,
)
def test_the_second_time_costs_nothing_and_has_the_same_effect(validated: list[Any], grammar: dict[str, Any]) -> None:
    first = ask(**grammar)
    second = ask(**grammar)
    assert first == second
    assert len(validated) == 1
    assert ("choice" in grammar) == (second.grammar is not None and "grammar" not in grammar)


def test_different_grammars_are_different(validated: list[Any]) -> None:
    for grammar in ({"regex": "a"}, {"grammar": 'root ::= "a"'}, {"choice": ["a"]}, {"json": {"const": 1}}, {"json": {"const": True}}):
        ask(**grammar)
    assert len(validated) == 5
    assert ask(choice=["b"]).grammar != ask(choice=["a"]).grammar


@pytest.mark.parametrize("grammar", [{"regex": "("}, {"json": {"type": "string", "pattern": "\\"}}, {"grammar": "no grammar"}], ids=str)
def test_a_wrong_grammar_is_refused_each_time(validated: list[Any], grammar: dict[str, Any]) -> None:
    for _ in range(2):
        with pytest.raises(VLLMValidationError):
            ask(**grammar)
    assert len(validated) == 2


def test_requests_without_a_grammar_pass(validated: list[Any]) -> None:
    backend_xgrammar.validate_xgrammar_grammar(SamplingParams())
    assert validated == []


def test_what_is_no_json_is_validated_each_time(validated: list[Any]) -> None:
    for _ in range(2):
        with pytest.raises(VLLMValidationError):
            ask(json={"const": object()})
    assert len(validated) == 2
    assert digest({"json": {1, 2}}) is None


def test_it_is_installed_once(validated: list[Any]) -> None:
    installed = backend_xgrammar.validate_xgrammar_grammar
    validation.install()
    assert backend_xgrammar.validate_xgrammar_grammar is installed


def test_the_least_recently_used_is_forgotten() -> None:
    known = Known(2)
    for name in (b"a", b"b"):
        known.add(name, {})
    assert known.find(b"a") == {}
    known.add(b"c", {})
    assert [known.find(name) for name in (b"a", b"b", b"c")] == [{}, None, {}]
    assert len(known) == 2


def test_long_texts_are_not_kept() -> None:
    known = Known()
    known.add(b"a", {"choice": None, "grammar": "x" * (MAX_REWRITTEN + 1)})
    assert known.find(b"a") is None


def test_numbers_that_json_cannot_hold_have_digests_of_their_own() -> None:
    values = [float("nan"), None, float("inf"), "NaN", 1, 1.0, True, "1"]
    assert len({digest({"json": {"const": value}}) for value in values}) == len(values)
