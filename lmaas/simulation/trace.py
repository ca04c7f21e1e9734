"""Traces of requests: time, tenant, adapter, tokens. lmaas/simulation/reading.py reads them from files."""

import csv
import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TextIO

from lmaas.errors import LmaasError

WRITTEN = ("time", "tenant", "adapter", "prompt_tokens", "completion_tokens")


class TraceError(LmaasError):
    """The file is not a valid trace. The message names the line and the problem."""

    kind, status, type, code = "invalid_trace", 400, "invalid_request_error", "invalid_trace"


@dataclass(frozen=True, slots=True)
class Request:
    """One request. `at_s` is in seconds after the first request of the trace. `adapter` is empty for the base model."""

    at_s: float
    tenant: str
    adapter: str
    prompt_tokens: int
    completion_tokens: int


class Trace:
    """Requests in the order of time, in 28 bytes each, so that a day with millions of requests fits into memory.

    `remarks` report corrections that were made during reading.
    """

    def __init__(self) -> None:
        self._at_s = array("d")
        self._who = array("l")
        self._prompt_tokens, self._completion_tokens = array("i"), array("i")
        self._names: dict[tuple[str, str], int] = {}
        self._known: list[tuple[str, str]] = []
        self.remarks: list[str] = []

    def add(self, at_s: float, tenant: str, adapter: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Add a request. Its time is of any clock; `ordered` shifts it."""
        who = self._names.get((tenant, adapter))
        if who is None:
            who = self._names[tenant, adapter] = len(self._known)
            self._known.append((tenant, adapter))
        self._at_s.append(at_s)
        self._who.append(who)
        self._prompt_tokens.append(prompt_tokens)
        self._completion_tokens.append(completion_tokens)

    def ordered(self) -> "Trace":
        """Return the same requests in the order of time, starting at 0. Raises TraceError if there are none."""
        if not self._at_s:
            raise TraceError("The trace is empty: there is no request in it.")
        late = sum(later < earlier for earlier, later in pairwise(self._at_s))
        order: Sequence[int] = range(len(self._at_s))
        if late:
            order = sorted(order, key=self._at_s.__getitem__)
        first_s = self._at_s[order[0]]
        result = Trace()
        for index in order:
            result.add(
                self._at_s[index] - first_s, *self._known[self._who[index]], self._prompt_tokens[index], self._completion_tokens[index]
            )
        result.remarks = [*self.remarks, *([f"{late} requests came before the one above them: sorted by time."] if late else [])]
        return result

    def part(self, begin_s: float, end_s: float) -> "Trace":
        """Return the requests from `begin_s` until before `end_s`. Raises TraceError if there are none."""
        return self._chosen(lambda request: request if begin_s <= request.at_s < end_s else None)

    def sample(self, part: float, seed: int) -> "Trace":
        """Return each request with the probability `part`, by the seed. Raises TraceError if none is chosen."""
        chance = random.Random(seed)  # noqa: S311 (a sample, not a secret)
        return self._chosen(lambda request: request if chance.random() < part else None)

    def within(self, context_tokens: int) -> "Trace":
        """Return the requests as an engine with this context length treats them: a prompt that leaves no room for a token is refused, and
        a completion ends where the context does. Raises TraceError if no request fits."""
        refused = cut = 0

        def fit(request: Request) -> Request | None:
            nonlocal refused, cut
            room = context_tokens - request.prompt_tokens
            if room < 1:
                refused += 1
                return None
            if request.completion_tokens > room:
                cut += 1
                return replace(request, completion_tokens=room)
            return request

        made = self._chosen(fit)
        if refused:
            made.remarks.append(f"{refused:,} requests are left out: their prompts do not fit a context of {context_tokens:,} tokens.")
        if cut:
            made.remarks.append(f"{cut:,} completions end at the context length of {context_tokens:,} tokens.")
        return made

    def _chosen(self, choose: Callable[[Request], Request | None]) -> "Trace":
        made = Trace()
        for request in self:
            if (chosen := choose(request)) is not None:
                made.add(chosen.at_s, chosen.tenant, chosen.adapter, chosen.prompt_tokens, chosen.completion_tokens)
        made.remarks = list(self.remarks)
        if not len(made):
            raise TraceError("No request of the trace is left. Choose a longer slice, a larger sample or a longer context.")
        return made.ordered()

    def __len__(self) -> int:
        return len(self._at_s)

    def __iter__(self) -> Iterator[Request]:
        for at_s, who, prompt, completion in zip(self._at_s, self._who, self._prompt_tokens, self._completion_tokens, strict=True):
            yield Request(at_s, *self._known[who], prompt, completion)

    @property
    def span_s(self) -> float:
        """Seconds from the first request to the last."""
        return self._at_s[-1] - self._at_s[0]

    @property
    def tenants(self) -> list[str]:
        """The names of the tenants."""
        return sorted({tenant for tenant, _ in self._known})

    @property
    def adapters(self) -> int:
        """The number of different adapters."""
        return sum(adapter != "" for _, adapter in self._known)

    @property
    def tokens(self) -> tuple[int, int]:
        """The total numbers of prompt tokens and of completion tokens."""
        return sum(self._prompt_tokens), sum(self._completion_tokens)


def write_trace(requests: Iterable[Request], file: TextIO) -> None:
    """Write requests as CSV, for `read_trace`."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(WRITTEN)
    for one in requests:
        writer.writerow((f"{one.at_s:.3f}", one.tenant, one.adapter.rpartition("/")[2], one.prompt_tokens, one.completion_tokens))
