"""When an idle pool should keep an engine: decided from the pool's own idle times.

After "Serverless in the Wild" (Shahrad et al., USENIX ATC 2020): a histogram of the times between two bouts of work says how long to
stay warm, and when to start ahead of the next request. The paper has windows at fixed percentiles, tests how spread the bins are, and has
no price for a cold start. Here every plan has an expected cost on the histogram, and the cheapest is taken: the idle timeout is the
operator's word for what a cold start is worth, in seconds of an idle engine (the break-even of ski rental), and also the most that any idle
time may cost. Bins are logarithmic, since engines start in seconds and requests may come once a day.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

#: The histogram's range and resolution: from MIN_GAP_S, each bin's bounds are RATIO times those of the one before.
MIN_GAP_S = 2.0
MAX_GAP_S = 2 * 86400.0
RATIO = 1.02
BINS = math.ceil(math.log(MAX_GAP_S / MIN_GAP_S, RATIO))
#: Fewer idle times than this say nothing: the idle timeout holds.
ENOUGH = 10.0
#: Beyond so many, all count half: the pool's habits may change.
FULL = 200.0
FORGOTTEN = 0.1
#: Percentiles of the idle times between which a pool is kept warm ahead of its next request, as in the paper.
HEAD, TAIL = 0.05, 0.99
#: A plan other than the plain timeout must be cheaper than it by this part.
GAIN = 0.1
#: And no pool is stopped sooner than this after its last request, in seconds.
LINGER_S = 10.0


@dataclass(frozen=True, slots=True)
class History:
    """A pool's idle times: pairs of bin and count, in the order of bins. Counts are not whole numbers once they have been halved."""

    bins: tuple[tuple[int, float], ...] = ()

    @property
    def total(self) -> float:
        """How many idle times it holds."""
        return sum(count for _, count in self.bins)

    def with_gap(self, gap_s: float) -> "History":
        """Also this idle time. One shorter than MIN_GAP_S is none: nothing could be stopped and started meanwhile."""
        if not MIN_GAP_S <= gap_s < math.inf:
            return self
        index = min(BINS - 1, int(math.log(gap_s / MIN_GAP_S, RATIO)))
        counts = dict(self.bins)
        counts[index] = counts.get(index, 0.0) + 1
        if sum(counts.values()) > FULL:
            # What is left of a single one is forgotten at last.
            counts = {index: count / 2 for index, count in counts.items() if count > FORGOTTEN}
        return History(tuple(sorted(counts.items())))

    @classmethod
    def of(cls, stored: Any) -> "History":
        """From what was stored (the pairs, as JSON). What cannot be understood is an empty history: it is only experience."""
        try:
            bins = tuple(sorted((int(index), float(count)) for index, count in stored))
        except (TypeError, ValueError, OverflowError):
            return cls()
        return cls(bins) if all(0 <= index < BINS and 0 < count <= FULL for index, count in bins) else cls()


@dataclass(frozen=True, slots=True)
class IdlePlan:
    """What to do when the pool becomes idle; all times in seconds since its last request.

    It stays warm until `keep_s`. If nothing has come by then and there is a second window, an engine is started `ahead_s` before
    `ready_s`, and stays until `until_s`. `idle_engine_s` is what an idle time costs on average, in engine-seconds, starts ahead of time
    included; `cold_share` is the part of the idle times that end in a cold start.
    """

    keep_s: float
    ready_s: float | None = None
    until_s: float | None = None
    ahead_s: float = 0.0
    idle_engine_s: float = 0.0
    cold_share: float = 0.0
    #: How many idle times say so; 0 where there is no history yet.
    gaps: float = 0.0

    def warm(self, idle_s: float) -> bool:
        """Whether there should be an engine `idle_s` after the last request."""
        if idle_s < self.keep_s:
            return True
        return self.ready_s is not None and self.until_s is not None and self.ready_s - self.ahead_s <= idle_s < self.until_s


def idle_plan(history: History, idle_timeout_s: float, start_s: float) -> IdlePlan:
    """The cheapest plan for the next idle time. No plan has an idle engine for longer than `idle_timeout_s`, in total."""
    total = history.total
    if total < ENOUGH:
        return IdlePlan(idle_timeout_s)
    costs = _Costs(history, idle_timeout_s, start_s)
    default = costs.plan(idle_timeout_s)
    candidates = [default]
    for keep_s in (min(LINGER_S, idle_timeout_s), *(edge for edge in costs.edges if LINGER_S < edge < idle_timeout_s)):
        if costs.longer(keep_s) < ENOUGH / 2:
            break  # what comes after so long, the history does not know
        candidates.append(costs.plan(keep_s))
        window = costs.window(keep_s)
        if window is not None:
            candidates.append(costs.plan(keep_s, *window))
    best = min(candidates, key=costs.price)
    return best if costs.price(best) < (1 - GAIN) * costs.price(default) else default


