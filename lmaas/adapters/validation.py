"""Whether an uploaded adapter can be served, decided from its bytes: nothing is executed, imported or matched by a tenant's pattern.

The tensors say what an adapter is. The config is believed only where they cannot speak (alpha, rsLoRA), must not contradict them (rank,
layers), and is replaced by a canonical one, so that the engine never sees a key, a text or a regular expression that a tenant wrote.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NoReturn

from lmaas.adapters.safetensors import MODEL_FILE, TensorRecord, loads_strict, read_header, show
from lmaas.errors import InvalidAdapter, TooLarge
from lmaas.types import BaseModelShapes

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 64 * 1024
_CHUNK_BYTES = 4 * 1024 * 1024

_UNSAFE_SUFFIXES = frozenset({
    ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".npy", ".npz", ".h5", ".hdf5", ".keras", ".pb", ".onnx",
    ".msgpack", ".gguf", ".ggml", ".mar", ".nemo", ".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".whl", ".egg",
    ".so", ".dll", ".exe",
})  # fmt: skip

#: The largest finite number of each engine dtype.
_LARGEST = {"float32": 3.4028234663852886e38, "bfloat16": 3.3895313892515355e38, "float16": 65504.0}
_STORED = frozenset({"F32", "F16", "BF16"})

#: These say where an adapter came from or how it was trained. They do not change what it computes: dropped unread.
_IGNORED_KEYS = frozenset({
    "base_model_name_or_path", "revision", "peft_version", "inference_mode", "lora_dropout", "exclude_modules", "layers_pattern",
    "megatron_core", "eva_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying", "runtime_config",
})  # fmt: skip
_CHECKED_KEYS = frozenset({
    "peft_type", "task_type", "r", "lora_alpha", "use_rslora", "bias", "target_modules", "layers_to_transform", "init_lora_weights",
    "auto_mapping",
})  # fmt: skip
#: These change what an adapter computes, in ways that the engine does not offer (vllm/lora/peft_helper.py): null, false or empty only.
#: vLLM has rank_pattern and alpha_pattern since 0.32, but matches their keys as regular expressions: a tenant's must not get there.
_UNSUPPORTED_KEYS = {
    "use_dora": "DoRA is not supported",
    "modules_to_save": "fully trained modules are not supported",
    "trainable_token_indices": "vocabulary changes are not supported",
    "rank_pattern": "one adapter must have one rank",
    "alpha_pattern": "one adapter must have one lora_alpha",
    "fan_in_fan_out": "transposed weights are not supported",
    "lora_bias": "biases are not supported",
    "megatron_config": "Megatron layers are not supported",
    "loftq_config": "LoftQ changes the base model's weights",
    "corda_config": "CorDA changes the base model's weights",
    "layer_replication": "replicated layers are not supported",
    "target_parameters": "adapters on bare parameters are not supported",
    "alora_invocation_tokens": "activated LoRA is not supported",
    "use_qalora": "QALoRA is not supported",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "arrow_config": "Arrow routing is not supported",
    "kasa_config": "KaSA is not supported",
    "velora_config": "VeLoRA is not supported",
    "monteclora_config": "MonteCLoRA is not supported",
}
#: Initialisations after which a saved adapter is a plain LoRA; the others (PiSSA, OLoRA, CorDA, LoftQ) also change the base weights.
_PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})

_LORA_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_UNSUPPORTED_TENSORS = (
    (re.compile(r".*lora_magnitude_vector.*"), "it belongs to DoRA; train with use_dora=False"),
    (re.compile(r".*(?:lora_embedding_[AB]|\.token_adapter\.).*"), "it changes the vocabulary; target linear modules only"),
    (re.compile(r".*\.(?:modules_to_save|original_module|base_layer)\..*"), "it is a copy of base weights; train without modules_to_save"),
    (re.compile(r".*\.lora_[AB]\.bias"), "it is a bias; train with lora_bias=False"),
    (re.compile(r".*\.lora_[AB]\.\w+\.weight"), "it carries an adapter's name; save with PEFT's save_pretrained, which leaves it out"),
    (re.compile(r".*\.(?:embed_tokens|lm_head)\..*"), "it extends the vocabulary; target the layers' linear modules only"),
    (re.compile(r"(?!.*lora_).*\.(?:weight|bias)"), "it is no LoRA weight; train without modules_to_save and biases"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What a valid adapter is.

    `rank` is the largest over its modules, `target_modules` the sorted leaf names (`q_proj`), `size_bytes` the tensor file's size,
    `config` the canonical `adapter_config.json` to store and to hand to the engine.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    tensor_count: int
    size_bytes: int
    config: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Pair:
    """The A `(rank, in)` and B `(out, rank)` of one module."""

    a: TensorRecord
    b: TensorRecord


def check_file_names(names: Iterable[str]) -> None:
    """An upload is exactly `adapter_config.json` and `adapter_model.safetensors`.

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


