"""The folder of a very small base model."""

import json
from pathlib import Path
from typing import Any

LINEARS = {"model.layers.0.self_attn.q_proj": [64, 32], "model.layers.0.mlp.up_proj": [128, 32]}


def write_model(folder: Path, linears: dict[str, list[int]] = LINEARS, **config: Any) -> Path:
    """Create a base model's folder, whose weights are all zero."""
    folder.mkdir()
    header, offset = {}, 0
    for name, shape in {**linears, "model.embed_tokens": [100, 32]}.items():
        size = 2 * shape[0] * shape[1]
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    told = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(told).to_bytes(8, "little") + told + b"\0" * offset)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 512} | config))
    return folder
