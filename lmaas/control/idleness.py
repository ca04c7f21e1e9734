"""Decides when an idle pool keeps an engine, from the pool's own idle times.

The source is "Serverless in the Wild" (Shahrad et al., USENIX ATC 2020): a histogram of the times between two bouts of work decides how
long to stay warm, and when to start ahead of the next request. The paper uses windows at fixed percentiles, tests how spread the bins are,
and has no price for a cold start. Here every plan has an expected cost on the histogram, and the cheapest one is chosen. The idle timeout
is the price of a cold start that the operator sets, in seconds of an idle engine (the break-even point of ski rental), and also the maximum
cost of any idle time. Bins are logarithmic, because engines start in seconds and requests may arrive once a day.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

#: The histogram's range and resolution: the first bin begins at MIN_GAP_S, and each bin's bounds are RATIO times those of the one before.
MIN_GAP_S = 2.0
MAX_GAP_S = 2 * 86400.0
RATIO = 1.02
BINS = math.ceil(math.log(MAX_GAP_S / MIN_GAP_S, RATIO))
#: With fewer idle times than this, the idle timeout holds.
ENOUGH = 10.0
#: Beyond this many idle times all counts are halved, since the pool's habits may change. A count below FORGOTTEN is dropped then.
FULL = 200.0
FORGOTTEN = 0.1
#: Percentiles of the idle times between which a pool is kept warm ahead of its next request, as in the paper.
HEAD, TAIL = 0.05, 0.99
#: A plan other than the plain timeout must be cheaper than the timeout by this part.
GAIN = 0.1
#: No pool is stopped sooner than this after its last request, in seconds.
LINGER_S = 10.0


@dataclass(frozen=True, slots=True)
class IdleTimes:
    """A pool's idle times: pairs of bin and count, in the order of bins. Counts are not whole numbers once they have been halved."""

    bins: tuple[tuple[int, float], ...] = ()

    @property
    def total(self) -> float:
        """The number of idle times."""
        return sum(count for _, count in self.bins)

    def with_gap(self, gap_s: float) -> "IdleTimes":
        """Return these idle times with one more. A gap shorter than MIN_GAP_S is left out: no engine could stop and start within it."""
        if not MIN_GAP_S <= gap_s < math.inf:
            return self
        index = min(BINS - 1, int(math.log(gap_s / MIN_GAP_S, RATIO)))
        counts = dict(self.bins)
        counts[index] = counts.get(index, 0.0) + 1
        if sum(counts.values()) > FULL:
            counts = {index: count / 2 for index, count in counts.items() if count > FORGOTTEN}
        return IdleTimes(tuple(sorted(counts.items())))

    @classmethod
    def of(cls, stored: Any) -> "IdleTimes":
        """Decode the stored pairs from JSON. Text that cannot be decoded gives no idle times, which are only needed for better plans."""
        try:
            bins = tuple(sorted((int(index), float(count)) for index, count in stored))
        except (TypeError, ValueError, OverflowError):
            return cls()
        return cls(bins) if all(0 <= index < BINS and 0 < count <= FULL for index, count in bins) else cls()


@dataclass(frozen=True, slots=True)
class IdlePlan:
    """The plan for an idle pool. All times are seconds since its last request.

    The pool stays warm until `keep_s`. If no request has come by then and there is a second window, an engine is started `ahead_s` before
    `ready_s` and stays until `until_s`. `idle_engine_s` is the average cost of an idle time in engine-seconds, including starts ahead of
    requests. `cold_share` is the part of the idle times that end in a cold start.
    """

    keep_s: float
    ready_s: float | None = None
    until_s: float | None = None
    ahead_s: float = 0.0
    idle_engine_s: float = 0.0
    cold_share: float = 0.0
    #: The number of idle times that the plan is based on; 0 while there are too few.
    gaps: float = 0.0

    def warm(self, idle_s: float) -> bool:
        """Return whether there should be an engine `idle_s` after the last request."""
        if idle_s < self.keep_s:
            return True
        return self.ready_s is not None and self.until_s is not None and self.ready_s - self.ahead_s <= idle_s < self.until_s


def idle_plan(times: IdleTimes, idle_timeout_s: float, start_s: float) -> IdlePlan:
    """Return the cheapest plan for the next idle time. No plan has an idle engine for longer than `idle_timeout_s` in total."""
    if times.total < ENOUGH:
        return IdlePlan(idle_timeout_s)
    costs = _Costs(times, idle_timeout_s, start_s)
    default = costs.plan(idle_timeout_s)
    candidates = [default]
    for keep_s in (min(LINGER_S, idle_timeout_s), *(edge for edge in costs.edges if LINGER_S < edge < idle_timeout_s)):
        if costs.longer(keep_s) < ENOUGH / 2:
            break  # there are too few idle times that long to plan for them
        candidates.append(costs.plan(keep_s))
        window = costs.window(keep_s)
        if window is not None:
            candidates.append(costs.plan(keep_s, *window))
    best = min(candidates, key=costs.price)
    return best if costs.price(best) < (1 - GAIN) * costs.price(default) else default


