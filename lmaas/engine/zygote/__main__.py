"""`python -m lmaas.engine.zygote HOME IDLE_S`: be the zygote of a home folder; and, in what it forks, become an engine or a supervisor."""

import importlib
import sys
from pathlib import Path

from lmaas.engine.zygote.server import serve


def main() -> None:
    """Serve; a forked process leaves here as what it was ordered to be."""
    program = serve(Path(sys.argv[1]), float(sys.argv[2]))
    if program is not None:
        module = importlib.import_module(program.module)
        sys.argv = [str(module.__file__), *program.arguments]
        module.main()


if __name__ == "__main__":
    main()
