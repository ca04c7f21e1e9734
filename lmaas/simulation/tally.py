"""The counts of a running simulation."""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Span:
    """The lifetime of one engine: from its launch to the end of its process, in seconds of the trace."""

    launched_s: float
    ended_s: float


@dataclass(slots=True)
class Tally:
    """The results of the requests, and the lifetimes of the engines."""

    ttft_s: "array[float]" = field(default_factory=lambda: array("d"))
    total_s: "array[float]" = field(default_factory=lambda: array("d"))
    completed: int = 0
    #: Requests that were not served before the deadline, and requests refused because too many waited.
    expired: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    #: Requests that arrived when no engine was ready, and engines that were started.
    cold_requests: int = 0
    starts: int = 0
    busy_s: float = 0.0
    #: The time at which the last request was completed.
    last_s: float = 0.0
    spans: list[Span] = field(default_factory=list)

    @property
    def engine_s(self) -> float:
        """The time of all engines, including start, idle time and stop."""
        return math.fsum(span.ended_s - span.launched_s for span in self.spans)

    def most_engines(self) -> int:
        """The largest number of engines at the same time."""
        return max((count for _, count in engines_over_time(self.spans)), default=0)


def engines_over_time(spans: Sequence[Span]) -> list[tuple[float, int]]:
    """Return the times at which the number of engines changes, each with the number from then on."""
    changes: dict[float, int] = {}
    for span in spans:
        changes[span.launched_s] = changes.get(span.launched_s, 0) + 1
        changes[span.ended_s] = changes.get(span.ended_s, 0) - 1
    count, steps = 0, []
    for when_s in sorted(changes):
        count += changes[when_s]
        steps.append((when_s, count))
    return steps


def percentile(figures: Sequence[float], percent: float) -> float:
    """Return the percentile of the sorted `figures` by nearest rank, NaN if there are none."""
    return figures[max(0, math.ceil(len(figures) * percent / 100) - 1)] if figures else math.nan
