"""Finds the modules of the base model that the tensors of an upload adapt, by names and shapes."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from lmaas.adapters.safetensors import MODEL_FILE, TensorRecord, show
from lmaas.errors import InvalidAdapter
from lmaas.types import BaseModelShapes

STORED_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
EMBEDDING, HEAD = "embed_tokens", "lm_head"

#: PEFT's files begin every name with the prefix; state dicts of models into which PEFT only injected an adapter do not.
_PREFIX = r"(?:base_model\.model\.)?"
_LORA = re.compile(_PREFIX + r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_LORA_EMBEDDING = re.compile(_PREFIX + r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])")
#: PEFT writes these beside an adapter for an embedding, or with save_embedding_layers=True.
_BASE_COPY = re.compile(_PREFIX + rf"(?P<module>(?:.+\.)?(?:{EMBEDDING}|{HEAD}))(?:\.base_layer)?\.weight")

_WITHOUT_TOKENS = "it is part of a module that was trained as a whole; train without modules_to_save and trainable_token_indices"
_UNSUPPORTED = (
    (re.compile(r".*lora_magnitude_vector.*"), "it belongs to DoRA; train with use_dora=False"),
    (re.compile(r".*\.(?:modules_to_save|original_module|token_adapter|trainable_tokens_\w+)\..*"), _WITHOUT_TOKENS),
    (re.compile(r"(?!.*lora_).*\.bias"), "it is a bias; train with bias='none'"),
    (re.compile(r".*\.base_layer\..*"), "it is a copy of base weights; upload the LoRA tensors only"),
    (re.compile(r".*\.lora_[AB]\.bias"), "it is a bias; train with lora_bias=False"),
    (re.compile(r".*\.lora_[AB]\.\w+\.weight"), "it carries an adapter's name; save with PEFT's save_pretrained, which leaves it out"),
    (re.compile(r"(?!.*lora_).*\.weight"), "it is a base module that was trained as a whole; train without modules_to_save"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Pair:
    """The A `(rank, in)` and B `(out, rank)` of one module."""

    a: TensorRecord
    b: TensorRecord

    @property
    def rank(self) -> int:
        """The rank, which A and B share."""
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class AdapterTensors:
    """The pairs by module, and the copies of base weights, by tensor name, with the base module of each."""

    pairs: dict[str, Pair]
    base_copies: dict[str, str]


def read_tensors(records: Mapping[str, TensorRecord], base: BaseModelShapes) -> AdapterTensors:
    """Classify the tensors of a file. Raises InvalidAdapter for every one that the engine would ignore or misread."""
    if not records:
        refuse_tensors("no_target_modules", "The file has no tensors. Upload the adapter after training it.")
    sides: dict[str, dict[str, TensorRecord]] = {}
    copies: dict[str, str] = {}
    for name, record in records.items():
        match = _LORA.fullmatch(name) or _LORA_EMBEDDING.fullmatch(name)
        if match is None and (copy := _BASE_COPY.fullmatch(name)):
            copies[name] = copy["module"]
        elif match is None:
            _refuse_name(name)
        else:
            _check_form(name, match, record)
            pair = sides.setdefault(match["module"], {})
            if match["side"] in pair:
                refuse_tensors(
                    "invalid_safetensors", f"The file has lora_{match['side']} of {show(match['module'])} twice, as {show(name)}."
                )
            pair[match["side"]] = record
    if not sides:
        refuse_tensors("no_target_modules", "The file has no LoRA tensors. Upload the adapter that PEFT's save_pretrained wrote.")
    _check_modules(sides, base)
    for module, pair in sides.items():
        if len(pair) != 2:
            have, lack = ("A", "B") if "A" in pair else ("B", "A")
            refuse_tensors("invalid_safetensors", f"{show(module)} has lora_{have} but no lora_{lack}. Upload the complete file.")
    pairs = {module: Pair(pair["A"], pair["B"]) for module, pair in sides.items()}
    for module, found in pairs.items():
        _check_shapes(module, found, base.linears[module], base.max_lora_rank)
    return AdapterTensors(pairs, copies)


def leaf(module: str) -> str:
    """Return the last part of a module's path."""
    return module.rpartition(".")[2]


