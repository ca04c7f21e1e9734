"""Handmade adapters, valid and invalid, for a tiny invented base model."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lmaas.adapters.validation import AdapterFacts, validate
from lmaas.errors import InvalidAdapter
from lmaas.types import BaseModelShapes

Array = NDArray[Any]
#: name → (safetensors dtype, the array in the number format of that dtype, BF16 as uint16 bits)
Tensors = dict[str, tuple[str, Array]]

PREFIX = "base_model.model."
HIDDEN, KEY_VALUE, INNER, VOCABULARY = 16, 8, 24, 32
ATTENTION = {"q_proj": (HIDDEN, HIDDEN), "k_proj": (KEY_VALUE, HIDDEN), "v_proj": (KEY_VALUE, HIDDEN), "o_proj": (HIDDEN, HIDDEN)}
MLP = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
ALL = (*ATTENTION, *MLP)


def base(dtype: str = "bfloat16", max_lora_rank: int = 16, layers: int = 2) -> BaseModelShapes:
    """Return a two-layer llama of width 16 with grouped key and value heads."""
    linears: dict[str, tuple[int, int]] = {}
    for layer in range(layers):
        linears |= {f"model.layers.{layer}.self_attn.{leaf}": shape for leaf, shape in ATTENTION.items()}
        linears |= {f"model.layers.{layer}.mlp.{leaf}": shape for leaf, shape in MLP.items()}
    linears |= {"model.embed_tokens": (HIDDEN, VOCABULARY), "lm_head": (VOCABULARY, HIDDEN)}
    return BaseModelShapes(linears=linears, dtype=dtype, max_lora_rank=max_lora_rank)


def encode(values: Array, dtype: str) -> Array:
    """Return numbers in the format of a safetensors dtype. BF16 is cut to its upper 16 bits."""
    if dtype == "BF16":
        return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype({"F64": np.float64, "F32": np.float32, "F16": np.float16, "I32": np.int32, "U8": np.uint8}[dtype])


def tensors(
    shapes: BaseModelShapes | None = None,
    rank: int = 4,
    leaves: Iterable[str] = ("q_proj", "v_proj"),
    dtype: str = "F32",
    layers: Iterable[int] | None = None,
    ranks: Mapping[str, int] | None = None,
) -> Tensors:
    """Return the A and B of a valid adapter, random and small. `ranks` gives modules another rank, by path."""
    random = np.random.default_rng(7)
    made: Tensors = {}
    wanted = None if layers is None else set(layers)
    for module, (out_features, in_features) in (shapes or base()).linears.items():
        if module.rpartition(".")[2] not in set(leaves) or (wanted is not None and int(module.split(".")[2]) not in wanted):
            continue
        names = ("lora_embedding_A", "lora_embedding_B") if module.endswith("embed_tokens") else ("lora_A.weight", "lora_B.weight")
        own = (ranks or {}).get(module, rank)
        for name, shape in zip(names, ((own, in_features), (out_features, own)), strict=True):
            made[f"{PREFIX}{module}.{name}"] = (dtype, encode(random.normal(0, 0.1, shape), dtype))
    return made


def pack(content: Mapping[str, tuple[str, Array]], metadata: dict[str, str] | None = None) -> bytes:
    """Return a safetensors file."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, (dtype, array) in content.items():
        raw = array.tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return frame(header, data)


def frame(header: object, data: bytes = b"") -> bytes:
    """Return a file with this header, valid or not, given as bytes or as a value to encode as JSON."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def config(**changes: object) -> bytes:
    """Return the `adapter_config.json` of a valid adapter of rank 4, with some keys changed."""
    return json.dumps(config_dict(**changes)).encode()


def config_dict(**changes: object) -> dict[str, Any]:
    """Return the contents of `config` as a dictionary."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "somebody/some-model",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
        "inference_mode": True,
        **changes,
    }


def check(file: Path, config_bytes: bytes, content: Tensors | bytes, shapes: BaseModelShapes | None = None) -> AdapterFacts:
    """Write the file and validate it."""
    file.write_bytes(content if isinstance(content, bytes) else pack(content, {"format": "pt"}))
    return validate(config_bytes, file, shapes or base())


def refused(file: Path, config_bytes: bytes, content: Tensors | bytes, shapes: BaseModelShapes | None = None) -> InvalidAdapter:
    """Return the refusal of an invalid adapter, and assert that a client may see it."""
    with pytest.raises(InvalidAdapter) as caught:
        check(file, config_bytes, content, shapes)
    error = caught.value
    error.message.encode("ascii")
    assert error.param in ("adapter_config.json", "adapter_model.safetensors")
    assert len(error.message) < 600
    assert error.status == 400
    return error
