"""Adapters as PEFT really writes them all pass, and PEFT reads the canonical config back to the same model."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from lmaas.adapters.safetensors import base_model_shapes
from lmaas.adapters.validation import validate
from lmaas.errors import InvalidAdapter
from lmaas.types import BaseModelShapes

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

# PEFT's and transformers' own warnings are not ours to fix.
pytestmark = pytest.mark.filterwarnings("ignore")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(model_folder: Path) -> BaseModelShapes:
    return BaseModelShapes(base_model_shapes(model_folder), "bfloat16", 16)


def load(folder: Path) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(folder)


def train(model_folder: Path, to: Path, dtype: Any = None, **options: Any) -> Any:
    """An adapter with a B that acts, in a folder as PEFT saves it; returns the adapted model."""
    torch.manual_seed(1)
    options = {"task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "target_modules": ATTENTION, **options}
    model = peft.get_peft_model(load(model_folder), peft.LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.1)
    model.to(dtype).save_pretrained(to)
    return model.eval()


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 20)[None]).logits


def test_the_base_models_linears(base: BaseModelShapes) -> None:
    assert len(base.linears) == 14
    assert base.linears["model.layers.1.self_attn.k_proj"] == (16, 32)
    assert base.linears["model.layers.0.mlp.down_proj"] == (32, 48)


@pytest.mark.parametrize(
    "options",
    [
        *({"r": rank, "target_modules": targets} for rank in (4, 8, 16) for targets in (ATTENTION, "all-linear")),
        {"use_rslora": True},
        {"target_modules": r".*\.(q_proj|down_proj)"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
        {"task_type": None},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"lora_dropout": 0.1, "lora_alpha": 3},
    ],
    ids=str,
)
def test_what_peft_saves_passes_and_loads_again(model_folder: Path, base: BaseModelShapes, tmp_path: Path, options: dict[str, Any]) -> None:
    trained = train(model_folder, tmp_path, **options)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    facts = validate(config.read_bytes(), weights, base)
    assert facts.rank == options.get("r", 8)
    config.write_text(json.dumps(facts.config))
    # Every module of the canonical config must be in the file: a missing one would only be a warning.
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        again = peft.PeftModel.from_pretrained(load(model_folder), tmp_path).eval()
    assert torch.equal(logits(trained), logits(again))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_what_peft_saves_in_each_dtype(model_folder: Path, base: BaseModelShapes, tmp_path: Path, dtype: str) -> None:
    train(model_folder, tmp_path, getattr(torch, dtype))
    assert validate((tmp_path / "adapter_config.json").read_bytes(), tmp_path / "adapter_model.safetensors", base).tensor_count == 16


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"use_dora": True}, "unsupported_adapter"),
        ({"modules_to_save": ["lm_head"]}, "unsupported_adapter"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "unsupported_adapter"),
        ({"target_modules": ["q_proj", "lm_head"]}, "unsupported_adapter"),
        ({"trainable_token_indices": [1, 2]}, "unsupported_adapter"),
        ({"lora_bias": True}, "unsupported_adapter"),
        ({"bias": "lora_only"}, "unsupported_adapter"),
        ({"rank_pattern": {"q_proj": 4}}, "unsupported_adapter"),
        ({"init_lora_weights": "pissa"}, "unsupported_adapter"),
        ({"r": 32}, "rank_not_supported"),
    ],
    ids=str,
)
def test_what_peft_saves_and_the_engine_cannot_serve(
    model_folder: Path, base: BaseModelShapes, tmp_path: Path, options: dict[str, Any], code: str
) -> None:
    train(model_folder, tmp_path, **options)
    plain = peft.LoraConfig(task_type="CAUSAL_LM", r=options.get("r", 8), lora_alpha=16, target_modules=["q_proj"])
    harmless = json.dumps({**plain.to_dict(), "target_modules": ["q_proj"]}, default=str).encode()
    weights = tmp_path / "adapter_model.safetensors"
    configs = [(tmp_path / "adapter_config.json").read_bytes()]
    if not {"bias", "rank_pattern", "init_lora_weights"} & options.keys():
        configs.append(harmless)  # the tensors alone must give it away
    for config in configs:
        with pytest.raises(InvalidAdapter) as caught:
            validate(config, weights, base)
        assert caught.value.error_code == code


def test_an_untrained_adapter_has_no_effect(model_folder: Path, base: BaseModelShapes, tmp_path: Path) -> None:
    peft.get_peft_model(load(model_folder), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=ATTENTION)).save_pretrained(tmp_path)
    with pytest.raises(InvalidAdapter) as caught:
        validate((tmp_path / "adapter_config.json").read_bytes(), tmp_path / "adapter_model.safetensors", base)
    assert caught.value.error_code == "no_effect"
