"""Reads the header of a safetensors file and verifies all of it.

The format is 8 bytes of header length (little endian), that many bytes of JSON, then the tensors' bytes. Nothing here reads tensor data,
and nothing is ever executed. The rules are those of the format's own reader (huggingface/safetensors, `tensor.rs`) and a few stricter ones.
"""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from lmaas.errors import InvalidAdapter, InvalidRequest
from lmaas.states import PoolKind
from lmaas.types import TensorSpec

MODEL_FILE = "adapter_model.safetensors"
MAX_HEADER_BYTES = 1024 * 1024
#: The format's own limit. Base models are the operator's, and may have tens of thousands of tensors in a file.
MAX_BASE_HEADER_BYTES = 100_000_000
MAX_NAME_LENGTH = 256
MAX_DIMENSIONS = 8
MAX_INT_DIGITS = 19
MAX_DEPTH = 8
MAX_SIZE = 2**63 - 1

_NAME = re.compile(r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*")
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_BASE_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
#: Architectures whose `embed_tokens` and `lm_head` take LoRA in vLLM 0.32 (`embedding_modules` of their classes) with the results of PEFT:
#: each was compared. vLLM offers it for a few more, and refuses adapters for these modules of all others.
EMBEDDING_ARCHITECTURES = frozenset({
    "Exaone4ForCausalLM", "GraniteForCausalLM", "LlamaForCausalLM", "Phi3ForCausalLM", "Qwen3ForCausalLM",
})  # fmt: skip
_EMBEDDINGS, _HEAD = "model.embed_tokens", "lm_head"
#: Architectures of models that embed text on which vLLM 0.32 applies LoRA with the results of PEFT, each compared, with the beginning of
#: the modules that take it. vLLM drops adapters of other modules silently, such as those of BERT's pooler, which it does not compute.
_ADAPTED_ENCODERS = {"BertModel": "encoder."}

_SNIFF_BYTES = 512
_UNSAFE = (
    (re.compile(rb"PK(?:\x03\x04|\x05\x06|\x07\x08)"), "a zip archive, as torch.save writes it"),
    (re.compile(rb"\x80[\x00-\x08]"), "a pickle"),
    (re.compile(rb"[(\]})]*(?:c[A-Za-z_][\w.]*\r?\n[A-Za-z_][\w.]*\r?\n|[dlt]p\d+\r?\n)"), "a pickle in its text form"),
    (re.compile(rb"L?119547037146038801333356L?\r?\n"), "an old torch.save file"),
    (re.compile(rb"\x1f\x8b"), "a gzip file"),
    (re.compile(rb"BZh[1-9]"), "a bzip2 file"),
    (re.compile(rb"\xfd7zXZ\x00"), "an xz file"),
    (re.compile(rb"\x28\xb5\x2f\xfd"), "a zstandard file"),
    (re.compile(rb"7z\xbc\xaf\x27\x1c"), "a 7-zip archive"),
    (re.compile(rb"Rar!\x1a"), "a rar archive"),
    (re.compile(rb"GGUF|ggml|ggjt|FUGG"), "a GGUF file"),
    (re.compile(rb"\x89HDF\r\n\x1a\n"), "an HDF5 file"),
    (re.compile(rb"\x93NUMPY"), "a numpy file"),
    (re.compile(rb"\x7fELF|MZ|#!|\xca\xfe\xba\xbe|\xcf\xfa\xed\xfe"), "a program"),
    (re.compile(rb".{257}ustar", re.DOTALL), "a tar archive"),
)
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_ZIP_END = b"PK\x05\x06"
_ZIP_END_BYTES = 22
_ADVICE = "Save the adapter again with PEFT's save_pretrained(..., safe_serialization=True) and upload adapter_model.safetensors unchanged."


@dataclass(frozen=True, slots=True)
class TensorRecord(TensorSpec):
    """The place of one tensor: `offset` in bytes from the start of the file, `size_bytes` long, row-major and little endian."""

    offset: int
    size_bytes: int


def read_header(path: Path) -> dict[str, TensorRecord]:
    """Return the tensors of an adapter's safetensors file, by name, from its header alone.

    Raises InvalidAdapter: `unsafe_format` for pickles, archives and other formats, `invalid_tensor_name` for names outside
    `[A-Za-z0-9_.]`, `invalid_safetensors` for everything else that is not exactly one header and the bytes that it describes.
    """
    return _read_header(path, MAX_HEADER_BYTES)


def base_model_shapes(folder: Path, kind: PoolKind = PoolKind.GENERATE) -> dict[str, tuple[int, int]]:
    """Return the modules of a base model's folder that LoRA may target: module path to `(out_features, in_features)`. Empty for a model
    that embeds text with another architecture than those that were compared.

    They are the linear modules, from the safetensors headers: each two-dimensional floating `*.weight` that is no embedding, norm or
    `lm_head`; and the embeddings and `lm_head`, if vLLM offers LoRA on them for the architecture that `config.json` names. Weights that
    are packed by a quantiser (GPTQ, AWQ, bitsandbytes) do not show their shape and are left out.
    Raises InvalidRequest `invalid_base_model` if the folder has no readable safetensors or no linear module.
    """
    linears: dict[str, tuple[int, int]] = {}
    embeddings: dict[str, tuple[int, ...]] = {}
    for path in _model_files(folder):
        for name, record in _base_header(path).items():
            module, dot, last = name.rpartition(".")
            leaf = module.rpartition(".")[2]
            if not dot or last != "weight" or len(record.shape) != 2 or record.dtype not in _BASE_DTYPES:
                continue
            if module in (_EMBEDDINGS, _HEAD):
                embeddings[module] = record.shape
            if leaf == "lm_head" or "embed" in leaf or "norm" in leaf:
                continue
            linears[module] = (record.shape[0], record.shape[1])
    if not linears:
        raise InvalidRequest(f"The safetensors files in {folder} have no linear module.", code="invalid_base_model")
    if kind is PoolKind.EMBED:
        encoder = _ADAPTED_ENCODERS.get(_architecture(folder))
        return {} if encoder is None else {module: shape for module, shape in linears.items() if module.startswith(encoder)}
    if _EMBEDDINGS in embeddings and _architecture(folder) in EMBEDDING_ARCHITECTURES:
        vocabulary, width = embeddings[_EMBEDDINGS]
        # Without a weight of its own, the head uses the embeddings.
        head = embeddings.get(_HEAD, (vocabulary, width))
        linears |= {_EMBEDDINGS: (width, vocabulary), _HEAD: (head[0], head[1])}
    return linears


def find_base_tensor(folder: Path, module: str) -> tuple[Path, TensorRecord] | None:
    """Return the file and the record of a module's weight in a base model's folder, or None. Raises InvalidRequest if it cannot be read."""
    for path in _model_files(folder):
        if record := _base_header(path).get(f"{module}.weight"):
            return path, record
    return None


def _base_header(path: Path) -> dict[str, TensorRecord]:
    try:
        return _read_header(path, MAX_BASE_HEADER_BYTES)
    except InvalidAdapter as error:
        raise InvalidRequest(f"The base model's file {path.name} cannot be used: {error.message}", code="invalid_base_model") from None
    except OSError as error:
        raise InvalidRequest(f"The base model's file {path} cannot be read: {error.strerror}.", code="invalid_base_model") from None


def _architecture(folder: Path) -> str:
    """Return the model's architecture, or an empty string if its configuration does not name exactly one."""
    try:
        architectures = json.loads((folder / "config.json").read_bytes()).get("architectures")
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""
    return str(architectures[0]) if isinstance(architectures, list) and len(architectures) == 1 else ""


def loads_strict(data: bytes) -> dict[str, Any]:
    """Parse a JSON object strictly: UTF-8, no duplicate keys, at most 8 levels deep, finite numbers and integers of at most 19 digits.

    Raises ValueError with a reason that a tenant may see.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_small_int, parse_float=_finite_float)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error.msg} at character {error.pos})") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if type(value) is not dict:
        raise ValueError("it is not a JSON object")
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in _inside(outer)]
    if level:
        raise ValueError("it is nested too deeply")
    if "\\u" in text:
        # An escape may stand for half a surrogate pair. Such text can be neither stored nor written to a log.
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("it contains half of a surrogate pair") from None
    return value


def show(text: object) -> str:
    """Return a tenant's text made safe for a message: quoted ASCII, at most about 100 characters."""
    shown = ascii(text)
    return shown if len(shown) <= 100 else f"{shown[:96]}...{shown[-1]}"


def _read_header(path: Path, max_header_bytes: int) -> dict[str, TensorRecord]:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(_SNIFF_BYTES)
        length = int.from_bytes(start[:8], "little")
        if len(start) < 10 or start[8:9] != b"{" or length > max_header_bytes:
            # Magic numbers are checked last, because the length of a valid file may begin with the same bytes as a pickle.
            _reject_other_formats(start)
            if len(start) >= 10 and start[8:9] == b"{":
                _invalid(f"its header claims {length} bytes, more than the {max_header_bytes} allowed")
            _invalid("it does not begin with a safetensors header" if start else "it is empty")
        if length > size - 8:
            _invalid(f"its header claims {length} bytes, but the file has only {size}: it is truncated or damaged")
        _reject_zip_tail(file, size)
        file.seek(8)
        header = file.read(length)
    try:
        table = loads_strict(header)
    except ValueError as error:
        _invalid(f"its header is damaged: {error}")
    _check_metadata(table.pop("__metadata__", None))
    data_start = 8 + length
    records = {name: _record(name, entry, data_start) for name, entry in table.items()}
    _check_coverage(records, data_start, size)
    return records


def _record(name: str, entry: object, data_start: int) -> TensorRecord:
    if len(name) > MAX_NAME_LENGTH or not _NAME.fullmatch(name):
        raise InvalidAdapter(
            f"The tensor name {show(name)} is not allowed: names are at most {MAX_NAME_LENGTH} letters, digits and underscores, "
            "joined by single dots. Save the adapter again with PEFT and do not rename its tensors.",
            code="invalid_tensor_name",
            param=MODEL_FILE,
        )
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _invalid(f"tensor {show(name)} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        _invalid(f"tensor {show(name)} has the unknown dtype {show(dtype)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(_is_size(n) for n in shape):
        _invalid(f"tensor {show(name)} has a shape that is not a list of at most {MAX_DIMENSIONS} non-negative integers")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        _invalid(f"tensor {show(name)} has data_offsets that are not two non-negative integers")
    bits = _BITS[dtype]
    for n in shape:
        bits *= n
        if bits > MAX_SIZE:
            _invalid(f"tensor {show(name)} has a shape that overflows")
    if bits % 8 or offsets[1] - offsets[0] != bits // 8:
        _invalid(f"tensor {show(name)} has data_offsets that do not match its dtype and shape")
    return TensorRecord(dtype, tuple(shape), data_start + offsets[0], bits // 8)


def _check_coverage(records: dict[str, TensorRecord], data_start: int, size: int) -> None:
    """Invariant: the tensors, laid end to end, are exactly the rest of the file. No gap can hide bytes, and no byte is read twice."""
    end = data_start
    for name, record in sorted(records.items(), key=lambda item: (item[1].offset, item[1].size_bytes)):
        if record.offset != end:
            _invalid(f"tensor {show(name)} {'overlaps another' if record.offset < end else 'leaves a hole before it'}")
        end += record.size_bytes
    if end > size:
        _invalid(f"its tensors need {end} bytes, but the file has {size}: it is truncated")
    if end < size:
        _invalid(f"it has {size - end} bytes after its last tensor")


def _check_metadata(metadata: object) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _invalid("its __metadata__ must map text to text")


def _reject_other_formats(start: bytes) -> None:
    if start.startswith(_LFS_POINTER):
        _invalid("it is a Git LFS pointer, not the file itself (run `git lfs pull` first)")
    # Also at the place of the JSON, since a pickle may follow eight harmless bytes.
    for head in (start, start[8:]):
        for pattern, what in _UNSAFE:
            if pattern.match(head):
                _unsafe(what)


def _reject_zip_tail(file: BinaryIO, size: int) -> None:
    """Refuse a file with a valid zip directory at its end. Zip readers start from the end of a file, so an archive can hide inside tensor
    data."""
    file.seek(max(0, size - 65535 - _ZIP_END_BYTES))
    tail_start = file.tell()
    tail = file.read()
    at = tail.rfind(_ZIP_END)
    if at < 0 or len(tail) - at < _ZIP_END_BYTES:
        return
    directory_bytes = int.from_bytes(tail[at + 12 : at + 16], "little")
    comment_bytes = int.from_bytes(tail[at + 20 : at + 22], "little")
    directory = tail_start + at - directory_bytes
    if at + _ZIP_END_BYTES + comment_bytes != len(tail) or directory < 0:
        return
    file.seek(directory)
    if file.read(4) == b"PK\x01\x02":
        _unsafe("a zip archive behind a safetensors header")


def _model_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    try:
        weight_map = loads_strict(index.read_bytes()).get("weight_map")
    except OSError:
        raise InvalidRequest(
            f"The base model's folder {folder} has neither model.safetensors nor model.safetensors.index.json.", code="invalid_base_model"
        ) from None
    except ValueError as error:
        raise InvalidRequest(f"The base model's {index.name} is damaged: {error}.", code="invalid_base_model") from None
    files = set(weight_map.values()) if isinstance(weight_map, dict) and all(isinstance(v, str) for v in weight_map.values()) else set()
    if not files or any(Path(name).name != name or not name.endswith(".safetensors") for name in files):
        raise InvalidRequest(f"The base model's {index.name} must map tensors to safetensors files beside it.", code="invalid_base_model")
    return [folder / name for name in sorted(files)]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, inner in pairs:
        if key in value:
            raise ValueError(f"the key {show(key)} appears twice")
        value[key] = inner
    return value


def _inside(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _small_int(text: str) -> int:
    if len(text.lstrip("-")) > MAX_INT_DIGITS:
        raise ValueError("it contains a number that is too large")
    return int(text)


def _finite_float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError("it contains a number that is too large")
    return value


def _is_size(value: object) -> bool:
    # `type`, because in Python JSON's true is also an int.
    return type(value) is int and 0 <= value <= MAX_SIZE


def _invalid(reason: str) -> NoReturn:
    raise InvalidAdapter(f"The file is not a valid safetensors file: {reason}. {_ADVICE}", code="invalid_safetensors", param=MODEL_FILE)


def _unsafe(what: str) -> NoReturn:
    raise InvalidAdapter(
        f"The file is {what}, which can run code or hide content when it is opened. {_ADVICE}", code="unsafe_format", param=MODEL_FILE
    )