def validate(config_bytes: bytes, model_path: Path, base: BaseModelShapes) -> AdapterFacts:
    """What the adapter is, if the engine can serve it over this base model.

    Reads the tensors once, in pieces of 4 MiB; call it in a thread. Raises InvalidAdapter with one of the codes of trust.md's "Adapter
    upload", `invalid_json` for a config that is no strict JSON object, and TooLarge for a config over 64 KiB.
    """
    config = _read_config(config_bytes)
    rank, alpha, use_rslora = _check_config(config, base.max_lora_rank)
    scaling = alpha / math.sqrt(rank) if use_rslora else alpha / rank
    if scaling > _LARGEST[base.dtype]:
        _refuse_config(
            "non_finite_weights", f"lora_alpha {alpha:g} makes a scaling beyond {base.dtype}. Use the alpha of the training run."
        )
    records = read_header(model_path)
    pairs = _pair_tensors(records, base)
    for module, pair in pairs.items():
        _check_shapes(module, pair, base.linears[module], rank)
    _check_layers(config.get("layers_to_transform"), pairs)
    _check_weights(model_path, pairs, base.dtype, scaling)
    leaves = tuple(sorted({_leaf(module) for module in pairs}))
    return AdapterFacts(
        rank=rank,
        alpha=alpha,
        target_modules=leaves,
        tensor_count=len(records),
        size_bytes=max(record.offset + record.size_bytes for record in records.values()),
        config={
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": None,
            "revision": None,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": config["lora_alpha"],
            "lora_dropout": 0.0,
            "use_rslora": use_rslora,
            # Leaf names mean every layer to PEFT. An adapter on some of them lists its modules in full.
            "target_modules": list(leaves) if len(pairs) == sum(_leaf(m) in leaves for m in base.linears) else sorted(pairs),
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "modules_to_save": None,
        },
    )


def _read_config(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_CONFIG_BYTES:
        raise TooLarge(
            f"{CONFIG_FILE} has {len(data)} bytes, more than the {MAX_CONFIG_BYTES} allowed. Upload the file that PEFT wrote.",
            param=CONFIG_FILE,
        )
    try:
        return loads_strict(data)
    except ValueError as error:
        _refuse_config("invalid_json", f"the file cannot be read: {error}. Upload the file that PEFT's save_pretrained wrote.")


def _check_config(config: dict[str, Any], max_rank: int) -> tuple[int, float, bool]:
    """Rank, alpha and use_rslora. A key that is not known here passes only while it is null, false or empty: it asks for nothing then."""
    unsupported = "unsupported_adapter"
    if config.get("peft_type") != "LORA":
        _refuse_config(unsupported, f"peft_type is {show(config.get('peft_type'))}. Only LORA adapters can be served.")
    if config.get("task_type") not in ("CAUSAL_LM", None):
        _refuse_config(unsupported, f"task_type is {show(config['task_type'])}. Only CAUSAL_LM adapters can be served.")
    for key, value in config.items():
        if key in _IGNORED_KEYS or key in _CHECKED_KEYS or _is_nothing(value):
            continue
        if key in _UNSUPPORTED_KEYS:
            _refuse_config(unsupported, f"{key} is set, but {_UNSUPPORTED_KEYS[key]}. Train the adapter without {key}.")
        _refuse_config(unsupported, f"the key {show(key)} is not known. Remove it if the adapter does not need it, or train without it.")
    if config.get("bias") not in ("none", None):
        _refuse_config(unsupported, f"bias is {show(config['bias'])}. Train the adapter with bias='none'.")
    init = config.get("init_lora_weights")
    if not (init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in _PLAIN_INITS)):
        _refuse_config(
            unsupported,
            f"init_lora_weights is {show(init)}, which changes the base model's weights. Convert the adapter to a plain LoRA with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...).",
        )
    targets = config.get("target_modules")
    if not (targets is None or isinstance(targets, str) or (isinstance(targets, list) and all(isinstance(t, str) for t in targets))):
        _refuse_config(unsupported, "target_modules must be a list of names, or a text. Upload the file that PEFT wrote.")
    mapping = config.get("auto_mapping")
    # PEFT writes the model's class when the task is not given. It is never looked up here, but a custom class means other code.
    known = isinstance(mapping, dict) and str(mapping.get("parent_library", "transformers")).split(".")[0] == "transformers"
    if not (_is_nothing(mapping) or known):
        _refuse_config(
            unsupported, "auto_mapping names a custom model class. Train on the plain transformers model, with task_type CAUSAL_LM."
        )
    return _check_numbers(config, max_rank)


