"""The kind and the context that a base model's files declare."""

import json
from pathlib import Path
from typing import Any

import pytest

from lmaas.engine.kinds import context_length, declared_kind, fitting_kind
from lmaas.errors import InvalidRequest
from lmaas.states import PoolKind

GENERATE, EMBED = PoolKind.GENERATE, PoolKind.EMBED
POOLING = [{"type": "sentence_transformers.models.Transformer"}, {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]


def write(folder: Path, **files: object) -> None:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("LlamaForCausalLM", GENERATE),
        ("GPT2LMHeadModel", GENERATE),
        ("Gemma3ForConditionalGeneration", GENERATE),
        ("ChatGLMModel", GENERATE),
        ("Qwen2_5OmniModel", GENERATE),
        ("BertModel", EMBED),
        ("XLMRobertaModel", EMBED),
        ("RobertaForMaskedLM", EMBED),
        ("LlamaBidirectionalModel", EMBED),
        ("BgeM3EmbeddingModel", EMBED),
        ("SomethingNew", None),
        ("", None),
    ],
)
def test_an_architecture_says_what_a_model_is_for(tmp_path: Path, architecture: str, kind: PoolKind | None) -> None:
    assert declared_kind(tmp_path, {"architectures": [architecture]}) is kind


@pytest.mark.parametrize("config", [{}, {"architectures": None}, {"architectures": []}, {"architectures": "LlamaModel"}])
def test_a_configuration_may_say_nothing(tmp_path: Path, config: dict[str, Any]) -> None:
    assert declared_kind(tmp_path, config) is None


@pytest.mark.parametrize(
    "architecture",
    ["BertForSequenceClassification", "BertForTokenClassification", "Qwen2ForRewardModel", "BertForQuestionAnswering", "JinaForRanking"],
)
def test_a_model_that_does_neither_is_refused(tmp_path: Path, architecture: str) -> None:
    with pytest.raises(InvalidRequest, match=f"'{architecture}', which neither generates text nor embeds it") as raised:
        declared_kind(tmp_path, {"architectures": [architecture]})
    assert raised.value.param == "source"


def test_a_pooling_module_says_more_than_the_architecture(tmp_path: Path) -> None:
    write(tmp_path, modules=POOLING)
    assert declared_kind(tmp_path, {"architectures": ["Qwen3ForCausalLM"]}) is EMBED


@pytest.mark.parametrize(
    "modules", [{}, [], [1, "Pooling"], [{"type": None}], [{"type": "sentence_transformers.models.Dense"}], [{"type": "x.SpladePooling"}]]
)
def test_other_modules_say_nothing(tmp_path: Path, modules: object) -> None:
    write(tmp_path, modules=modules)
    assert declared_kind(tmp_path, {"architectures": ["Qwen3ForCausalLM"]}) is GENERATE


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 10**5])
def test_damaged_modules_say_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "modules.json").write_bytes(content)
    assert declared_kind(tmp_path, {"architectures": ["BertModel"]}) is EMBED


@pytest.mark.parametrize(
    ("declared", "asked", "kind"),
    [
        (None, None, GENERATE),
        (None, EMBED, EMBED),
        (EMBED, None, EMBED),
        (GENERATE, None, GENERATE),
        (EMBED, EMBED, EMBED),
    ],
)
def test_the_operator_decides_only_where_the_files_say_nothing(declared: PoolKind | None, asked: PoolKind | None, kind: PoolKind) -> None:
    assert fitting_kind(declared, asked) is kind


@pytest.mark.parametrize(
    ("declared", "asked", "words"),
    [(GENERATE, EMBED, "generates text and does not embed it"), (EMBED, GENERATE, "embeds text and does not generate it")],
)
def test_a_wrong_kind_is_refused(declared: PoolKind, asked: PoolKind, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as raised:
        fitting_kind(declared, asked)
    assert raised.value.param == "kind"


ABSOLUTE = {"max_position_embeddings": 514, "position_embedding_type": "absolute"}


@pytest.mark.parametrize(
    ("config", "files", "kind", "longest"),
    [
        ({"max_position_embeddings": 8192}, {"tokenizer_config": {"model_max_length": 512}}, GENERATE, 8192),
        ({}, {}, GENERATE, None),
        ({"max_position_embeddings": "8192"}, {}, GENERATE, None),
        ({"max_position_embeddings": True}, {}, GENERATE, None),
        (ABSOLUTE, {}, EMBED, 514),
        (ABSOLUTE, {"tokenizer_config": {"model_max_length": 512}}, EMBED, 512),
        (ABSOLUTE, {"tokenizer_config": {"model_max_length": 10**30}}, EMBED, 514),
        (ABSOLUTE, {"tokenizer_config": {"model_max_length": 512}, "sentence_bert_config": {"max_seq_length": 256}}, EMBED, 256),
        # A rotary model that was trained on more than its tokenizer's file states.
        (
            {"max_position_embeddings": 2048, "position_embedding_type": "rotary"},
            {"tokenizer_config": {"model_max_length": 512}, "sentence_bert_config": {"max_seq_length": 8192}},
            EMBED,
            8192,
        ),
        (ABSOLUTE | {"position_embedding_type": "rotary"}, {"tokenizer_config": {"model_max_length": 512}}, EMBED, 514),
        (ABSOLUTE, {"sentence_bert_config": {"max_seq_length": None}}, EMBED, 514),
        (ABSOLUTE, {"sentence_bert_config": [], "tokenizer_config": []}, EMBED, 514),
    ],
)  # fmt: skip
def test_the_longest_context(tmp_path: Path, config: dict[str, Any], files: dict[str, object], kind: PoolKind, longest: int | None) -> None:
    write(tmp_path, **files)
    assert context_length(tmp_path, config, kind) == longest
