"""Bad adapters are refused with their code and a message that helps; good ones pass."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmaas.adapters.config import CHECKED_KEYS, HARMLESS_KEYS, MAX_CONFIG_BYTES, UNSUPPORTED_KEYS
from lmaas.adapters.validation import check_file_names
from lmaas.errors import InvalidAdapter, TooLarge
from lmaas.types import BaseModelShapes
from tests.support.adapters import ALL, HIDDEN, PREFIX, Tensors, base, check, config, encode, pack, refused, tensors
from tests.support.effort import tries

Q0 = f"{PREFIX}model.layers.0.self_attn.q_proj"
BASE = base()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapter") / "adapter_model.safetensors"


# Good adapters


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("engine", ["float32", "float16", "bfloat16"])
def test_a_good_adapter(file: Path, dtype: str, engine: str) -> None:
    facts = check(file, config(), tensors(dtype=dtype), base(engine))
    assert facts.rank == 4
    assert facts.target_modules == ("q_proj", "v_proj")
    assert len(facts.records) == 8
    assert not facts.left_out
    assert facts.config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "revision": None,
        "inference_mode": True,
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


@pytest.mark.parametrize(
    "changes",
    [
        *({"task_type": task} for task in (None, "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "MADE_UP")),
        {"peft_type": None},
        {"peft_type": "lora"},
        {"lora_alpha": 0.5},
        {"lora_alpha": -8},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"bias": None},
        {"fan_in_fan_out": True},
        {"rank_pattern": {}, "alpha_pattern": {}},
        {"rank_pattern": None, "alpha_pattern": None},
        {"rank_pattern": {"(a+)+$": 8}, "alpha_pattern": {"(a+)+$": 3, "k_proj": 5}},
        {"rank_pattern": {".*": 4}, "alpha_pattern": {"q_proj|v_proj": 8}, "r": 64},
        {"ensure_weight_tying": True},
        {"ensure_weight_tying": None},
        {"use_rslora": True},
        {"use_rslora": None},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"target_modules": None},
        {"target_modules": r"(a+)+$"},
        {"target_modules": "all-linear"},
        {"layers_to_transform": [0, 1]},
        {"layers_to_transform": [0, 1, 2, -1]},
        {"layers_to_transform": []},
        {"exclude_modules": r"(a+)+$", "layers_pattern": "layers", "revision": "main", "peft_version": "0.21.2"},
        {"megatron_core": "megatron.core", "megatron_config": None, "loftq_config": {}, "qalora_group_size": 16},
        {"auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}},
        {"auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama", "unsloth_fixed": True}},
        {"runtime_config": {"ephemeral_gpu_offload": False}},
        {"a_key_of_next_year": None, "another": False, "and": {}, "one": [], "more": "", "nested": {"a": [False, {}]}},
        {"enable_lora": None, "merge_weights": True},
        {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]},
        {"loftq_config": {"loftq_bits": 4}, "corda_config": {"verbose": True}, "eva_config": {"rho": 2.0}},
        {"unsloth_version": "2026.1", "transformers_version": "5.19.0", "seed": 7, "learning_rate": 1e-4, "training_args": {"a": [1]}},
        {"lora_dtype": "AUTO", "lorap_lr_ratio": 16, "lorap_emb_lr": 1e-6},
    ],
)
def test_harmless_configs(file: Path, changes: dict[str, Any]) -> None:
    facts = check(file, config(**changes), tensors())
    assert set(facts.config) == set(check(file, config(), tensors()).config)
    assert facts.config["lora_alpha"] == changes.get("lora_alpha", 8)
    assert facts.config["use_rslora"] is bool(changes.get("use_rslora"))
    assert facts.config["target_modules"] == ["q_proj", "v_proj"]


def test_targets_come_from_the_tensors(file: Path) -> None:
    facts = check(file, config(target_modules=["nonsense"]), tensors(leaves=ALL))
    assert facts.target_modules == tuple(sorted(ALL))
    assert facts.config["target_modules"] == sorted(ALL)


def test_an_adapter_of_some_layers_lists_its_modules(file: Path) -> None:
    facts = check(file, config(layers_to_transform=1), tensors(layers=[1]))
    assert facts.target_modules == ("q_proj", "v_proj")
    assert facts.config["target_modules"] == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]


@pytest.mark.parametrize("rank", [1, 16])
def test_the_limits_of_rank(file: Path, rank: int) -> None:
    assert check(file, config(r=rank), tensors(rank=rank)).rank == rank


def test_one_module_that_acts_is_enough(file: Path) -> None:
    content = tensors()
    for name in list(content)[2:]:
        content[name] = ("F32", np.zeros_like(content[name][1]))
    check(file, config(), content)


# Bad configs


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"{",
        b"\x80\x04N.",
        b'{"r":4,"r":4}',
        b'{"r":NaN}',
        b'{"lora_alpha":1e999}',
        b'{"r":' + b"9" * 5000 + b"}",
        b'{"a":' + b"[" * 60_000,
        b'{"a":' + b"[" * 400 + b"]" * 400 + b"}",
        b'{"peft_type":"\\udfff"}',
    ],
)
def test_a_config_that_is_no_strict_json(file: Path, content: bytes) -> None:
    assert refused(file, content, tensors()).error_code == "invalid_json"


def test_the_largest_config(file: Path) -> None:
    check(file, config().ljust(MAX_CONFIG_BYTES), tensors())
    with pytest.raises(TooLarge) as caught:
        check(file, config().ljust(MAX_CONFIG_BYTES + 1), tensors())
    assert caught.value.status == 413


@pytest.mark.parametrize("rank", [0, -1, 17, 10**18, True, 4.0, "4", None, [4]])
def test_ranks(file: Path, rank: object) -> None:
    error = refused(file, config(r=rank), tensors())
    assert error.error_code == "rank_not_supported"
    assert "from 1 to 16" in error.message


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "LOHA"},
        {"peft_type": "ADALORA"},
        {"peft_type": ["LORA"]},
        {"task_type": ["CAUSAL_LM"]},
        {"task_type": 7},
        {"lora_alpha": True},
        {"lora_alpha": "8"},
        {"lora_alpha": None},
        {"use_rslora": 1},
        {"use_rslora": "true"},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": "lm_head"},
        {"modules_to_save": ["score", "lm_head"]},
        {"trainable_token_indices": [0]},
        {"bias": "some"},
        {"bias": True},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": {"q_proj": True}},
        {"rank_pattern": {"q_proj": 4.0}},
        {"rank_pattern": {"q_proj": None}},
        {"rank_pattern": ["q_proj"]},
        {"rank_pattern": "q_proj"},
        {"alpha_pattern": {"q_proj": "16"}},
        {"alpha_pattern": {"q_proj": [16]}},
        {"alpha_pattern": 7},
        {"ensure_weight_tying": "yes"},
        {"enable_lora": [True, False, True]},
        {"lora_bias": True},
        {"layer_replication": [[0, 1], [0, 1]]},
        {"megatron_config": {"a": 1}},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
        {"init_lora_weights": ["gaussian"]},
        {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil.transformers"}},
        {"auto_mapping": "evil"},
        {"target_modules": [1]},
        {"target_modules": {"a": 1}},
        {"target_parameters": ["experts.gate_up_proj"]},
        {"alora_invocation_tokens": [1, 2]},
        {"use_qalora": True},
        {"use_bdlora": {"nblocks": 2}},
        {"layers_to_transform": [0]},
        {"layers_to_transform": [True, False]},
        {"layers_to_transform": [[0], 1]},
        {"layers_to_transform": "0"},
        {"a_key_of_next_year": True},
        {"a_key_of_next_year": 0},
        {"\u202e": 1},
    ],
    ids=str,
)
def test_unsupported_configs(file: Path, changes: dict[str, Any]) -> None:
    error = refused(file, config(**changes), tensors())
    assert error.error_code == "unsupported_adapter"
    assert error.param == "adapter_config.json"
    assert any(ascii(key).strip("'") in error.message for key in changes)


def test_missing_keys(file: Path) -> None:
    """Missing keys have PEFT's own defaults: rank 8, alpha 8."""
    facts = check(file, b"{}", tensors(rank=8))
    assert (facts.config["r"], facts.config["lora_alpha"], facts.config["use_rslora"]) == (8, 8, False)
    assert refused(file, b"{}", tensors(rank=4)).error_code == "rank_not_supported"


