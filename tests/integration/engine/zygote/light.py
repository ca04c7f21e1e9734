"""`python -m tests.integration.engine.zygote.light HOME IDLE_S`: a zygote without vLLM in memory, whose disk is full when it learns.

If SLOW is set in its environment, it imports slowly until there is a file `go` in its folder.
"""

import errno
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

PRELOAD = "lmaas.engine.zygote.preload"


SLOW = "LIGHT_ZYGOTE_IS_SLOW"


class Preloaded:
    """Imports nothing, fast or slowly."""

    def __init__(self, commands: Path, report: Callable[[int, int], None]) -> None:
        self._learnt = commands.with_name("learnt")
        report(0, 3)
        while SLOW in os.environ and not commands.with_name("go").exists():
            used = time.process_time()
            while time.process_time() - used < 0.02:
                pass
            time.sleep(0.1)
        report(2, 3)

    def unfit(self) -> str:
        """Return "": it is always fit."""
        return ""

    def learn(self, arguments: list[str]) -> None:
        """Record the arguments, and fail."""
        self._learnt.write_text(" ".join(arguments))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


if __name__ == "__main__":
    sys.modules[PRELOAD] = types.ModuleType(PRELOAD)
    sys.modules[PRELOAD].__dict__["Preloaded"] = Preloaded
    from lmaas.engine.zygote import server
    from lmaas.engine.zygote.__main__ import main

    vars(server).update(LEARN_AFTER_S=0.0, SERVER="tests.integration.engine.zygote.program")  # it learns the arguments of the job
    main()