class _Costs:
    """What plans cost on one history. Within a bin, idle times are taken to be at its upper bound."""

    def __init__(self, history: History, idle_timeout_s: float, start_s: float) -> None:
        self._total = history.total
        self._timeout_s, self._start_s = idle_timeout_s, start_s
        #: Upper bounds of the bins that hold anything, in seconds.
        self.edges = [MIN_GAP_S * RATIO ** (index + 1) for index, _ in history.bins]
        self._count = (0.0, *accumulate(count for _, count in history.bins))
        self._time = (0.0, *accumulate(count * edge for (_, count), edge in zip(history.bins, self.edges, strict=True)))

    def price(self, plan: IdlePlan) -> float:
        """Engine-seconds per idle time, where a cold start costs the idle timeout."""
        return plan.idle_engine_s + plan.cold_share * self._timeout_s

    def plan(self, keep_s: float, ready_s: float | None = None, until_s: float | None = None) -> IdlePlan:
        """The plan with its expected cost."""
        kept, kept_time = self._up_to(keep_s)
        cost, cold = kept_time + (self._total - kept) * keep_s, self._total - kept
        if ready_s is not None and until_s is not None:
            before, before_time = self._up_to(ready_s)
            within, within_time = self._up_to(until_s)
            before, before_time = max(before, kept), max(before_time, kept_time)
            hits = within - before
            later = self._total - within
            # An engine that is started ahead is paid for while it starts, whether or not anything comes.
            cost += (self._total - before) * self._start_s
            cost += (within_time - before_time) - hits * ready_s + later * (until_s - ready_s)
            cold -= hits
        return IdlePlan(keep_s, ready_s, until_s, self._start_s, cost / self._total, max(0.0, cold) / self._total, self._total)

    def longer(self, seconds: float) -> float:
        """How many idle times were longer than this."""
        return self._total - self._up_to(seconds)[0]

    def window(self, keep_s: float) -> tuple[float, float] | None:
        """When the next request comes, if it has not come until `keep_s`: from the head to the tail of those idle times, with the
        bins' width as a margin. None if that is too long to be paid for, or not far enough away to be worth a stop."""
        before, _ = self._up_to(keep_s)
        rest = self._total - before
        head = next(edge for edge, count in zip(self.edges, self._count[1:], strict=True) if count - before > HEAD * rest)
        tail = next(edge for edge, count in zip(self.edges, self._count[1:], strict=True) if count - before >= TAIL * rest)
        ready_s, until_s = head / RATIO / RATIO, tail * RATIO
        if keep_s + self._start_s + until_s - ready_s > self._timeout_s or ready_s - self._start_s <= keep_s:
            return None
        return ready_s, until_s

    def _up_to(self, seconds: float) -> tuple[float, float]:
        """How many idle times are no longer than this, and their sum."""
        index = bisect_right(self.edges, seconds)
        return self._count[index], self._time[index]


@dataclass(frozen=True, slots=True)
class Idleness:
    """What is remembered of a pool's idle times: the history, when it was last active (`now`'s clock), whether it had work at the last
    look, and the plan that follows."""

    history: History = field(default_factory=History)
    active_at: float | None = None
    busy: bool = False
    plan: IdlePlan | None = None
    #: What the plan was made for.
    idle_timeout_s: float = 0.0

    def seen(self, now: float, idle_s: float, busy: bool, idle_timeout_s: float, start_s: float) -> "Idleness":
        """With what is known now: the pool was last active `idle_s` ago. The plan is made anew only when something has changed."""
        active_at = now - idle_s
        ended = self.active_at is not None and not self.busy
        history = self.history.with_gap(active_at - (self.active_at or 0.0)) if ended else self.history
        plan = self.plan
        # Not for another start time: a plan holds for as long as the pool is idle.
        if plan is None or history is not self.history or idle_timeout_s != self.idle_timeout_s:
            plan = idle_plan(history, idle_timeout_s, start_s)
        return replace(self, history=history, active_at=active_at, busy=busy, plan=plan, idle_timeout_s=idle_timeout_s)