def refuse_tensors(code: str, reason: str) -> NoReturn:
    """Raise InvalidAdapter about the file of tensors."""
    raise InvalidAdapter(reason, code=code, param=MODEL_FILE)


def _refuse_name(name: str) -> NoReturn:
    for pattern, why in _UNSUPPORTED:
        if pattern.fullmatch(name):
            refuse_tensors("unsupported_adapter", f"The tensor {show(name)} cannot be served: {why}.")
    refuse_tensors(
        "no_target_modules",
        f"The tensor {show(name)} is not named base_model.model.<module>.lora_A.weight or lora_B.weight. "
        "Save the adapter with PEFT's save_pretrained and do not rename its tensors.",
    )


def _check_form(name: str, match: re.Match[str], record: TensorRecord) -> None:
    is_embedding = leaf(match["module"]) == EMBEDDING
    if is_embedding != (match.re is _LORA_EMBEDDING):
        wanted = "lora_embedding_A and lora_embedding_B" if is_embedding else "lora_A.weight and lora_B.weight"
        refuse_tensors("no_target_modules", f"The tensor {show(name)} is not named as PEFT names those of this module: {wanted}.")
    if record.dtype not in STORED_DTYPES:
        refuse_tensors("unsupported_adapter", f"The tensor {show(name)} is {record.dtype}. Save the adapter as F64, F32, F16 or BF16.")


def _check_modules(modules: Iterable[str], base: BaseModelShapes) -> None:
    unknown = [module for module in modules if module not in base.linears]
    if not unknown:
        return
    first, leaves = unknown[0], {leaf(module) for module in base.linears}
    served = f"It can adapt: {', '.join(sorted(leaves))}."
    if leaf(first) in (EMBEDDING, HEAD) and leaf(first) not in leaves:
        refuse_tensors(
            "unsupported_adapter",
            f"The adapter targets {show(first)}, which is not supported for base models of this architecture. {served}",
        )
    if first.startswith("pooler."):
        refuse_tensors(
            "unsupported_adapter",
            f"The adapter targets {show(first)}, which engines do not compute: they pool the tokens' vectors as the model's modules.json "
            "says. Train with exclude_modules=['pooler.dense'].",
        )
    if f"model.{first}" in base.linears:
        refuse_tensors(
            "no_target_modules",
            f"The base model has no module {show(first)}, but {show('model.' + first)}: the adapter was trained on the bare transformer. "
            "Train it on AutoModelForCausalLM.",
        )
    if leaf(first) in leaves and any(module in base.linears for module in modules):
        refuse_tensors(
            "base_model_mismatch",
            f"The base model has no module {show(first)}: the adapter was trained on another base. Train it on this one.",
        )
    refuse_tensors("no_target_modules", f"The adapter targets {show(first)}, which the base model does not have. {served}")


def _check_shapes(module: str, pair: Pair, linear: tuple[int, int], max_rank: int) -> None:
    out_features, in_features = linear
    rank = pair.a.shape[0] if pair.a.shape else 0
    for side, shape, wanted, axis in (("A", pair.a.shape, in_features, 1), ("B", pair.b.shape, out_features, 0)):
        if len(shape) != 2 or shape[axis] != wanted:
            if len(shape) == 2 and (leaf(module), side) in ((EMBEDDING, "A"), (HEAD, "B")):
                refuse_tensors(
                    "base_model_mismatch",
                    f"lora_{side} of {show(module)} is for a vocabulary of {shape[axis]} tokens, but the base model's has {wanted}. "
                    "Train the adapter without adding tokens, or upload it for the base model that it was trained on.",
                )
            refuse_tensors(
                "base_model_mismatch",
                f"lora_{side} of {show(module)} has the shape {list(shape)}, but this base model needs "
                f"{['rank', wanted] if side == 'A' else [wanted, 'rank']}. Upload it for the base model that it was trained on.".replace(
                    "'", ""
                ),
            )
    if pair.b.shape[1] != rank:
        refuse_tensors(
            "rank_not_supported",
            f"lora_A of {show(module)} has rank {rank}, but lora_B has rank {pair.b.shape[1]}. Upload the file that PEFT wrote.",
        )
    if not 1 <= rank <= max_rank:
        refuse_tensors(
            "rank_not_supported",
            f"The tensors of {show(module)} have rank {rank}, but this base model's engines take ranks from 1 to {max_rank}.",
        )
