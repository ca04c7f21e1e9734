"""`python -m lmaas.engine.zygote HOME IDLE_S`: be the zygote of a home folder; and, in what it forks, become an engine or a supervisor."""

import importlib
import sys
from pathlib import Path

from lmaas.engine.zygote.server import serve


def main() -> None:
    """Serve; a forked process leaves here as what it was ordered to be."""
    job = serve(Path(sys.argv[1]), float(sys.argv[2]))
    if job is not None:
        module = importlib.import_module(job.module)
        sys.argv = [str(module.__file__), *job.arguments]
        module.main()


if __name__ == "__main__":
    main()
