"""A vLLM plugin for engines that lmaas starts. It makes their processes end with the process that started them, and installs lmaas's hooks.

Without it, `kill -9` of a vLLM server can leave its engine core running, with all its memory.
"""

import multiprocessing
import os

from lmaas.engine import hooks, marks
from lmaas.process import die_with_parent

#: Set by the launcher of lmaas. Without it, as in a plain `vllm serve`, nothing is changed.
VARIABLE = "LMAAS_DIE_WITH_PARENT"


def register() -> None:
    """The entry point that vLLM calls in each of its processes."""
    if os.environ.get(VARIABLE) == "1":
        # The parent may have died while this process was still importing.
        parent = multiprocessing.parent_process()
        die_with_parent(parent.pid if parent is not None else None)
        if parent is not None:
            marks.install()
        hooks.install()
