"""A gateway without the check of grammars, with a gateway's settings: `python -m bench.gateways.unchecked_gateway`."""

import sys
from typing import Any

from lmaas import app
from lmaas.cli import main
from lmaas.engine.grammars.verdict import Verdict
from lmaas.inference.grammars import Grammars, Lookup

PASSED = Lookup("", ("", "", b""), b"", Verdict())


class Unchecked(Grammars):
    """Accepts every grammar without a check."""

    def look_up(self, *_: Any) -> Lookup:
        """Return a verdict that the grammar is valid."""
        return PASSED


if __name__ == "__main__":
    # The gateway's own command builds the application, so that only its grammar checks differ.
    vars(app)["Grammars"] = Unchecked
    sys.argv.append("gateway")
    main()
