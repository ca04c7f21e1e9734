"""A tiny random Llama with adapters of every shape, as PEFT writes them and as they are stored after an upload, and their logits as PEFT
computes them."""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lmaas.adapters.base_weights import write_without
from lmaas.adapters.safetensors import base_model_shapes
from lmaas.adapters.validation import validate
from lmaas.types import BaseModelShapes

VOCAB = 160
MAX_RANK = 64
MAX_LEN = 128
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
LINEAR = [*ATTENTION, *MLP]
HEAD = "lm_head"
EMBEDDING = "embed_tokens"

#: The arguments of PEFT for each adapter.
ADAPTERS: dict[str, dict[str, Any]] = {
    **{f"rank-{r}": {"r": r, "lora_alpha": r, "target_modules": LINEAR} for r in (1, 2, 3, 5, 8, 16, 33, 64)},
    "attention": {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION},
    "mlp": {"r": 12, "lora_alpha": 16, "target_modules": MLP},
    # One module each, so that the other parts of vLLM's merged layers have no weights.
    **{f"only-{name}": {"r": r, "lora_alpha": 8, "target_modules": [name]} for r, name in enumerate(LINEAR, start=2)},
    "q-and-v": {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "one-layer": {"r": 9, "lora_alpha": 9, "target_modules": LINEAR, "layers_to_transform": [1]},
    "rank-stabilised": {"r": 16, "lora_alpha": 8, "target_modules": LINEAR, "use_rslora": True},
    "alpha-above-rank": {"r": 4, "lora_alpha": 32, "target_modules": LINEAR},
    "alpha-below-rank": {"r": 24, "lora_alpha": 3, "target_modules": LINEAR},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": LINEAR,
        "rank_pattern": {"q_proj": 1, "v_proj": 33, "layers.1.mlp.gate_proj": 17, "down_proj": 64},
        "alpha_pattern": {"k_proj": 1, "v_proj": 20, "layers.0.mlp.up_proj": 9},
    },
    "regular-expressions": {
        "r": 6,
        "lora_alpha": 7,
        "target_modules": LINEAR,
        "use_rslora": True,
        "rank_pattern": {r"layers\.0\.mlp\..*_proj": 3, r".*\.(q|v)_proj": 20},
        "alpha_pattern": {r"model\.layers\.[1-9]\.mlp\.\w+": 5, "^.*o_proj": 2.5, "k_proj": -4},
    },
    "embedding-patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": [*ATTENTION, HEAD, EMBEDDING],
        "rank_pattern": {HEAD: 9, EMBEDDING: 40},
        "alpha_pattern": {HEAD: 3, EMBEDDING: 20},
    },
    "negative-alpha": {"r": 4, "lora_alpha": -6, "target_modules": ATTENTION},
    "other-task": {"r": 4, "lora_alpha": 6, "target_modules": MLP, "task_type": "SEQ_2_SEQ_LM", "bias": "all"},
    "float64": {"r": 10, "lora_alpha": 10, "target_modules": [*LINEAR, EMBEDDING]},
    "without-prefix": {"r": 4, "lora_alpha": 6, "target_modules": [*LINEAR, HEAD], "alpha_pattern": {"0.self_attn.v_proj": 30, HEAD: 2}},
    "head": {"r": 5, "lora_alpha": 10, "target_modules": [HEAD]},
    "head-and-linear": {"r": 33, "lora_alpha": 16, "target_modules": [*LINEAR, HEAD]},
    "embedding": {"r": 6, "lora_alpha": 3, "target_modules": [EMBEDDING]},
    "everything": {"r": 7, "lora_alpha": 14, "target_modules": [*LINEAR, HEAD, EMBEDDING]},
}  # fmt: skip


def build_model(folder: Path) -> None:
    """Write the base model. Its sizes are no multiples of a vector's length, and its logits have a spread of about 2."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=72, head_dim=32, num_attention_heads=3, num_key_value_heads=1, num_hidden_layers=2,
        intermediate_size=200, max_position_embeddings=MAX_LEN, tie_word_embeddings=False, dtype="float32",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.uniform_(0.5, 1.5)
            elif EMBEDDING in name:
                weight.normal_()
            else:
                weight.normal_(std=(2 if HEAD in name else 1) * weight.shape[1] ** -0.5)
    model.save_pretrained(folder)


def build_adapter(base: Path, folder: Path, name: str) -> None:
    """Write one of `ADAPTERS`. It changes the output of its layers about as much as their own weights do."""
    torch.manual_seed(sum(name.encode()))
    model = get_peft_model(load_model(base), LoraConfig(**ADAPTERS[name]))
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                rank, scaling = layer.r["default"], layer.scaling["default"]
                if "default" in layer.lora_A:
                    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                    a.normal_(std=a.shape[1] ** -0.5)
                else:
                    a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
                    a.normal_()
                b.normal_(std=rank**-0.5 / abs(scaling))
    with warnings.catch_warnings():
        # PEFT writes the embedding's own weights beside an adapter for it, with a warning.
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`")
        model.save_pretrained(folder)


def upload(base: Path, folder: Path, stored: Path, name: str) -> None:
    """Write to `stored` the files that an upload would store for the adapter in `folder`."""
    stored.mkdir()
    weights, config = stored / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(folder / weights.name)
    if name == "float64":
        tensors = {key: tensor.double() for key, tensor in tensors.items()}
    if name == "without-prefix":
        tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    save_file(tensors, folder / "uploaded.safetensors")
    shapes = BaseModelShapes(base_model_shapes(base), "float32", MAX_RANK)
    facts = validate(config.read_bytes(), folder / "uploaded.safetensors", shapes, lambda: base)
    write_without(folder / "uploaded.safetensors", facts.records, facts.left_out, weights)
    (stored / config.name).write_text(json.dumps(facts.config))


def load_model(folder: Path) -> Any:
    """Load the base model, for computing with it in this process."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


class Reference:
    """The same models in PEFT, each in a base model of its own."""

    def __init__(self, base: Path, adapters: dict[str, Path]) -> None:
        self._models = {name: PeftModel.from_pretrained(load_model(base), folder).eval() for name, folder in adapters.items()}
        self._base = load_model(base)

    def logits(self, name: str | None, tokens: Sequence[int]) -> Any:
        """Return the logits after each token [tokens, VOCAB], by the adapter or without one."""
        model = self._base if name is None else self._models[name]
        with torch.inference_mode(), one_thread():
            return model(torch.tensor([list(tokens)])).logits[0]


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, where so small a model takes a millisecond. On more threads, other busy processes delay it by hundreds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
