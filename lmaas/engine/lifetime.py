"""A vLLM plugin: an engine's processes die with the process that started them, and note how far their start has come.

Without it, `kill -9` of a vLLM server can leave its engine process behind, with all its memory.
"""

import multiprocessing
import os

from lmaas.engine import marks
from lmaas.process import die_with_parent

#: Set by our launcher; a plain `vllm serve` keeps its own ways.
VARIABLE = "LMAAS_DIE_WITH_PARENT"


def register() -> None:
    """Called by vLLM in each of its processes."""
    if os.environ.get(VARIABLE) == "1":
        # It may be too late to be told: the parent may have died while this process was still importing.
        parent = multiprocessing.parent_process()
        die_with_parent(parent.pid if parent is not None else None)
        if parent is not None:
            marks.install()
