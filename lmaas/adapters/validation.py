"""Checks from its bytes whether an uploaded adapter can be served. Nothing is executed or imported."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from lmaas.adapters.base_weights import check_base_copy
from lmaas.adapters.config import CONFIG_FILE, AdapterConfig, Number, canonical_config, read_config
from lmaas.adapters.safetensors import MODEL_FILE, TensorRecord, read_header, show
from lmaas.adapters.tensors import EMBEDDING, HEAD, AdapterTensors, Pair, leaf, read_tensors, refuse_tensors
from lmaas.errors import InvalidAdapter
from lmaas.types import BaseModelShapes

_CHUNK_BYTES = 4 * 1024 * 1024

_UNSAFE_SUFFIXES = frozenset({
    ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".npy", ".npz", ".h5", ".hdf5", ".keras", ".pb", ".onnx",
    ".msgpack", ".gguf", ".ggml", ".mar", ".nemo", ".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".whl", ".egg",
    ".so", ".dll", ".exe",
})  # fmt: skip

#: The largest finite number of each engine dtype.
_LARGEST = {"float32": 3.4028234663852886e38, "bfloat16": 3.3895313892515355e38, "float16": 65504.0}


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """The properties of a valid adapter.

    `rank` is the largest over its modules, `target_modules` the sorted leaf names (`q_proj`), `config` the canonical `adapter_config.json`
    to store and to pass to the engine. `records` are the tensors of the file; those in `left_out` are copies of base weights that are not
    stored.
    """

    rank: int
    target_modules: tuple[str, ...]
    config: dict[str, Any]
    records: Mapping[str, TensorRecord]
    left_out: frozenset[str]


def check_file_names(names: Iterable[str]) -> None:
    """Check that an upload is exactly `adapter_config.json` and `adapter_model.safetensors`.

    Raises InvalidAdapter: `unsafe_format` for a name of a format that can run code, `unexpected_file` for any other file or one sent twice,
    `invalid_adapter` for a missing one.
    """
    given = list(names)
    for name in given:
        if not _UNSAFE_SUFFIXES.isdisjoint(PurePosixPath(name.lower().replace("\\", "/")).suffixes):
            raise InvalidAdapter(
                f"The file {show(name)} is of a format that can run code or hide content. "
                f"Save the adapter with PEFT's save_pretrained(..., safe_serialization=True) and upload {MODEL_FILE}.",
                code="unsafe_format",
                param=MODEL_FILE,
            )
    expected = {CONFIG_FILE, MODEL_FILE}
    for position, name in enumerate(given):
        if name not in expected or name in given[:position]:
            raise InvalidAdapter(
                f"The file {show(name)} is not expected{' twice' if name in expected else ''}. Upload {CONFIG_FILE} and {MODEL_FILE} only: "
                "tokenizers, templates, code and other files are not used.",
                code="unexpected_file",
            )
    for name in sorted(expected - set(given)):
        raise InvalidAdapter(f"The file {name} is missing. Upload {CONFIG_FILE} and {MODEL_FILE} together.", param=name)


def validate(
    config_bytes: bytes, model_path: Path, base: BaseModelShapes, base_folder: Callable[[], Path | None] = lambda: None
) -> AdapterFacts:
    """Return the properties of the adapter, if the engine serves it over this base model as PEFT computes it.

    Reads the tensors once, in pieces of 4 MiB; call it in a thread. `base_folder` finds the base model's files, and is called only if the
    upload has copies of base weights to compare. Raises InvalidAdapter with a code for the reason (docs/reference/adapters.md),
    `invalid_json` for a config that is not a strict JSON object, and TooLarge for a config over 512 KiB.
    """
    config = read_config(config_bytes, base.max_lora_rank)
    records = read_header(model_path)
    tensors = read_tensors(records, base)
    ranks = {module: pair.rank for module, pair in tensors.pairs.items()}
    config.check_ranks(ranks)
    config.check_layers(tensors.pairs)
    _check_tying(config, tensors)
    alphas = config.alphas(tensors.pairs)
    leaves = sorted({leaf(module) for module in tensors.pairs})
    # Leaf names mean every layer to PEFT. An adapter on some of them lists its modules in full.
    everywhere = len(tensors.pairs) == sum(leaf(module) in leaves for module in base.linears)
    canonical = canonical_config(config, ranks, alphas, leaves if everywhere else sorted(tensors.pairs))
    _check_weights(model_path, tensors.pairs, base.dtype, config, alphas)
    if tensors.base_copies:
        folder = base_folder()
        for name, module in tensors.base_copies.items():
            check_base_copy(model_path, name, records[name], module, folder)
    return AdapterFacts(max(ranks.values()), tuple(leaves), canonical, records, frozenset(tensors.base_copies))


def _check_tying(config: AdapterConfig, tensors: AdapterTensors) -> None:
    """Refuse ensure_weight_tying with the LoRA of only one of the two modules that it ties, because PEFT would use it in both."""
    if config.tied and len({EMBEDDING, HEAD} & {leaf(module) for module in tensors.pairs}) == 1:
        raise InvalidAdapter(
            f"{CONFIG_FILE}: ensure_weight_tying is set, which uses one LoRA in {EMBEDDING} and {HEAD}, but the tensors are of one of them "
            "only. Save the adapter with a PEFT that writes both, or train without ensure_weight_tying.",
            code="unsupported_adapter",
            param=CONFIG_FILE,
        )


def _check_weights(path: Path, pairs: Mapping[str, Pair], dtype: str, config: AdapterConfig, alphas: Mapping[str, Number]) -> None:
    """Check that every weight is finite in the engine's dtype, also in B after the engine multiplies the scaling into it, and that some
    module has an effect."""
    acts = False
    with path.open("rb") as file:
        for module, pair in pairs.items():
            scaling = config.scaling(pair.rank, alphas[module])
            if abs(scaling) > _LARGEST[dtype]:
                raise InvalidAdapter(
                    f"{CONFIG_FILE}: the alpha {alphas[module]:g} of {show(module)} makes a scaling beyond {dtype}. Use the alpha of the "
                    "training run.",
                    code="non_finite_weights",
                    param=CONFIG_FILE,
                )
            a_acts = _scan(file, pair.a, f"lora_A of {show(module)}", dtype, 1.0)
            b_acts = _scan(file, pair.b, f"lora_B of {show(module)}", dtype, scaling)
            acts = acts or (a_acts and b_acts)
    if not acts:
        refuse_tensors(
            "no_effect",
            f"In every module lora_A or lora_B (after scaling by lora_alpha) is zero in the engine's {dtype}, so the adapter changes "
            "nothing. Upload it after training.",
        )


def _scan(file: BinaryIO, record: TensorRecord, what: str, dtype: str, scaling: float) -> bool:
    """Return whether any weight is nonzero. Refuse NaN and infinity."""
    from lmaas.adapters.weights import look_at  # noqa: PLC0415 (a gateway that takes no upload does without numpy)

    acts = False
    file.seek(record.offset)
    for start in range(0, record.size_bytes, _CHUNK_BYTES):
        # Plain reads, not a memory map, in which an unreadable page would kill the process instead of failing this upload.
        wanted = min(_CHUNK_BYTES, record.size_bytes - start)
        data = file.read(wanted)
        if len(data) != wanted:
            refuse_tensors("invalid_safetensors", "The file became shorter while it was read. Upload it again.")
        finite, some_act = look_at(data, record.dtype, dtype, scaling)
        if not finite:
            refuse_tensors(
                "non_finite_weights",
                f"{what} has NaN or infinite weights, or some too large for the engine's {dtype} (lora_B: after scaling by lora_alpha). "
                "Train again with a lower learning rate and check the loss.",
            )
        acts = acts or some_act
    return acts
