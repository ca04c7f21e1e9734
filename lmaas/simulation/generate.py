"""Generates a bursty day of many tenants from a seed: some far more popular than others, each active in bursts, fewer at night."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from lmaas.simulation.trace import Request, Trace

DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Day:
    """The parameters of a day. A burst is a conversation or a job: one tenant sends requests for some minutes, and then none for a long
    time.

    Tenant n has a part of the `bursts` that is proportional to 1/n^`zipf`. Bursts begin at random, at night (0 h) at `night` times the rate
    of the afternoon (12 h). They last for `burst_s` on average (exponentially), with a request every `between_s` on average. Tokens are
    log-normal around a median, with bounds.
    """

    seed: int = 0
    tenants: int = 50
    adapters: int = 1
    bursts: float = 1500.0
    zipf: float = 1.0
    night: float = 0.05
    burst_s: float = 180.0
    between_s: float = 6.0
    prompt_tokens: int = 160
    completion_tokens: int = 64
    #: Deviation of the logarithm of the numbers of tokens, and their upper bound.
    spread: float = 0.8
    max_tokens: int = 1000
    length_s: float = DAY_S

    def requests(self) -> Iterator[Request]:
        """The requests, tenant by tenant."""
        weights = [(number + 1) ** -self.zipf for number in range(self.tenants)]
        for number, weight in enumerate(weights):
            # A sequence of its own for each tenant: with one more tenant, the others' days are nearly the same.
            chance = random.Random(f"{self.seed}/{number}")  # noqa: S311 (a trace, not a secret)
            tenant = f"tenant-{number + 1:02}"
            for begin_s in self._begins(chance, self.bursts * weight / math.fsum(weights)):
                adapter = f"{tenant}/adapter-{chance.randint(1, self.adapters)}" if self.adapters else ""
                at_s, end_s = begin_s, begin_s + chance.expovariate(1 / self.burst_s)
                while at_s < min(end_s, self.length_s):
                    yield Request(
                        at_s, tenant, adapter, self._tokens(chance, self.prompt_tokens), self._tokens(chance, self.completion_tokens)
                    )
                    at_s += chance.expovariate(1 / self.between_s)

    def _begins(self, chance: random.Random, count: float) -> Iterator[float]:
        """Return the beginnings of bursts, `count` on average, more at noon than at night (by thinning)."""
        at_s, peak = 0.0, 2 * count / (1 + self.night) / self.length_s
        while True:
            at_s += chance.expovariate(peak)
            if at_s >= self.length_s:
                return
            of_peak = self.night + (1 - self.night) * (1 - math.cos(2 * math.pi * at_s / self.length_s)) / 2
            if chance.random() < of_peak:
                yield at_s

    def _tokens(self, chance: random.Random, median: int) -> int:
        return max(1, min(self.max_tokens, round(median * math.exp(chance.gauss(0, self.spread)))))


def generate(day: Day) -> Trace:
    """Generate the day as a trace. Raises TraceError if it has no request."""
    trace = Trace()
    for one in day.requests():
        trace.add(one.at_s, one.tenant, one.adapter, one.prompt_tokens, one.completion_tokens)
    return trace.ordered()
