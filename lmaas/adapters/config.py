"""Reads `adapter_config.json`: the keys that are accepted, and their meaning for an adapter.

The tensors define an adapter. The configuration adds what they do not contain (alpha, rsLoRA), must not contradict them (rank, layers),
and is replaced by a canonical one, so that no key, text or regular expression of a tenant reaches the engine.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from lmaas.adapters.patterns import PatternError, exactly, matching_values
from lmaas.adapters.safetensors import loads_strict, show
from lmaas.errors import InvalidAdapter, TooLarge

CONFIG_FILE = "adapter_config.json"
#: EVA writes a rank and an alpha for every module of the model.
MAX_CONFIG_BYTES = 512 * 1024
#: The maximum number of ranks and alphas that differ from the usual one. The engine tries a pattern for each of them on every module.
MAX_DIFFERENT = 64
#: PEFT's values for keys that are missing.
DEFAULT_RANK, DEFAULT_ALPHA = 8, 8

CHECKED_KEYS = frozenset({
    "peft_type", "task_type", "r", "lora_alpha", "use_rslora", "bias", "target_modules", "layers_to_transform", "init_lora_weights",
    "auto_mapping", "rank_pattern", "alpha_pattern", "ensure_weight_tying",
})  # fmt: skip
#: Keys that do not change what a trained adapter computes.
HARMLESS_KEYS = frozenset({
    # PEFT: where the adapter came from, what was adapted and how training began. The tensors show the outcome.
    "base_model_name_or_path", "revision", "peft_version", "inference_mode", "lora_dropout", "exclude_modules", "layers_pattern",
    "eva_config", "corda_config", "loftq_config", "lora_ga_config", "qalora_group_size", "runtime_config", "megatron_core",
    "modules_to_tie", "target_modules_to_tie", "merge_weights", "low_cpu_mem_usage", "autocast_adapter_dtype",
    # PEFT: whether the base stores weights transposed. A and B are never stored in that way.
    "fan_in_fan_out",
    # The origin of the file: transformers, hubs and training programs.
    "_name_or_path", "_commit_hash", "transformers_version", "framework_version", "framework_versions", "library_name", "pipeline_tag",
    "model_type", "architectures", "model_name", "model_id", "adapter_name", "name", "description", "notes", "author", "license",
    "language", "tags", "created_at", "timestamp", "version", "torch_dtype", "dtype", "lora_dtype", "quantization_config", "load_in_4bit",
    "load_in_8bit", "unsloth_version", "unsloth_fixed", "axolotl_version", "llamafactory_version", "swift_version", "trl_version",
    "torch_version", "python_version",
    # Parameters of the training.
    "dataset", "datasets", "dataset_name", "metrics", "seed", "random_state", "optim", "optimizer", "learning_rate", "lr_scheduler_type",
    "loraplus_lr_ratio", "loraplus_lr_embedding", "lorap_lr_ratio", "lorap_emb_lr", "weight_decay", "warmup_steps", "warmup_ratio", "epoch",
    "epochs", "num_epochs", "num_train_epochs", "max_steps", "global_step", "step", "batch_size", "per_device_train_batch_size",
    "gradient_accumulation_steps", "gradient_checkpointing", "use_gradient_checkpointing", "max_seq_length", "max_length", "cutoff_len",
    "packing", "bf16", "fp16", "report_to", "training_args",
})  # fmt: skip
#: Keys that change what an adapter computes in ways that the engine does not offer (vllm/lora/peft_helper.py), and why they are refused.
UNSUPPORTED_KEYS = {
    "use_dora": "the engine does not compute DoRA's magnitudes. Train with use_dora=False",
    "modules_to_save": "the engine cannot replace whole modules of the shared base model. Train without modules_to_save",
    "trainable_token_indices": "the engine cannot replace embeddings of the shared base model. Train without trainable_token_indices",
    "lora_bias": "the engine does not add biases. Train with lora_bias=False",
    "megatron_config": "the engine does not have Megatron's layers. Train without megatron_config",
    "layer_replication": "the engine cannot repeat layers of the shared base model. Train without layer_replication",
    "target_parameters": "the engine adapts modules, not bare parameters. Train with target_modules",
    "alora_invocation_tokens": "the engine applies an adapter to every token. Train without alora_invocation_tokens",
    "use_qalora": "the engine does not pool inputs in groups, as QALoRA does. Train with use_qalora=False",
    "use_bdlora": "the engine does not compute block-diagonal LoRA. Train without use_bdlora",
    "arrow_config": "the engine does not route between adapters. Train without arrow_config",
    "kasa_config": "KaSA changes the base model's weights. Train without kasa_config",
    "velora_config": "VeLoRA stores tensors that the engine cannot read. Train without velora_config",
    "monteclora_config": "MonteCLoRA stores tensors that the engine cannot read. Train without monteclora_config",
    "enable_lora": "the engine does not split a module's outputs. Train without enable_lora",
}
#: Initialisations after which a saved adapter is a plain LoRA; the others (PiSSA, OLoRA, CorDA, LoftQ) also change the base weights.
PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})
#: PEFT adds these to modules_to_save for tasks with a head of their own, also where the model has none. A trained one is a tensor.
TASK_HEADS = frozenset({"classifier", "score", "qa_outputs"})

Number = int | float


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The content of an `adapter_config.json`: rank and alpha with their patterns, the layers (None: any), and whether input and output
    embeddings share one LoRA."""

    rank: int
    alpha: Number
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, Number]
    layers: frozenset[int] | None
    tied: bool

    def check_ranks(self, ranks: Mapping[str, int]) -> None:
        """Raise InvalidAdapter `rank_not_supported` if a module's tensors have a rank that the configuration does not give it.

        Any pattern that matches the module may give it, because PEFT sorts patterns when it saves, so their order in training is lost.
        """
        try:
            wanted = matching_values(self.rank_pattern, ranks)
        except PatternError as error:
            _refuse("unsupported_adapter", f"rank_pattern cannot be used: {error}. Name modules exactly, or with simpler patterns.")
        for module, rank in ranks.items():
            if rank not in (wanted[module] or [self.rank]):
                source = f"rank_pattern gives {wanted[module][0]}" if wanted[module] else f"r is {self.rank}"
                _refuse(
                    "rank_not_supported",
                    f"the tensors of {show(module)} have rank {rank}, but {source}. Upload the config of the same training run.",
                )

    def alphas(self, modules: Collection[str]) -> dict[str, Number]:
        """Return the alpha of each module. Raises InvalidAdapter if `alpha_pattern` cannot be matched."""
        try:
            return {module: [*values, self.alpha][0] for module, values in matching_values(self.alpha_pattern, modules).items()}
        except PatternError as error:
            _refuse("unsupported_adapter", f"alpha_pattern cannot be used: {error}. Name modules exactly, or with simpler patterns.")

    def scaling(self, rank: int, alpha: Number) -> float:
        """Return the factor by which PEFT and the engine multiply a module's B."""
        return float(alpha) / math.sqrt(rank) if self.use_rslora else float(alpha) / rank

    def check_layers(self, modules: Iterable[str]) -> None:
        """Raise InvalidAdapter if there are tensors of layers that the configuration leaves out."""
        if self.layers is None:
            return
        present = {int(part) for module in modules for part in [next((p for p in module.split(".") if p.isdigit()), "")] if part}
        if not present <= self.layers:
            _refuse(
                "unsupported_adapter",
                f"layers_to_transform is {show(sorted(self.layers))}, but the tensors are of the layers {show(sorted(present))}. "
                "Upload the config of the same training run.",
            )


