"""A checker whose grammars have the effects that their names describe, without vLLM: `python -m tests.integration.engine.grammars.stub
SOCKET IDLE_S`."""

import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from lmaas.engine.grammars import checker
from lmaas.engine.grammars.verdict import INVALID, Question, Verdict

#: An argument that keeps the process alive for a second after it has closed its socket.
LINGERS = "lingers"
#: An argument that delays the start until a file `go` exists beside the folder.
SLOW = "slow"


class Stub:
    """Stands in for the compiler."""

    def check(self, question: Question) -> Verdict:
        """Do what the parameter `do` names."""
        match question.parameters.get("do"):
            case "explode":
                while True:
                    pass
            case "grow":
                hoard = []
                while True:
                    hoard.append(bytearray(1 << 24))
            case "abort":
                os.abort()
            case "end":
                os._exit(3)
            case "raise":
                raise RuntimeError("a fault of ours")
            case "sleep":
                time.sleep(3600)
            case "print":
                os.write(2, b"a tenant's text\n" * 1000)
            case "refuse":
                return Verdict(INVALID, "It is bad.", "tools")
        return Verdict(cpu_s=time.process_time())


def main() -> None:
    """Serve."""
    compiler: Any = Stub()
    while SLOW in sys.argv and not (Path(sys.argv[1]).parent.parent / "go").exists():
        used = time.process_time()
        while time.process_time() - used < 0.02:
            pass
        time.sleep(0.1)
    vars(checker).update(WALL_S=3.0, CPU_S=0.5, POLL_S=0.1)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(sys.argv[1] + ".new")
        listener.listen(64)
        os.rename(sys.argv[1] + ".new", sys.argv[1])  # a client that sees it can connect
        checker.Checker(compiler.check, listener, float(sys.argv[2])).serve()
    Path(sys.argv[1]).unlink()
    if LINGERS in sys.argv:
        time.sleep(1)


if __name__ == "__main__":
    main()