# Bad tensors


def renamed(change: Callable[[str], str]) -> Tensors:
    return {change(name): value for name, value in tensors().items()}


def with_one(name: str, array: Any, dtype: str = "F32") -> Tensors:
    return {**tensors(), name: (dtype, encode(np.asarray(array), dtype))}


def without(*names: str) -> Tensors:
    return {name: value for name, value in tensors().items() if name not in names}


@pytest.mark.parametrize(
    ("content", "code", "named"),
    [
        ({}, "no_target_modules", "no tensors"),
        (renamed(lambda n: n.replace("self_attn", "attention")), "no_target_modules", "model.layers.0.attention.q_proj"),
        (renamed(lambda n: n.replace("q_proj", "Wqkv").replace("v_proj", "Wo")), "no_target_modules", "Wqkv"),
        (renamed(lambda n: n.replace("model.layers", "transformer.h")), "no_target_modules", "transformer.h.0"),
        (renamed(lambda n: n.removeprefix(PREFIX).removeprefix("model.")), "no_target_modules", "AutoModelForCausalLM"),
        (renamed(lambda n: "module." + n), "no_target_modules", "module.base_model"),
        ({**tensors(), **renamed(lambda n: n.removeprefix(PREFIX))}, "invalid_safetensors", "twice"),
        (renamed(lambda n: PREFIX + n), "no_target_modules", PREFIX),
        (renamed(lambda n: n.replace("lora_A", "lora_a").replace("lora_B", "lora_b")), "no_target_modules", "lora_a"),
        (tensors(base(layers=3)), "base_model_mismatch", "layers.2"),
        ({**tensors(), f"{PREFIX}pooler.dense.lora_A.weight": tensors()[f"{Q0}.lora_A.weight"]}, "unsupported_adapter", "exclude_modules"),
        ({**tensors(), f"{Q0}x.lora_A.weight": tensors()[f"{Q0}.lora_A.weight"]}, "no_target_modules", "q_projx"),
        (renamed(lambda n: n.replace(".weight", ".default.weight")), "unsupported_adapter", "save_pretrained"),
        (with_one(f"{Q0}.lora_magnitude_vector", np.ones(HIDDEN)), "unsupported_adapter", "DoRA"),
        (with_one(f"{PREFIX}model.embed_tokens.lora_embedding_A", np.ones((4, 32))), "invalid_safetensors", "no lora_B"),
        (with_one(f"{PREFIX}model.embed_tokens.lora_A.weight", np.ones((4, 32))), "no_target_modules", "lora_embedding_A"),
        (with_one(f"{PREFIX}lm_head.lora_embedding_A", np.ones((4, 16))), "no_target_modules", "lora_A.weight"),
        (with_one(f"{PREFIX}model.embed_tokens.weight", np.ones((32, 16))), "unsupported_adapter", "save_embedding_layers=False"),
        (with_one(f"{PREFIX}lm_head.base_layer.weight", np.ones((32, 16))), "unsupported_adapter", "save_embedding_layers=False"),
        (with_one(f"{Q0}.base_layer.weight", np.ones((16, 16))), "unsupported_adapter", "base weights"),
        (with_one(f"{PREFIX}lm_head.lora_A.weight", np.ones((4, 16))), "invalid_safetensors", "no lora_B"),
        (
            with_one(f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta", np.ones((1, 16))),
            "unsupported_adapter",
            "trainable_token",
        ),
        (with_one(f"{PREFIX}lm_head.modules_to_save.weight", np.ones((32, 16))), "unsupported_adapter", "modules_to_save"),
        (with_one(f"{PREFIX}model.norm.weight", np.ones(16)), "unsupported_adapter", "model.norm"),
        (with_one(f"{Q0}.bias", np.ones(16)), "unsupported_adapter", "q_proj.bias"),
        (with_one(f"{Q0}.lora_B.bias", np.ones(16)), "unsupported_adapter", "lora_bias"),
        (tensors(dtype="I32"), "unsupported_adapter", "I32"),
        (without(f"{Q0}.lora_A.weight"), "invalid_safetensors", "no lora_A"),
        (without(f"{Q0}.lora_B.weight"), "invalid_safetensors", "no lora_B"),
        (with_one(f"{Q0}.lora_A.weight", np.ones((4, 17))), "base_model_mismatch", "[rank, 16]"),
        (with_one(f"{Q0}.lora_A.weight", np.ones((16, 4))), "base_model_mismatch", "[rank, 16]"),
        (with_one(f"{Q0}.lora_B.weight", np.ones((8, 4))), "base_model_mismatch", "[16, rank]"),
        (with_one(f"{Q0}.lora_A.weight", np.ones(64)), "base_model_mismatch", "[64]"),
        (with_one(f"{Q0}.lora_A.weight", np.ones((1, 4, 16))), "base_model_mismatch", "[1, 4, 16]"),
        (with_one(f"{Q0}.lora_A.weight", np.ones((8, 16))), "rank_not_supported", "rank 8"),
        (with_one(f"{Q0}.lora_B.weight", np.ones((16, 2))), "rank_not_supported", "rank 2"),
        (with_one(f"{Q0}.lora_A.weight", np.ones((0, 16))), "rank_not_supported", "rank 0"),
        (tensors(rank=17), "rank_not_supported", "from 1 to 16"),
        (renamed(lambda n: n.replace(".layers.", "..")), "invalid_tensor_name", "model..0"),
        (renamed(lambda n: "../" + n), "invalid_tensor_name", "../"),
    ],
)
def test_bad_tensors(file: Path, content: Tensors, code: str, named: str) -> None:
    error = refused(file, config(), content)
    assert error.error_code == code
    assert error.param == "adapter_model.safetensors"
    assert named in error.message


def test_an_adapter_of_a_wider_base(file: Path) -> None:
    wide = BaseModelShapes({name: (o * 2, i * 2) for name, (o, i) in BASE.linears.items()}, "bfloat16", 16)
    assert refused(file, config(), tensors(wide)).error_code == "base_model_mismatch"


@pytest.mark.parametrize("content", [b"PK\x03\x04" + b"\0" * 90, b"\x80\x04" + b"\0" * 90])
def test_other_formats_are_refused(file: Path, content: bytes) -> None:
    assert refused(file, config(), content).error_code == "unsafe_format"


# File names


def test_the_two_files() -> None:
    check_file_names(["adapter_model.safetensors", "adapter_config.json"])


UNSAFE = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".PKL", ".bin.gz", ".pt.safetensors")
EXTRA = (
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md", "modeling.py", "model.safetensors", "", "."),
    *(
        "adapter_config.json",
        "adapter_config.json\0",
        "adapter_config.json ",
        "Adapter_config.json",
        "../adapter_config.json",
        "\u202e" * 500,
    ),
)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        *((f"adapter_model{suffix}", "unsafe_format") for suffix in UNSAFE),
        *((name, "unexpected_file") for name in EXTRA),
    ],
)
def test_other_files(name: str, code: str) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        check_file_names(["adapter_model.safetensors", "adapter_config.json", name])
    assert caught.value.error_code == code
    caught.value.message.encode("ascii")


