"""Runs a zygote: `python -m lmaas.engine.zygote HOME IDLE_S`. A process that the zygote forks continues here as an engine or a
supervisor."""

import importlib
import sys
from pathlib import Path

from lmaas.engine.zygote.server import serve


def main() -> None:
    """Serve requests for forks. In a forked process, run the program that was requested."""
    program = serve(Path(sys.argv[1]), float(sys.argv[2]))
    if program is not None:
        module = importlib.import_module(program.module)
        sys.argv = [str(module.__file__), *program.arguments]
        module.main()


if __name__ == "__main__":
    main()