def _check_numbers(config: dict[str, Any], max_rank: int) -> tuple[int, float, bool]:
    rank = config.get("r")
    if type(rank) is not int or not 1 <= rank <= max_rank:
        _refuse_config("rank_not_supported", f"r is {show(rank)}. Train the adapter with a rank r from 1 to {max_rank}.")
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not (math.isfinite(alpha) and alpha > 0):
        _refuse_config("unsupported_adapter", f"lora_alpha is {show(alpha)}. It must be a finite positive number.")
    use_rslora = config.get("use_rslora")
    if not (use_rslora is None or isinstance(use_rslora, bool)):
        _refuse_config("unsupported_adapter", f"use_rslora is {show(use_rslora)}. It must be true or false.")
    return rank, float(alpha), bool(use_rslora)


def _pair_tensors(records: dict[str, TensorRecord], base: BaseModelShapes) -> dict[str, _Pair]:
    """The A and B of each module of the base that the file names; refuses every tensor that would be ignored or misread by the engine."""
    if not records:
        _refuse_tensors("no_target_modules", "The file has no tensors. Upload the adapter after training it.")
    sides: dict[str, dict[str, TensorRecord]] = {}
    for name, record in records.items():
        match = _LORA_TENSOR.fullmatch(name)
        if match is None or match["module"] not in base.linears:
            for pattern, why in _UNSUPPORTED_TENSORS:
                if pattern.fullmatch(name):
                    _refuse_tensors("unsupported_adapter", f"The tensor {show(name)} cannot be served: {why}.")
        if match is None:
            _refuse_tensors(
                "no_target_modules",
                f"The tensor {show(name)} is not named base_model.model.<module>.lora_A.weight or lora_B.weight. "
                "Save the adapter with PEFT's save_pretrained and do not rename its tensors.",
            )
        if record.dtype not in _STORED:
            _refuse_tensors("unsupported_adapter", f"The tensor {show(name)} is {record.dtype}. Save the adapter as F32, F16 or BF16.")
        sides.setdefault(match["module"], {})[match["side"]] = record
    _check_modules(sides, base)
    for module, pair in sides.items():
        if len(pair) != 2:
            have, lack = ("A", "B") if "A" in pair else ("B", "A")
            _refuse_tensors("invalid_safetensors", f"{show(module)} has lora_{have} but no lora_{lack}. Upload the complete file.")
    return {module: _Pair(pair["A"], pair["B"]) for module, pair in sides.items()}


def _check_modules(modules: Iterable[str], base: BaseModelShapes) -> None:
    unknown = [module for module in modules if module not in base.linears]
    if not unknown:
        return
    leaves = {_leaf(module) for module in base.linears}
    served = f"It can adapt: {', '.join(sorted(leaves))}."
    if len(unknown) < len(set(modules)) and _leaf(unknown[0]) in leaves:
        _refuse_tensors(
            "base_model_mismatch",
            f"The base model has no module {show(unknown[0])}: the adapter was trained on another base. Train it on this one.",
        )
    _refuse_tensors("no_target_modules", f"The adapter targets {show(unknown[0])}, which the base model does not have. {served}")


