"""`python -m tests.integration.engine.zygote.light HOME IDLE_S`: a zygote without vLLM in memory, whose disk is full when it learns."""

import errno
import os
import sys
import types
from pathlib import Path

PRELOAD = "lmaas.engine.zygote.preload"


class Preloaded:
    """Nothing."""

    def __init__(self, commands: Path) -> None:
        self._learnt = commands.with_name("learnt")

    def unfit(self) -> str:
        """Never."""
        return ""

    def learn(self, arguments: list[str]) -> None:
        """Note that it was asked, and fail."""
        self._learnt.write_text(" ".join(arguments))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


if __name__ == "__main__":
    sys.modules[PRELOAD] = types.ModuleType(PRELOAD)
    sys.modules[PRELOAD].__dict__["Preloaded"] = Preloaded
    from lmaas.engine.zygote import server
    from lmaas.engine.zygote.__main__ import main

    vars(server).update(LEARN_AFTER_S=0.0, SERVER="tests.integration.engine.zygote.job")  # it learns what that is started with
    main()
