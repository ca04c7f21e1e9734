"""The modules that an adapter adapts, with their ranks and alphas: patterns, names without a prefix, embeddings and the head."""

import re
from pathlib import Path
from typing import Any

import pytest

from lmaas.adapters.validation import AdapterFacts
from lmaas.errors import TooLarge
from lmaas.types import BaseModelShapes
from tests.support.adapters import ALL, ATTENTION, HIDDEN, PREFIX, base, check, config, refused, tensors

BASE = base()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapter") / "adapter_model.safetensors"


K1 = "model.layers.1.self_attn.k_proj"


def patterns_of(facts: AdapterFacts) -> dict[str, Any]:
    """Return the ranks and alphas of the canonical config."""
    return {key: facts.config[key] for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern") if key in facts.config}


def test_ranks_come_from_the_tensors_and_alphas_from_the_patterns(file: Path) -> None:
    content = tensors(leaves=ATTENTION, ranks={K1: 16})
    changes = {
        "rank_pattern": {"layers.1.self_attn.k_proj": 16, "k_proj": 4},
        "alpha_pattern": {r".*\.0\..*_proj": 8.0, "q_proj|o_proj": 2},
    }
    facts = check(file, config(**changes), content)
    assert facts.rank == 16
    assert patterns_of(facts) == {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {r"^(?:model\.layers\.1\.self_attn\.k_proj)": 16},
        "alpha_pattern": {r"^(?:model\.layers\.1\.self_attn\.o_proj|model\.layers\.1\.self_attn\.q_proj)": 2},
    }


def test_what_no_pattern_changes_is_stored_as_without_patterns(file: Path) -> None:
    """The hash of an adapter that was stored before patterns were supported stays the same."""
    plain = check(file, config(), tensors()).config
    assert (
        check(file, config(r=8, rank_pattern={"proj": 8, ".*": 4}, lora_alpha=3, alpha_pattern={"[qv]_proj": 8}), tensors()).config == plain
    )


def test_the_order_in_which_patterns_gave_ranks_is_lost_when_peft_sorts_them(file: Path) -> None:
    facts = check(
        file, config(rank_pattern={".*k_proj": 8, "layers.1.*": 16, "q_proj": 4}), tensors(leaves=["k_proj"], rank=8, ranks={K1: 16})
    )
    assert facts.config["rank_pattern"] in ({rf"^(?:{re.escape(K1)})": 16}, {rf"^(?:{re.escape(K1.replace('1', '0'))})": 8})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rank_pattern": {"1.self_attn.k_proj": 8}}, "have rank 16, but rank_pattern gives 8"),
        ({"rank_pattern": {"layers.1": 16}}, "have rank 16, but r is 4"),
        ({"rank_pattern": {"layers.0.*k_proj": 16}}, "have rank 4, but rank_pattern gives 16"),
        ({"rank_pattern": {"k_proj": 16}}, "have rank 4, but rank_pattern gives 16"),
        ({}, "have rank 16, but r is 4"),
        ({"r": 17, "rank_pattern": {"layers.1.self_attn.k_proj": 16}}, "have rank 4, but r is 17"),
    ],
)
def test_ranks_that_contradict_the_tensors(file: Path, changes: dict[str, Any], reason: str) -> None:
    error = refused(file, config(**changes), tensors(leaves=ATTENTION, ranks={K1: 16}))
    assert (error.error_code, error.param) == ("rank_not_supported", "adapter_config.json")
    assert reason in error.message


def test_every_rank_is_within_the_limit(file: Path) -> None:
    error = refused(file, config(rank_pattern={"k_proj": 17}), tensors(leaves=ATTENTION, ranks={K1: 17}))
    assert (error.error_code, error.param) == ("rank_not_supported", "adapter_model.safetensors")
    assert "k_proj' have rank 17" in error.message


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    ("patterns", "reason"),
    [
        ({"(?!v_proj).*": 4}, "(?!v_proj).*"),
        ({r"(q)_proj\1": 4}, "back-references"),
        ({"(a{1000}){1000}": 4}, "repeats too much"),
        ({"(": 4}, "not a valid regular expression"),
        ({"\u202e": 4}, "\\u202e"),
        ({"x" * 2000: 4}, "2000 characters"),
        ({f"k{i}": 4 for i in range(20_000)}, "20000 patterns"),
        ({f"(.?){{200}}{i}": 4 for i in range(1000)}, "too complex"),
    ],
    ids=["look-ahead", "back-reference", "counts", "unclosed", "not ASCII", "long", "many", "complex"],
)
def test_patterns_that_cannot_be_matched(file: Path, key: str, patterns: dict[str, int], reason: str) -> None:
    error = refused(file, config(**{key: patterns}), tensors())
    assert (error.error_code, error.param) == ("unsupported_adapter", "adapter_config.json")
    assert key in error.message
    assert reason in error.message