class _Costs:
    """The cost of plans on given idle times. Within a bin, idle times are taken to be at its upper bound."""

    def __init__(self, times: IdleTimes, idle_timeout_s: float, start_s: float) -> None:
        self._total = times.total
        self._timeout_s, self._start_s = idle_timeout_s, start_s
        #: Upper bounds of the bins that are not empty, in seconds.
        self.edges = [MIN_GAP_S * RATIO ** (index + 1) for index, _ in times.bins]
        self._count = (0.0, *accumulate(count for _, count in times.bins))
        self._time = (0.0, *accumulate(count * edge for (_, count), edge in zip(times.bins, self.edges, strict=True)))

    def price(self, plan: IdlePlan) -> float:
        """Return the engine-seconds per idle time, where a cold start costs as much as the idle timeout."""
        return plan.idle_engine_s + plan.cold_share * self._timeout_s

    def plan(self, keep_s: float, ready_s: float | None = None, until_s: float | None = None) -> IdlePlan:
        """Return the plan with its expected cost."""
        kept, kept_time = self._up_to(keep_s)
        cost, cold = kept_time + (self._total - kept) * keep_s, self._total - kept
        if ready_s is not None and until_s is not None:
            before, before_time = self._up_to(ready_s)
            within, within_time = self._up_to(until_s)
            before, before_time = max(before, kept), max(before_time, kept_time)
            hits = within - before
            later = self._total - within
            # An engine that is started ahead costs its start time, whether or not a request arrives.
            cost += (self._total - before) * self._start_s
            cost += (within_time - before_time) - hits * ready_s + later * (until_s - ready_s)
            cold -= hits
        return IdlePlan(keep_s, ready_s, until_s, self._start_s, cost / self._total, max(0.0, cold) / self._total, self._total)

    def longer(self, seconds: float) -> float:
        """Return how many idle times were longer than this."""
        return self._total - self._up_to(seconds)[0]

    def window(self, keep_s: float) -> tuple[float, float] | None:
        """Return the window in which the next request is expected if it has not arrived by `keep_s`: from the head to the tail of the
        longer idle times, with a bin's width as a margin. None if that window is too long to pay for, or too close to be worth a stop."""
        before, _ = self._up_to(keep_s)
        rest = self._total - before
        head = next(edge for edge, count in zip(self.edges, self._count[1:], strict=True) if count - before > HEAD * rest)
        tail = next(edge for edge, count in zip(self.edges, self._count[1:], strict=True) if count - before >= TAIL * rest)
        ready_s, until_s = head / RATIO / RATIO, tail * RATIO
        if keep_s + self._start_s + until_s - ready_s > self._timeout_s or ready_s - self._start_s <= keep_s:
            return None
        return ready_s, until_s

    def _up_to(self, seconds: float) -> tuple[float, float]:
        """Return how many idle times are no longer than this, and their sum."""
        index = bisect_right(self.edges, seconds)
        return self._count[index], self._time[index]


@dataclass(frozen=True, slots=True)
class Idleness:
    """The state of a pool's idleness: its idle times, the time of its last activity (on `now`'s clock, -inf if there was none), whether it
    had work when it was last observed, and the resulting plan."""

    times: IdleTimes = field(default_factory=IdleTimes)
    active_at: float | None = None
    busy: bool = False
    plan: IdlePlan | None = None
    #: The timeout for which the plan was made.
    idle_timeout_s: float = 0.0

    def idle_s(self, now: float) -> float:
        """Return the seconds since the last activity that was observed, infinity if there was none."""
        return math.inf if self.active_at is None else now - self.active_at

    def observed(self, now: float, idle_s: float, busy: bool, idle_timeout_s: float, start_s: float) -> "Idleness":
        """Return the state at `now`, when the pool was last active `idle_s` ago. A new plan is made only if something has changed."""
        active_at = now - idle_s
        ended = self.active_at is not None and not self.busy
        times = self.times.with_gap(active_at - (self.active_at or 0.0)) if ended else self.times
        plan = self.plan
        # A different start time alone does not change the plan, which holds for as long as the pool is idle.
        if plan is None or times is not self.times or idle_timeout_s != self.idle_timeout_s:
            plan = idle_plan(times, idle_timeout_s, start_s)
        return replace(self, times=times, active_at=active_at, busy=busy, plan=plan, idle_timeout_s=idle_timeout_s)