@pytest.mark.parametrize("names", [[], ["adapter_config.json"], ["adapter_model.safetensors"]])
def test_missing_files(names: list[str]) -> None:
    with pytest.raises(InvalidAdapter, match="is missing") as caught:
        check_file_names(names)
    assert caught.value.error_code == "invalid_adapter"


# Fuzz

GOOD = pack(tensors(dtype="BF16"))
OUTCOMES = {
    *("passed", "invalid_safetensors", "unsafe_format", "invalid_tensor_name", "rank_not_supported", "non_finite_weights", "no_effect"),
    *("base_model_mismatch", "no_target_modules", "unsupported_adapter", "invalid_json"),
}


def outcome(file: Path, config_bytes: bytes, content: bytes) -> str:
    try:
        facts = check(file, config_bytes, content)
    except InvalidAdapter as error:
        error.message.encode("ascii")
        return error.error_code
    return "passed" if facts.config["target_modules"] == ["q_proj", "v_proj"] and facts.rank == 4 else "passed with other facts"


@settings(max_examples=tries(300), deadline=2000)
@given(
    edits=st.lists(st.tuples(st.integers(0, len(GOOD) - 1) | st.integers(8, 1100), st.binary(max_size=3), st.integers(0, 3)), max_size=4),
    cut=st.none() | st.integers(0, len(GOOD)),
)
def test_mutated_files(file: Path, edits: list[tuple[int, bytes, int]], cut: int | None) -> None:
    content = bytearray(GOOD)
    for position, new, remove in edits:
        content[position : position + remove] = new
    assert outcome(file, config(), bytes(content[:cut])) in OUTCOMES


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["LORA", "none", "gaussian", 4, "transformers"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = sorted(CHECKED_KEYS | HARMLESS_KEYS | set(UNSUPPORTED_KEYS))


@settings(max_examples=tries(500), deadline=2000)
@given(changes=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), JSON, max_size=3))
def test_mutated_configs(file: Path, changes: dict[str, Any]) -> None:
    assert outcome(file, config(**changes), GOOD) in OUTCOMES


def test_a_large_adapter_is_quick(file: Path) -> None:
    wide = BaseModelShapes({f"model.layers.{i}.mlp.up_proj": (4096, 4096) for i in range(16)}, "bfloat16", 16)
    content = tensors(wide, rank=16, leaves=["up_proj"], dtype="BF16")
    started = time.process_time()
    facts = check(file, config(r=16), content, wide)
    assert len(facts.records) == 32
    assert time.process_time() - started < 10
