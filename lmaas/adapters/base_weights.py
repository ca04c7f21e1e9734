"""Compares copies of the base model's embeddings in an upload with the base model, and removes them from the stored file.

PEFT writes them beside an adapter for `embed_tokens` or `lm_head`, and computes with them, while the engine computes with its own. Removing
them changes nothing only if both are the same.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from lmaas.adapters.safetensors import TensorRecord, find_base_tensor, show
from lmaas.adapters.tensors import EMBEDDING, HEAD, STORED_DTYPES, refuse_tensors
from lmaas.errors import InvalidRequest

_CHUNK_ELEMENTS = 1024 * 1024
_ADVICE = "Save the adapter with save_pretrained(..., save_embedding_layers=False), which leaves the copy out."


def check_base_copy(path: Path, name: str, record: TensorRecord, module: str, base_folder: Path | None) -> None:
    """Raise InvalidAdapter unless a tensor of the upload holds the same weights as the base model's module.

    A base model without an `lm_head` of its own uses its embeddings there too.
    """
    from lmaas.adapters.weights import same  # noqa: PLC0415 (a gateway that takes no upload does without numpy)

    found = None if base_folder is None else _find(base_folder, module)
    if found is None:
        refuse_tensors(
            "unsupported_adapter",
            f"The tensor {show(name)} is a copy of base weights, which cannot be compared with the base model's own here. {_ADVICE}",
        )
    base_path, base_record = found
    if record.shape != base_record.shape:
        what = f"has the shape {list(record.shape)}, but the base model's has {list(base_record.shape)}"
        if len(record.shape) == 2 and record.shape[1:] == base_record.shape[1:]:
            what = f"has {record.shape[0]} tokens, but the base model's vocabulary has {base_record.shape[0]}"
        refuse_tensors(
            "unsupported_adapter", f"The tensor {show(name)} {what}: the engine cannot change the vocabulary. Train without adding tokens."
        )
    if record.dtype not in STORED_DTYPES or base_record.dtype not in STORED_DTYPES:
        refuse_tensors(
            "unsupported_adapter",
            f"The tensor {show(name)} is a copy of base weights. As {record.dtype} it cannot be compared with the base model's "
            f"{base_record.dtype}. {_ADVICE}",
        )
    count = record.size_bytes // (size := _size(record))
    base_size = _size(base_record)
    with path.open("rb") as file, base_path.open("rb") as base_file:
        file.seek(record.offset)
        base_file.seek(base_record.offset)
        for start in range(0, count, _CHUNK_ELEMENTS):
            n = min(_CHUNK_ELEMENTS, count - start)
            mine, theirs = file.read(n * size), base_file.read(n * base_size)
            if len(mine) != n * size or len(theirs) != n * base_size:
                refuse_tensors("invalid_safetensors", "The file became shorter while it was read. Upload it again.")
            if not same(mine, record.dtype, theirs, base_record.dtype):
                refuse_tensors(
                    "unsupported_adapter",
                    f"The tensor {show(name)} differs from the base model's weights, which all adapters share. Train without "
                    "modules_to_save, and on this base model.",
                )


def _find(folder: Path, module: str) -> tuple[Path, TensorRecord] | None:
    try:
        return find_base_tensor(folder, module) or (find_base_tensor(folder, f"model.{EMBEDDING}") if module == HEAD else None)
    except InvalidRequest:
        return None  # the text names the operator's folders


def write_without(path: Path, records: Mapping[str, TensorRecord], left_out: Collection[str], target: Path) -> None:
    """Write a safetensors file with the tensors of another one, without those that are left out. Raises OSError."""
    kept = {name: record for name, record in sorted(records.items()) if name not in left_out}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, record in kept.items():
        header[name] = {"dtype": record.dtype, "shape": record.shape, "data_offsets": [end, end + record.size_bytes]}
        end += record.size_bytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("rb") as source, target.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for record in kept.values():
            source.seek(record.offset)
            left = record.size_bytes
            while left:
                chunk = source.read(min(left, 1 << 20))
                if not chunk:
                    raise OSError("the file became shorter while it was read")
                file.write(chunk)
                left -= len(chunk)


def _size(record: TensorRecord) -> int:
    return {"F64": 8, "F32": 4}.get(record.dtype, 2)
