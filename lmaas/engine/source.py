"""Finds a base model's files and reads its configuration."""

import json
from pathlib import Path
from typing import Any

from lmaas.engine.launch import has_cpu_build, has_engine
from lmaas.errors import InvalidRequest
from lmaas.types import AUTO

DTYPES = ("float32", "bfloat16", "float16")
MAX_CONFIG_BYTES = 1024 * 1024
#: The files to fetch from a hub: weights, and what a tokenizer needs. No code.
PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def is_folder(source: str) -> bool:
    """Return whether a source names a folder. Anything else is a hub id, whatever folders exist in the working directory."""
    return source.startswith(("/", ".", "~"))


def local_model_folder(source: str) -> Path | None:
    """Return the folder of a model given as a folder or a hub id, or None if it is not on this machine. Nothing is fetched."""
    try:
        return model_folder(source, fetch=False)
    except InvalidRequest:
        return None


def model_folder(source: str, *, fetch: bool = True) -> Path:
    """Return the local folder of a model given as a folder or a hub id. It is fetched if necessary and allowed. Raises InvalidRequest
    `invalid_base_model` if it is not available."""
    try:
        if is_folder(source):
            folder = Path(source).expanduser().resolve()
            if not folder.is_dir():
                raise NotADirectoryError(f"there is no folder {folder}")
            return folder
        from huggingface_hub import snapshot_download  # noqa: PLC0415 (only where a hub id is given)

        return Path(snapshot_download(source, allow_patterns=PATTERNS, local_files_only=not fetch))
    except ImportError:
        raise InvalidRequest(
            f"{source[:200]!r} is not a folder on this machine, and this process cannot fetch models from a hub. Give a folder.",
            code="invalid_base_model",
            param="source",
        ) from None
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidRequest(
            f"{source[:200]!r} is neither a folder on this machine nor a model of the hub: {str(error)[:300]}",
            code="invalid_base_model",
            param="source",
        ) from error


def model_config(folder: Path) -> dict[str, Any]:
    """Return the model's `config.json`. Raises InvalidRequest `invalid_base_model` if it cannot be read."""
    path = folder / "config.json"
    try:
        with path.open("rb") as file:
            config = json.loads(file.read(MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{path} cannot be used: {error}", code="invalid_base_model", param="source") from error
    if not isinstance(config, dict):
        raise InvalidRequest(f"{path} cannot be used: it does not contain a JSON object.", code="invalid_base_model", param="source")
    return config


def engine_dtype(asked: str, config: dict[str, Any]) -> str:
    """Return the engine's dtype. On a CPU, `auto` is float32, in which a greedy answer is the same alone and in a batch; otherwise it is
    the model's own. If no engine is installed, as in a gateway's image, `auto` is kept, and resolved when an engine starts (launch.py).
    Raises InvalidRequest for a dtype that engines do not support."""
    if asked == AUTO:
        if not has_engine():
            return AUTO
        asked = "float32" if has_cpu_build() else str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    if asked not in DTYPES:
        raise InvalidRequest(
            f"'dtype' must be one of {', '.join(DTYPES)} or auto, not {asked[:100]!r}.", code="out_of_range", param="dtype"
        )
    return asked
