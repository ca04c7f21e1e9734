"""A gateway without the check of grammars: `python -m bench.gateways.unchecked_gateway`, with a gateway's settings."""

import sys
from typing import Any

from lmaas import app
from lmaas.cli import main
from lmaas.engine.grammars.verdict import Verdict
from lmaas.gateway.grammars import Grammars, Lookup

PASSED = Lookup("", ("", "", b""), b"", Verdict())


class Unchecked(Grammars):
    """Lets every grammar pass."""

    def look_up(self, *_: Any) -> Lookup:
        """Pass."""
        return PASSED


if __name__ == "__main__":
    # The gateway's own command builds it, so that it runs as any other; only its grammars are not checked.
    vars(app)["Grammars"] = Unchecked
    sys.argv.append("gateway")
    main()
