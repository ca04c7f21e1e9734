"""Marks of an engine's start: its processes write the time of each stage to a file, and its supervisor reads them."""

import contextlib
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: The environment variable with the path of the file. Without it, nothing is written.
VARIABLE = "LMAAS_START_MARKS"
#: The stages: all modules are imported and configured, the weights are loaded, the KV cache is allocated.
LOADING, LOADED, CACHED = "loading", "loaded", "cached"


def mark(name: str) -> None:
    """Record the time of a stage. A write error is ignored, because it must not stop a start."""
    path = os.environ.get(VARIABLE)
    if path:
        with contextlib.suppress(OSError), open(path, "a") as file:
            file.write(f"{name} {time.monotonic()}\n")


def read(path: Path) -> dict[str, float]:
    """Return the marks of a start: name → time.monotonic(). If several workers wrote a mark, the last one counts."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    return {name: float(time) for name, _, time in (line.partition(" ") for line in lines)}


def install() -> None:
    """Make vLLM's workers write the marks. May be called more than once in a process."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase  # noqa: PLC0415 (only inside an engine)

    original = WorkerWrapperBase.init_worker
    if hasattr(original, "_lmaas_marks"):
        return

    @functools.wraps(original)
    def init_worker(wrapper: Any, *args: Any, **kwargs: Any) -> None:
        original(wrapper, *args, **kwargs)
        worker = wrapper.worker
        worker.load_model = _marked(worker.load_model, LOADING, LOADED)
        worker.initialize_from_config = _marked(worker.initialize_from_config, None, CACHED)

    init_worker._lmaas_marks = True  # type: ignore[attr-defined]  # so that it is wrapped once
    WorkerWrapperBase.init_worker = init_worker


def _marked(function: Callable[..., Any], before: str | None, after: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def marked(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            mark(before)
        result = function(*args, **kwargs)
        mark(after)
        return result

    return marked
