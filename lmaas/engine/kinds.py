"""Finds out from a base model's files whether it generates text or embeds it, and how long its context is."""

import json
from pathlib import Path
from typing import Any

from lmaas.errors import InvalidRequest
from lmaas.states import PoolKind

MAX_FILE_BYTES = 1024 * 1024
#: The ends of architectures' names, in the order in which vLLM 0.32 tries them (`_SUFFIX_TO_DEFAULTS` in vllm/config/model.py). None for
#: architectures that do neither.
_SUFFIXES: tuple[tuple[str, PoolKind | None], ...] = (
    # Five that are named unlike the others of their kind.
    *((name, PoolKind.GENERATE) for name in ("ChatGLMModel", "MiDashengLMModel", "MossAudioModel", "Qwen2_5OmniModel", "UltravoxModel")),
    *((suffix, PoolKind.GENERATE) for suffix in ("ForCausalLM", "ForConditionalGeneration", "ChatModel", "LMHeadModel")),
    *((suffix, PoolKind.EMBED) for suffix in ("ForTextEncoding", "EmbeddingModel", "ForMaskedLM")),
    *((suffix, None) for suffix in ("Classification", "ClassificationModel", "ForRewardModeling", "RewardModel", "ForRanking")),
    *((suffix, None) for suffix in ("QuestionAnswering", "ForRetrieval")),
    ("Model", PoolKind.EMBED),
)
#: The files in which sentence-transformers keeps the longest text that a model was trained on. The engine reads the first one that exists.
_SENTENCE_FILES = tuple(
    f"sentence_{name}_config.json" for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)


def declared_kind(folder: Path, config: dict[str, Any]) -> PoolKind | None:
    """Return the purpose of the model in this folder, from its `config.json` and sentence-transformers' `modules.json`; None if they do not
    declare one.

    Raises InvalidRequest `invalid_base_model` for a model that neither generates nor embeds, such as a classifier.
    """
    modules = _json(folder / "modules.json")
    if isinstance(modules, list) and any(str(each.get("type")).endswith(".Pooling") for each in modules if isinstance(each, dict)):
        # Some of them are language models by their architecture.
        return PoolKind.EMBED
    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    for suffix, kind in _SUFFIXES:
        if name.endswith(suffix):
            if kind is None:
                raise InvalidRequest(
                    f"The base model's architecture is {name[:100]!r}, which neither generates text nor embeds it. Give another model.",
                    code="invalid_base_model",
                    param="source",
                )
            return kind
    return None


def fitting_kind(declared: PoolKind | None, asked: PoolKind | None) -> PoolKind:
    """Return the kind of a model from its files and its operator's choice, each of which may be None.

    Raises InvalidRequest if they differ.
    """
    if asked is not None and declared is not None and asked is not declared:
        does, other = ("generates text", "embed it") if declared is PoolKind.GENERATE else ("embeds text", "generate it")
        raise InvalidRequest(
            f"'kind' is '{asked}', but by its files this model {does} and does not {other}. Leave 'kind' out, or give another model.",
            code="out_of_range",
            param="kind",
        )
    return declared or asked or PoolKind.GENERATE


def context_length(folder: Path, config: dict[str, Any], kind: PoolKind) -> int | None:
    """Return the longest context that an engine accepts for the model, in tokens, or None if its files declare none."""
    found = _positive(config.get("max_position_embeddings"))
    if kind is not PoolKind.EMBED:
        return found
    for name in _SENTENCE_FILES:
        if isinstance(sentence := _json(folder / name), dict) and sentence:
            if longest := _positive(sentence.get("max_seq_length")):
                return longest
            break
    if config.get("position_embedding_type", "absolute") == "absolute" and isinstance(
        tokenizer := _json(folder / "tokenizer_config.json"), dict
    ):
        # Some positions of the table are for padding, such as two in RoBERTa's.
        lengths = [length for length in (found, _positive(tokenizer.get("model_max_length"))) if length is not None]
        return min(lengths, default=None)
    return found


def _positive(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None


def _json(path: Path) -> object:
    """Return the content of a file, or None if it is missing or is no JSON."""
    try:
        with path.open("rb") as file:
            return json.loads(file.read(MAX_FILE_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
