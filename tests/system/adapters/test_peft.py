"""Adapters that PEFT itself writes pass the checks, if the engine computes them as PEFT does. PEFT reads the stored files back to the same
model."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from lmaas.adapters.base_weights import write_without
from lmaas.adapters.safetensors import base_model_shapes, read_header
from lmaas.adapters.validation import AdapterFacts, validate
from lmaas.errors import InvalidAdapter
from lmaas.types import BaseModelShapes

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

# Warnings of PEFT and transformers are outside lmaas.
pytestmark = pytest.mark.filterwarnings("ignore")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model whose head has weights of its own, or uses the embeddings."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=request.param,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(model_folder: Path) -> BaseModelShapes:
    return BaseModelShapes(base_model_shapes(model_folder), "bfloat16", 16)


def load(folder: Path, kind: Any = transformers.LlamaForCausalLM) -> Any:
    return kind.from_pretrained(folder)


def fill(model: Any) -> Any:
    """Train, as far as it matters here: every LoRA gets an effect."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name and not parameter.any():
            torch.nn.init.normal_(parameter.data, std=0.1)
        if "modules_to_save" in name:
            parameter.data += 0.01
    return model


def train(model_folder: Path, to: Path, dtype: Any = None, saving: Any = None, kind: Any = None, **options: Any) -> Any:
    """Write an adapter with an effect to a folder as PEFT saves it; return the adapted model."""
    torch.manual_seed(2)
    options = {"task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "target_modules": ATTENTION, **options}
    model = fill(peft.get_peft_model(load(model_folder, kind or transformers.LlamaForCausalLM), peft.LoraConfig(**options)))
    model.to(dtype).save_pretrained(to, **(saving or {}))
    return model.eval()


def check(folder: Path, base: BaseModelShapes, model_folder: Path | None) -> AdapterFacts:
    """Validate the files of a folder, and write there what an upload would store."""
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    facts = validate(config.read_bytes(), weights, base, lambda: model_folder)
    config.write_text(json.dumps(facts.config))
    if facts.left_out:
        write_without(weights, facts.records, facts.left_out, folder / "stored")
        (folder / "stored").replace(weights)
    assert set(read_header(weights)) == set(facts.records) - facts.left_out
    return facts


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 20)[None]).logits.float()