def canonical_config(
    config: AdapterConfig, ranks: Mapping[str, int], alphas: Mapping[str, Number], target_modules: list[str]
) -> dict[str, Any]:
    """Return the `adapter_config.json` to store and to pass to the engine. Its patterns match exact module names."""
    rank, rank_pattern = _usual_and_others(ranks)
    alpha, alpha_pattern = _usual_and_others(alphas)
    if len(rank_pattern) + len(alpha_pattern) > MAX_DIFFERENT:
        _refuse("unsupported_adapter", f"the modules have more than {MAX_DIFFERENT} different ranks and alphas. Use fewer.")
    canonical = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": config.use_rslora,
        "target_modules": target_modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    # Only where needed: the canonical config is part of the content hash, which must stay the same for adapters without patterns.
    return canonical | {name: value for name, value in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)) if value}


def _usual_and_others(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the most frequent value, and a pattern for each other value."""
    [(usual, _)] = Counter(values.values()).most_common(1)
    modules: dict[Any, list[str]] = {}
    for module, value in values.items():
        modules.setdefault(value, []).append(module)
    return usual, {exactly(modules[value]): value for value in sorted(modules) if value != usual}


def read_config(data: bytes, max_rank: int) -> AdapterConfig:
    """Parse an `adapter_config.json`.

    Raises InvalidAdapter (`invalid_json`, `unsupported_adapter` or `rank_not_supported`), or TooLarge beyond 512 KiB.
    """
    if len(data) > MAX_CONFIG_BYTES:
        raise TooLarge(
            f"{CONFIG_FILE} has {len(data)} bytes, more than the {MAX_CONFIG_BYTES} allowed. Upload the file that PEFT wrote.",
            param=CONFIG_FILE,
        )
    try:
        config = loads_strict(data)
    except ValueError as error:
        _refuse("invalid_json", f"the file cannot be read: {error}. Upload the file that PEFT's save_pretrained wrote.")
    _check_kind(config)
    _check_keys(config)
    rank_pattern = _pattern(config, "rank_pattern", _is_rank, "positive whole numbers")
    alpha_pattern = _pattern(config, "alpha_pattern", _is_finite, "finite numbers")
    rank = config.get("r", DEFAULT_RANK)
    # A rank that is not used may exceed the limit: PEFT keeps r even where rank_pattern overrides it everywhere.
    if not _is_rank(rank) or (rank > max_rank and not rank_pattern):
        _refuse("rank_not_supported", f"r is {show(rank)}. Train the adapter with a rank r from 1 to {max_rank}.")
    alpha = config.get("lora_alpha", DEFAULT_ALPHA)
    if not _is_finite(alpha):
        _refuse("unsupported_adapter", f"lora_alpha is {show(alpha)}. It must be a finite number.")
    use_rslora = config.get("use_rslora")
    if not (use_rslora is None or isinstance(use_rslora, bool)):
        _refuse("unsupported_adapter", f"use_rslora is {show(use_rslora)}. It must be true or false.")
    return AdapterConfig(
        rank, alpha, bool(use_rslora), rank_pattern, alpha_pattern, _layers(config), tied=bool(config.get("ensure_weight_tying"))
    )


def _check_keys(config: dict[str, Any]) -> None:
    """Refuse keys that change the computation, and unknown keys that might, unless their value is null, false or empty."""
    for key, value in config.items():
        if key in HARMLESS_KEYS or key in CHECKED_KEYS or is_nothing(value):
            continue
        if key == "modules_to_save" and isinstance(value, list) and all(isinstance(name, str) and name in TASK_HEADS for name in value):
            continue
        if key in UNSUPPORTED_KEYS:
            _refuse("unsupported_adapter", f"{key} is set, but {UNSUPPORTED_KEYS[key]}.")
        _refuse(
            "unsupported_adapter",
            f"the key {show(key)} is not known, so it might change what the adapter computes. Remove the key if it does not, or train "
            "without it.",
        )


def _check_kind(config: dict[str, Any]) -> None:
    unsupported = "unsupported_adapter"
    kind = config.get("peft_type")
    if kind is not None and not (isinstance(kind, str) and kind.upper() == "LORA"):
        _refuse(unsupported, f"peft_type is {show(kind)}. Only LORA adapters can be served.")
    task = config.get("task_type")
    if not (task is None or isinstance(task, str)):
        _refuse(unsupported, f"task_type is {show(task)}. It must be a string or null. Upload the file that PEFT wrote.")
    # Biases would be separate tensors, which are refused. Base models such as Llama have none to train.
    if config.get("bias") not in ("none", "all", "lora_only", None):
        _refuse(unsupported, f"bias is {show(config['bias'])}. Train the adapter with bias='none'.")
    init = config.get("init_lora_weights")
    if not (init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in PLAIN_INITS)):
        _refuse(
            unsupported,
            f"init_lora_weights is {show(init)}, which changes the base model's weights. Convert the adapter to a plain LoRA with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...).",
        )
    targets = config.get("target_modules")
    if not (targets is None or isinstance(targets, str) or (isinstance(targets, list) and all(isinstance(t, str) for t in targets))):
        _refuse(unsupported, "target_modules must be a list of names or a string. Upload the file that PEFT wrote.")
    if not isinstance(config.get("ensure_weight_tying"), bool | None):
        _refuse(unsupported, f"ensure_weight_tying is {show(config['ensure_weight_tying'])}. It must be true or false.")
    mapping = config.get("auto_mapping")
    # PEFT writes the model's class when the task is not given. It is never looked up here, but a custom class means other code.
    known = isinstance(mapping, dict) and str(mapping.get("parent_library", "transformers")).split(".")[0] == "transformers"
    if not (is_nothing(mapping) or known):
        _refuse(unsupported, "auto_mapping names a custom model class. Train on the plain transformers model, with task_type CAUSAL_LM.")


def _pattern(config: dict[str, Any], key: str, is_value: Any, values: str) -> dict[str, Any]:
    pattern = config.get(key)
    if not pattern:
        return {}
    if not isinstance(pattern, dict):
        _refuse("unsupported_adapter", f"{key} must map patterns of module names to {values}. Upload the file that PEFT wrote.")
    for name, value in pattern.items():
        if not is_value(value):
            _refuse("unsupported_adapter", f"{key} has the value {show(value)} for {show(name)}. Its values must be {values}.")
    return pattern


def _layers(config: dict[str, Any]) -> frozenset[int] | None:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return None
    wanted = layers if isinstance(layers, list) else [layers]
    if not all(type(layer) is int for layer in wanted):
        _refuse("unsupported_adapter", f"layers_to_transform is {show(layers)}. It must be a whole number, or a list of them.")
    return frozenset(wanted)


def _is_rank(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_nothing(value: object) -> bool:
    """Return whether a value is null, false, empty, or consists only of such values, so that its key has no effect."""
    if isinstance(value, dict):
        return all(is_nothing(inner) for inner in value.values())
    if isinstance(value, list):
        return all(is_nothing(inner) for inner in value)
    return value is None or value is False or value == ""


def _refuse(code: str, reason: str) -> NoReturn:
    raise InvalidAdapter(f"{CONFIG_FILE}: {reason}", code=code, param=CONFIG_FILE)