def test_a_hundred_thousand_patterns(file: Path) -> None:
    with pytest.raises(TooLarge):
        check(file, config(alpha_pattern={f"k{i}": 4 for i in range(100_000)}), tensors())


def test_as_many_different_alphas_as_the_engine_is_given(file: Path) -> None:
    shapes = base(layers=80)
    names = [name for name in shapes.linears if name.endswith("q_proj")]
    content = tensors(shapes, leaves=["q_proj"])
    alphas = {name: i % 65 + 1 for i, name in enumerate(names)}
    facts = check(file, config(alpha_pattern=alphas), content, shapes)
    assert len(facts.config["alpha_pattern"]) == 64
    error = refused(file, config(alpha_pattern=alphas | {names[-1]: 1000}), content, shapes)
    assert "more than 64 different ranks and alphas" in error.message


def test_an_alpha_of_zero_somewhere_and_everywhere(file: Path) -> None:
    facts = check(file, config(alpha_pattern={"q_proj": 0}), tensors())
    assert list(facts.config["alpha_pattern"].values()) in ([0], [8])
    assert refused(file, config(lora_alpha=0), tensors()).error_code == "no_effect"


@pytest.mark.parametrize("changes", [{"lora_alpha": 1e40}, {"alpha_pattern": {"layers.1.*v_proj": -1e40}}])
def test_a_scaling_beyond_the_engines_numbers(file: Path, changes: dict[str, Any]) -> None:
    error = refused(file, config(**changes), tensors(), base("float32"))
    assert (error.error_code, error.param) == ("non_finite_weights", "adapter_config.json")


def test_names_without_the_prefix(file: Path) -> None:
    with_prefix = check(file, config(), tensors())
    without_prefix = check(file, config(), {name.removeprefix(PREFIX): value for name, value in tensors().items()})
    assert without_prefix.config == with_prefix.config


@pytest.mark.parametrize("leaves", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head", *ALL]])
def test_embeddings_and_the_head(file: Path, leaves: list[str]) -> None:
    facts = check(file, config(ensure_weight_tying=len(leaves) > 1), tensors(leaves=leaves))
    assert facts.config["target_modules"] == sorted(leaves)
    assert not facts.left_out


@pytest.mark.parametrize("leaf", ["embed_tokens", "lm_head"])
def test_one_of_two_modules_that_are_tied(file: Path, leaf: str) -> None:
    error = refused(file, config(ensure_weight_tying=True), tensors(leaves=[leaf, "q_proj"]))
    assert error.error_code == "unsupported_adapter"
    assert "ensure_weight_tying" in error.message


@pytest.mark.parametrize("leaf", ["embed_tokens", "lm_head"])
def test_embeddings_where_the_engine_has_no_lora_for_them(file: Path, leaf: str) -> None:
    linears = {name: shape for name, shape in BASE.linears.items() if "layers" in name}
    error = refused(file, config(), tensors(leaves=[leaf, "q_proj"]), BaseModelShapes(linears, "float32", 16))
    assert error.error_code == "unsupported_adapter"
    assert "base models of this architecture" in error.message


@pytest.mark.parametrize("leaf", ["embed_tokens", "lm_head"])
def test_a_larger_vocabulary(file: Path, leaf: str) -> None:
    linears = BASE.linears | {"model.embed_tokens": (HIDDEN, 40), "lm_head": (40, HIDDEN)}
    error = refused(file, config(), tensors(BaseModelShapes(linears, "float32", 16), leaves=[leaf]))
    assert error.error_code == "base_model_mismatch"
    assert "a vocabulary of 40 tokens, but the base model's has 32" in error.message