def loaded(model_folder: Path, folder: Path) -> Any:
    """Return PEFT's output for the stored files. The file must have every module of the canonical config: PEFT only warns of a missing
    one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return logits(peft.PeftModel.from_pretrained(load(model_folder), folder).eval())


def test_the_base_models_linears(base: BaseModelShapes) -> None:
    assert len(base.linears) == 16
    assert base.linears["model.layers.1.self_attn.k_proj"] == (16, 32)
    assert base.linears["model.layers.0.mlp.down_proj"] == (32, 48)
    assert base.linears["model.embed_tokens"] == (32, 64)
    assert base.linears["lm_head"] == (64, 32)


def test_a_base_model_whose_architecture_has_no_lora_on_embeddings(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, num_key_value_heads=2)).save_pretrained(tmp_path)
    assert len(base_model_shapes(tmp_path)) == 7
    (tmp_path / "config.json").unlink()
    assert len(base_model_shapes(tmp_path)) == 7


@pytest.mark.parametrize(
    "options",
    [
        *({"r": rank, "target_modules": targets} for rank in (4, 16) for targets in (ATTENTION, "all-linear")),
        {"use_rslora": True},
        {"target_modules": r".*\.(q_proj|down_proj)"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 7], "layers_pattern": "layers"},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
        *({"task_type": task} for task in (None, "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", "QUESTION_ANS", "TOKEN_CLS", "SEQ_CLS")),
        *({"init_lora_weights": init} for init in ("gaussian", "orthogonal", "mica", False)),
        *({"bias": bias} for bias in ("all", "lora_only")),
        {"fan_in_fan_out": True},
        {"lora_dropout": 0.1, "lora_alpha": 3},
        {"lora_alpha": -5},
        {"lora_alpha": 2.5},
        {"rank_pattern": {"q_proj": 4}},
        {"rank_pattern": {r"layers\.0\..*": 2, "v_proj": 16}, "r": 3},
        {"rank_pattern": {"^model.layers.1.self_attn.(k|o)_proj": 12}, "use_rslora": True},
        {"alpha_pattern": {"q_proj": 4}},
        {"alpha_pattern": {r".*\.0\..*_proj": 1, "q_proj": 40, "model.layers.1.self_attn.o_proj": 0.5}},
        {
            "alpha_pattern": {"q_proj": 4, "0.self_attn.q_proj": 40},
            "rank_pattern": {"1.self_attn.q_proj": 1, "q_proj": 2},
            "use_rslora": True,
        },
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": [*ATTENTION, "embed_tokens", "lm_head"], "rank_pattern": {"lm_head": 3}, "alpha_pattern": {"embed_tokens": 2}},
        {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
        {"target_modules": [*ATTENTION, "embed_tokens"], "saving": {"save_embedding_layers": False}},
        {"saving": {"save_embedding_layers": True}},
    ],
    ids=str,
)
def test_what_peft_saves_passes_and_loads_again(model_folder: Path, base: BaseModelShapes, tmp_path: Path, options: dict[str, Any]) -> None:
    train(model_folder, tmp_path, **options)
    # This differs from the trained model: PEFT sorts the patterns when it saves, and another one may come first then.
    expected = loaded(model_folder, tmp_path)
    facts = check(tmp_path, base, model_folder)
    assert facts.rank == max(options.get("r", 8), *options.get("rank_pattern", {}).values(), 0)
    assert torch.allclose(expected, loaded(model_folder, tmp_path), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_what_peft_saves_in_each_dtype(model_folder: Path, base: BaseModelShapes, tmp_path: Path, dtype: str) -> None:
    train(model_folder, tmp_path, getattr(torch, dtype), target_modules=["q_proj", "embed_tokens", "lm_head"])
    before = loaded(model_folder, tmp_path)
    facts = check(tmp_path, base, model_folder)
    assert (len(facts.records), len(facts.left_out)) == (10, 2)
    # The omitted copies of base weights were rounded to the dtype.
    assert torch.allclose(before, loaded(model_folder, tmp_path), atol={"float16": 1e-3, "bfloat16": 1e-2}.get(dtype, 1e-6))


def test_names_as_an_injected_adapter_has_them(model_folder: Path, base: BaseModelShapes, tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=ATTENTION, r=8, rank_pattern={"q_proj": 4}, alpha_pattern={r"layers\.1\..*": 3})
    model = fill(peft.inject_adapter_in_model(config, load(model_folder))).eval()
    state = peft.get_peft_model_state_dict(model)
    assert "model.layers.0.self_attn.q_proj.lora_A.weight" in state
    safetensors.save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "adapter_model.safetensors")
    config.save_pretrained(tmp_path)
    check(tmp_path, base, model_folder)
    stored = {f"base_model.model.{name}": value for name, value in safetensors.load_file(tmp_path / "adapter_model.safetensors").items()}
    safetensors.save_file(stored, tmp_path / "adapter_model.safetensors")
    assert torch.equal(logits(model), loaded(model_folder, tmp_path))


def test_an_adapter_that_transformers_saves(model_folder: Path, base: BaseModelShapes, tmp_path: Path) -> None:
    model = load(model_folder)
    model.add_adapter(peft.LoraConfig(target_modules=ATTENTION))
    fill(model).eval().save_pretrained(tmp_path)
    check(tmp_path, base, model_folder)
    assert torch.equal(logits(model), loaded(model_folder, tmp_path))


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_adapters_that_peft_combines(model_folder: Path, base: BaseModelShapes, tmp_path: Path, kind: str) -> None:
    config = {"task_type": "CAUSAL_LM", "target_modules": ATTENTION, "r": 4}
    model = peft.get_peft_model(load(model_folder), peft.LoraConfig(**config), adapter_name="a")
    model.add_adapter("b", peft.LoraConfig(**config))
    fill(model).add_weighted_adapter(["a", "b"], [0.5, 0.25], "c", combination_type=kind)
    model.set_adapter("c")
    model.eval().save_pretrained(tmp_path, selected_adapters=["c"])
    check(tmp_path / "c", base, model_folder)
    assert torch.allclose(logits(model), loaded(model_folder, tmp_path / "c"), atol=1e-6)


def test_ranks_that_eva_chose(model_folder: Path, base: BaseModelShapes, tmp_path: Path) -> None:
    config = {
        "task_type": "CAUSAL_LM",
        "target_modules": ATTENTION,
        "r": 4,
        "init_lora_weights": "eva",
        "eva_config": peft.EvaConfig(rho=2.0),
    }
    model = peft.get_peft_model(load(model_folder), peft.LoraConfig(**config))
    tokens = torch.randint(0, 64, (8, 4, 16), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)} for ids in tokens]
    peft.initialize_lora_eva_weights(model, data, show_progress_bar=False)
    fill(model).eval().save_pretrained(tmp_path)
    facts = check(tmp_path, base, model_folder)
    assert facts.config["rank_pattern"]
    assert facts.config["alpha_pattern"]
    assert torch.equal(logits(model), loaded(model_folder, tmp_path))


def test_pissa_converted_to_a_plain_adapter(model_folder: Path, base: BaseModelShapes, tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=ATTENTION, r=4, init_lora_weights="pissa")
    model = peft.get_peft_model(load(model_folder), config)
    config = model.peft_config["default"]
    config.init_lora_weights = True
    model.save_pretrained(tmp_path / "before")
    config.init_lora_weights = "pissa"
    for name, parameter in model.named_parameters():
        parameter.data += 0.01 * ("lora_" in name)
    model.eval().save_pretrained(tmp_path / "after", path_initial_model_for_weight_conversion=str(tmp_path / "before"))
    facts = check(tmp_path / "after", base, model_folder)
    assert (facts.rank, facts.config["lora_alpha"]) == (8, 16)
    assert torch.allclose(logits(model), loaded(model_folder, tmp_path / "after"), atol=1e-4)


#: The tensors alone reveal these as well.
BY_TENSORS: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "unsupported_adapter"),
    ({"modules_to_save": ["lm_head"]}, "unsupported_adapter"),
    ({"modules_to_save": ["norm"]}, "unsupported_adapter"),
    ({"trainable_token_indices": [1, 2]}, "unsupported_adapter"),
    ({"lora_bias": True}, "unsupported_adapter"),
    ({"r": 32}, "rank_not_supported"),
    ({"rank_pattern": {"q_proj": 17}}, "rank_not_supported"),
]
BY_CONFIG: list[dict[str, Any]] = [
    *({"init_lora_weights": init} for init in ("pissa", "pissa_niter_2", "olora")),
    {"layer_replication": [[0, 2], [1, 2]]},
    {"alora_invocation_tokens": [1, 2]},
    {"use_qalora": True},
    {"target_modules": [], "target_parameters": ["mlp.down_proj.weight"]},
    {"velora_config": {"num_groups": 4}},
    {"kasa_config": {}},
    {"monteclora_config": {}},
    {"use_bdlora": {"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj", "k_proj", "v_proj"], "nblocks": 2}},
]


def refused(folder: Path, base: BaseModelShapes, model_folder: Path | None) -> InvalidAdapter:
    with pytest.raises(InvalidAdapter) as caught:
        check(folder, base, model_folder)
    return caught.value


@pytest.mark.parametrize(("options", "code"), [*BY_TENSORS, *((options, "unsupported_adapter") for options in BY_CONFIG)], ids=str)
def test_what_peft_saves_and_the_engine_cannot_serve(
    model_folder: Path, base: BaseModelShapes, tmp_path: Path, options: dict[str, Any], code: str
) -> None:
    train(model_folder, tmp_path, **options)
    assert refused(tmp_path, base, model_folder).error_code == code
    if (options, code) in BY_TENSORS:
        changed = {"use_dora": False, "modules_to_save": None, "trainable_token_indices": None, "lora_bias": False}
        config = tmp_path / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changed))
        assert refused(tmp_path, base, model_folder).error_code == code


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_a_base_model_that_has_some(tmp_path: Path, bias: str) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    kind = transformers.Qwen2ForCausalLM
    kind(transformers.Qwen2Config(**sizes, num_key_value_heads=2)).save_pretrained(tmp_path / "base")
    train(tmp_path / "base", tmp_path / "adapter", kind=kind, bias=bias)
    error = refused(tmp_path / "adapter", BaseModelShapes(base_model_shapes(tmp_path / "base"), "float32", 16), tmp_path / "base")
    assert error.error_code == "unsupported_adapter"
    assert "bias='none'" in error.message


def test_copies_of_base_weights_that_are_not_the_base_models(model_folder: Path, base: BaseModelShapes, tmp_path: Path) -> None:
    options = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    model = fill(peft.get_peft_model(load(model_folder), peft.LoraConfig(**options)))
    model.save_pretrained(tmp_path / "same", save_embedding_layers=True)
    error = refused(tmp_path / "same", base, None)
    assert (error.error_code, "save_embedding_layers=False" in error.message) == ("unsupported_adapter", True)
    model.get_input_embeddings().weight.data[63, 31] += 0.001
    model.save_pretrained(tmp_path / "changed", save_embedding_layers=True)
    error = refused(tmp_path / "changed", base, model_folder)
    assert (error.error_code, "differs from the base model's" in error.message) == ("unsupported_adapter", True)
    longer = load(model_folder)
    longer.resize_token_embeddings(70, mean_resizing=False)
    model = fill(peft.get_peft_model(longer, peft.LoraConfig(**options)))
    model.save_pretrained(tmp_path / "longer", save_embedding_layers=True)
    error = refused(tmp_path / "longer", base, model_folder)
    assert (error.error_code, "has 70 tokens, but the base model's vocabulary has 64" in error.message) == ("unsupported_adapter", True)


def test_an_adapter_of_another_kind_of_model(model_folder: Path, base: BaseModelShapes, tmp_path: Path) -> None:
    kinds = {"SEQ_CLS": transformers.AutoModelForSequenceClassification, "FEATURE_EXTRACTION": transformers.AutoModel}
    for task, (code, words) in {
        "SEQ_CLS": ("unsupported_adapter", "score.weight"),
        "FEATURE_EXTRACTION": ("no_target_modules", "AutoModelForCausalLM"),
    }.items():
        train(model_folder, tmp_path / task, kind=kinds[task], task_type=task)
        error = refused(tmp_path / task, base, model_folder)
        assert error.error_code == code
        assert words in error.message


@pytest.mark.parametrize(
    "config",
    [
        {"kind": "AdaLoraConfig", "total_step": 10, "target_modules": ATTENTION},
        {"kind": "LoHaConfig", "target_modules": ATTENTION},
        {"kind": "IA3Config", "target_modules": ATTENTION, "feedforward_modules": []},
        {"kind": "PromptTuningConfig", "num_virtual_tokens": 4},
    ],
    ids=lambda config: str(config["kind"]),
)
def test_other_methods_than_lora(model_folder: Path, base: BaseModelShapes, tmp_path: Path, config: dict[str, Any]) -> None:
    kind = getattr(peft, config["kind"])
    made = kind(task_type="CAUSAL_LM", **{key: value for key, value in config.items() if key != "kind"})
    peft.get_peft_model(load(model_folder), made).save_pretrained(tmp_path)
    error = refused(tmp_path, base, model_folder)
    assert error.error_code == "unsupported_adapter"
    assert "Only LORA adapters can be served" in error.message


def test_an_untrained_adapter_has_no_effect(model_folder: Path, base: BaseModelShapes, tmp_path: Path) -> None:
    peft.get_peft_model(load(model_folder), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=ATTENTION)).save_pretrained(tmp_path)
    assert refused(tmp_path, base, model_folder).error_code == "no_effect"
