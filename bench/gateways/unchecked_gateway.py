"""Our gateway without the check of grammars: `python -m bench.gateways.unchecked_gateway`, with a gateway's settings."""

import sys
from typing import Any

from lmaas import app
from lmaas.cli import main
from lmaas.gateway.grammars import Grammars


class Unchecked(Grammars):
    """Lets every grammar pass."""

    async def admit(self, *_: Any) -> bool:
        """Pass."""
        return True


if __name__ == "__main__":
    # The gateway's own command builds it, so that it runs as any other; only its grammars are not checked.
    vars(app)["Grammars"] = Unchecked
    sys.argv.append("gateway")
    main()