def _check_shapes(module: str, pair: _Pair, linear: tuple[int, int], rank: int) -> None:
    out_features, in_features = linear
    for side, shape, wanted, axis in (("A", pair.a.shape, in_features, 1), ("B", pair.b.shape, out_features, 0)):
        if len(shape) != 2 or shape[axis] != wanted:
            _refuse_tensors(
                "base_model_mismatch",
                f"lora_{side} of {show(module)} has the shape {list(shape)}, but this base model needs "
                f"{[rank, wanted] if side == 'A' else [wanted, rank]}. Upload it for the base model that it was trained on.",
            )
        if shape[1 - axis] != rank:
            _refuse_tensors(
                "rank_not_supported",
                f"lora_{side} of {show(module)} has rank {shape[1 - axis]}, but r is {rank} in {CONFIG_FILE}. "
                "Upload the config of the same training run; one adapter must have one rank.",
            )


def _check_layers(layers: object, modules: Iterable[str]) -> None:
    if layers is None or layers == []:
        return
    wanted = layers if isinstance(layers, list) else [layers]
    present = {int(part) for module in modules for part in [next((p for p in module.split(".") if p.isdigit()), "")] if part}
    if not all(type(layer) is int for layer in wanted) or set(wanted) != present:
        _refuse_config(
            "unsupported_adapter",
            f"layers_to_transform is {show(layers)}, but the tensors are of the layers {show(sorted(present))}. "
            "Upload the config of the same training run.",
        )


def _check_weights(path: Path, pairs: dict[str, _Pair], dtype: str, scaling: float) -> None:
    """Every weight is finite in the engine's dtype, and so is B after the engine multiplies the scaling into it; and some module acts."""
    acts = False
    with path.open("rb") as file:
        for module, pair in pairs.items():
            a_acts = _scan(file, pair.a, f"lora_A of {show(module)}", dtype, 1.0)
            b_acts = _scan(file, pair.b, f"lora_B of {show(module)}", dtype, scaling)
            acts = acts or (a_acts and b_acts)
    if not acts:
        _refuse_tensors(
            "no_effect",
            f"In every module lora_A or lora_B is zero in the engine's {dtype}, so the adapter changes nothing. Upload it after training.",
        )


def _scan(file: BinaryIO, record: TensorRecord, what: str, dtype: str, scaling: float) -> bool:
    """Whether any weight is other than zero; refuses NaN and infinity."""
    from lmaas.adapters.weights import look_at  # noqa: PLC0415 (a gateway that takes no upload does without numpy)

    acts = False
    file.seek(record.offset)
    for start in range(0, record.size_bytes, _CHUNK_BYTES):
        # Plain reads, not a memory map: a page that cannot be read would kill the process instead of failing this upload.
        wanted = min(_CHUNK_BYTES, record.size_bytes - start)
        data = file.read(wanted)
        if len(data) != wanted:
            _refuse_tensors("invalid_safetensors", "The file became shorter while it was read. Upload it again.")
        finite, some_act = look_at(data, record.dtype, dtype, scaling)
        if not finite:
            _refuse_tensors(
                "non_finite_weights",
                f"{what} has NaN or infinite weights, or some too large for the engine's {dtype} (lora_B: after scaling by lora_alpha). "
                "Train again with a lower learning rate and check the loss.",
            )
        acts = acts or some_act
    return acts


def _is_nothing(value: object) -> bool:
    """Null, false, empty, or made of only such: a key that asks for nothing."""
    if isinstance(value, dict):
        return all(_is_nothing(inner) for inner in value.values())
    if isinstance(value, list):
        return all(_is_nothing(inner) for inner in value)
    return value is None or value is False or value == ""


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]


def _refuse_config(code: str, reason: str) -> NoReturn:
    raise InvalidAdapter(f"{CONFIG_FILE}: {reason}", code=code, param=CONFIG_FILE)


def _refuse_tensors(code: str, reason: str) -> NoReturn:
    raise InvalidAdapter(reason, code=code, param=MODEL_FILE)
