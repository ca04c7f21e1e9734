"""What a fake engine really did, in a file that outlives a `kill -9`: tests compare the ledger with it."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from lmaas.testing.generation import Sequence


class TruthLog:
    """Appends one line for each state of each sequence: `pid request index prompt made seconds`.

    Written before anybody can have seen the token, by one system call that the kernel appends as a whole: several engines share a file,
    and nothing waits in a buffer of ours when the process is killed. Seconds are of the wall clock, since the epoch.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._pid = os.getpid()

    def __call__(self, sequence: Sequence) -> None:
        """Write down how far a sequence is."""
        facts = (self._pid, sequence.request, sequence.index, sequence.prompt_tokens, sequence.made, time.time())
        os.write(self._file, b"%d %s %d %d %d %.3f\n" % (facts[0], facts[1].encode(), *facts[2:]))


@dataclass(slots=True)
class Delivery:
    """One request at one engine. `made` maps a choice to the moments at which its tokens were made, in seconds since the epoch."""

    pid: int
    request: str
    prompt_tokens: int = 0
    made: dict[int, list[float]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens generated, of all choices."""
        return sum(len(times) for times in self.made.values())

    def tokens_at(self, moment: float) -> int:
        """How many of them there were at a moment."""
        return sum(at <= moment for times in self.made.values() for at in times)


def read_truth(path: Path) -> dict[str, list[Delivery]]:
    """Request id → its deliveries, in the order in which they reached an engine. Each was sent to an engine once at most."""
    found: dict[str, dict[int, Delivery]] = {}
    for line in path.read_text().splitlines():
        pid, request, index, prompt, made, at = line.split(" ")
        delivery = found.setdefault(request, {}).setdefault(int(pid), Delivery(int(pid), request))
        moments = delivery.made.setdefault(int(index), [])
        if int(made) == 0:
            # A prompt with several choices counts once; this file is read for requests with one prompt.
            delivery.prompt_tokens = int(prompt)
        else:
            moments.append(float(at))
    return {request: list(deliveries.values()) for request, deliveries in found.items()}
