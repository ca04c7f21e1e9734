"""The number of replicas that a pool should have: a pure function of demand, history and time.

A pool scales up from zero immediately. Otherwise the target follows the concurrency of the last minute, and the time that the queue will
take compared with a start. In a panic (twice the demand that the replicas can run at once), it follows the concurrency of the last seconds.
A pool scales down when no demand of the last minute needed that many replicas. Its idle times (see idleness) decide when it scales to zero,
and whether it starts again ahead of the next request. The windows are those of Knative's autoscaler.

Background work is not part of the demand or of the idle times, so it never causes a panic. It may raise the result (see background).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lmaas.control.background import BackgroundState, Backlog, Surroundings, background_need
from lmaas.control.idleness import Idleness, IdlePlan

#: The delay before the next start after a failed one. It doubles with each consecutive failure.
BACKOFF_S = 5.0
BACKOFF_MAX_S = 300.0

#: A pool gets fewer replicas only if no demand in this window needed them.
STABLE_S = 60.0
#: In a panic, demand is averaged over this window.
PANIC_S = 6.0
#: Demand of this many times what the replicas can run at once is a panic: the short window counts instead of the stable one, and the pool
#: does not go down for STABLE_S.
PANIC = 2.0
#: A change of less than this part of a replica is not worth a start.
TOLERANCE = 0.1
#: Samples closer together than this are merged.
SAMPLE_S = 0.5


@dataclass(frozen=True, slots=True)
class Demand:
    """The interactive demand on a pool: `queued` requests, `running` ones (in slots), and the seconds since the last of either. These are
    None if the scheduler has had no request since it began, or since it lost its memory.

    `service_s` is the usual time for which a request holds its slot, `start_s` the usual time from an engine's start to its first token.
    """

    queued: int
    running: int
    idle_s: float | None
    service_s: float = 2.0
    start_s: float = 20.0

    @classmethod
    def of(cls, stats: Mapping[str, Any]) -> "Demand":
        """Return the demand in the scheduler's statistics of a pool."""
        idle_ms = stats["idle_ms"]
        idle_s = None if idle_ms is None else idle_ms / 1000
        return cls(stats["queued"], stats["load"], idle_s, stats["run_ms"] / 1000, stats["start_ms"] / 1000)


@dataclass(frozen=True, slots=True)
class Policy:
    """The pool's bounds. `slots` is the number of sequences that a replica runs at once. An engine starts for background work that has
    gathered if it is busy with it for `worth_starts` times as long as a start takes, or that has waited for `max_wait_s`."""

    min_replicas: int
    max_replicas: int
    idle_timeout_s: float
    slots: int
    worth_starts: float = 10.0
    max_wait_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Sample:
    """Demand at one time: queued and running requests, and the replicas that they needed."""

    at: float
    load: int
    needed: int


@dataclass(frozen=True, slots=True)
class ScalingState:
    """The state that one decision hands to the next, `ScalingState()` at first. Only the idle times are worth storing."""

    samples: tuple[Sample, ...] = ()
    panic_at: float | None = None
    idleness: Idleness = field(default_factory=Idleness)
    background: BackgroundState = field(default_factory=BackgroundState)


@dataclass(frozen=True, slots=True)
class Scale:
    """The decision: the number of `replicas`, the reason in words, and the state for the next decision. With `ahead`, no request needs them
    yet. Only background work needs the last `background` of them; with `due`, its deadline requires them."""

    replicas: int
    reason: str
    state: ScalingState
    ahead: bool = False
    background: int = 0
    due: bool = False

    @property
    def idle_plan(self) -> IdlePlan:
        """The plan for the time during which the pool is idle."""
        plan = self.state.idleness.plan
        assert plan is not None  # noqa: S101 (every decision makes one)
        return plan


def decide(demand: Demand, policy: Policy, current: int, state: ScalingState, now: float, backlog: Backlog | None = None) -> Scale:
    """Return the number of replicas that there should be. `current` replicas are desired now, and `state` is that of the last decision.
    `backlog` is the background work, if there is any."""
    scale = _interactive(demand, policy, current, state, now)
    load = demand.queued + demand.running
    usual = _average(scale.state.samples, load, now, STABLE_S) / policy.slots
    pool = Surroundings(current, load > 0, usual, policy.slots, demand.start_s, policy.worth_starts, policy.max_wait_s)
    need = background_need(backlog or Backlog(), pool, state.background, now)
    scale = replace(scale, state=replace(scale.state, background=need.state))
    replicas = min(need.replicas, max(policy.min_replicas, policy.max_replicas))
    if replicas > scale.replicas:
        return replace(scale, replicas=replicas, reason=need.reason, background=replicas - scale.replicas, due=need.due, ahead=False)
    return replace(scale, reason=f"{scale.reason}; {need.waits}") if need.waits and scale.replicas == 0 else scale


def _interactive(demand: Demand, policy: Policy, current: int, state: ScalingState, now: float) -> Scale:
    """Return the decision for interactive requests alone."""
    load = demand.queued + demand.running
    idleness = state.idleness.observed(now, _idle_s(demand, current, state, now), load > 0, policy.idle_timeout_s, demand.start_s)
    idle_s = idleness.idle_s(now)
    needed, why, panic = _needed(demand, policy, current, state, now)
    panic_at = now if panic else state.panic_at
    samples = _remembered(state.samples, Sample(now, load, needed), now)
    state = ScalingState(samples, panic_at, idleness, state.background)
    high = max(policy.min_replicas, policy.max_replicas)
    target = min(needed, high)
    if load == 0:
        target, why, ahead = _idle(state, idle_s, policy, current)
        if ahead:
            return Scale(min(target, high), why, state, ahead=target > 0)
    if current > high:
        return Scale(high, f"no more than max_replicas ({high})", state)
    if needed > high:
        why += f"; no more than max_replicas ({high})"
    if target < current and load > 0:
        target, why = _down(samples, panic_at, target, current, why, now)
    if target < policy.min_replicas:
        target, why = policy.min_replicas, f"min_replicas ({policy.min_replicas})"
    return Scale(target, why, state)


def _needed(demand: Demand, policy: Policy, current: int, state: ScalingState, now: float) -> tuple[int, str, bool]:
    """Return the replicas that the demand needs now, the reason, and whether it is a panic."""
    load = demand.queued + demand.running
    if load == 0:
        return 0, "no requests", False
    at_once = math.ceil(load / policy.slots)
    if current == 0:
        return at_once, f"{load} requests wait and there is no replica", True
    capacity = current * policy.slots
    now_load, usual_load = _average(state.samples, load, now, PANIC_S), _average(state.samples, load, now, STABLE_S)
    # If the present replicas finish the queue before another one could be ready, no other one is needed.
    wait_s = demand.queued * demand.service_s / capacity
    if now_load >= PANIC * capacity and wait_s > demand.start_s:
        return math.ceil(now_load / policy.slots), f"panic: {now_load:.0f} requests at once, and {current} x {policy.slots} slots", True
    by_load = math.ceil(usual_load / policy.slots - TOLERANCE)
    by_wait = math.ceil(demand.queued * demand.service_s / (max(demand.start_s, 1.0) * policy.slots))
    if by_wait > max(current, by_load):
        return by_wait, f"the queue would take {_rounded(wait_s)} s, a start {_rounded(demand.start_s)} s", False
    return max(1, by_load), f"{usual_load:.1f} requests at once, {policy.slots} slots a replica", False


def _average(samples: tuple[Sample, ...], load: int, now: float, window_s: float) -> float:
    recent = [sample.load for sample in samples if now - sample.at < window_s]
    return sum((*recent, load)) / (len(recent) + 1)


def _down(samples: tuple[Sample, ...], panic_at: float | None, target: int, current: int, why: str, now: float) -> tuple[int, str]:
    """Return fewer replicas once no demand of the whole stable window needed more, and the reason."""
    if panic_at is not None and now - panic_at < STABLE_S:
        return current, f"after a panic nothing goes down for {STABLE_S:.0f} s"
    if now - samples[0].at < STABLE_S - SAMPLE_S:
        return current, f"watching for {STABLE_S:.0f} s whether fewer do"
    most = max(target, *(sample.needed for sample in samples))
    if most < current:
        return most, f"no more were needed for {STABLE_S:.0f} s"
    return current, why


def _idle_s(demand: Demand, current: int, state: ScalingState, now: float) -> float:
    """Return for how long the pool has been idle. If the scheduler does not know it, it is known from before the scheduler lost its memory.
    If it is not, a pool without replicas has had no request yet, and one with replicas may have had one just now."""
    if demand.idle_s is not None:
        return demand.idle_s
    if state.idleness.active_at is not None:
        return state.idleness.idle_s(now)
    return math.inf if current == 0 else 0.0


def _idle(state: ScalingState, idle_s: float, policy: Policy, current: int) -> tuple[int, str, bool]:
    """Return the replicas that an idle pool keeps, the reason, and whether they are started ahead of a request."""
    plan = state.idleness.plan or IdlePlan(policy.idle_timeout_s)
    if current == 0:
        if plan.ready_s is not None and plan.keep_s <= idle_s and plan.warm(idle_s):
            target = max(1, policy.min_replicas)
            return target, f"started ahead: after {_gaps(plan)}, the next request is expected after {_rounded(plan.ready_s)} s", True
        return 0, "idle", False
    if not plan.warm(idle_s):
        return 0, "no request yet" if idle_s == math.inf else _why_stopped(plan, policy), False
    if idle_s >= STABLE_S and current > 1:
        return 1, f"idle for {STABLE_S:.0f} s: one stays warm", False
    return current, _why_warm(plan, policy, idle_s), False


def _why_warm(plan: IdlePlan, policy: Policy, idle_s: float) -> str:
    if idle_s >= plan.keep_s and plan.until_s is not None:
        return f"kept warm until {_rounded(plan.until_s)} s after the last request, by {_gaps(plan)}"
    if plan.keep_s >= policy.idle_timeout_s:
        return f"kept warm until {policy.idle_timeout_s:g} s after the last request (the idle timeout)"
    return f"kept warm until {_rounded(plan.keep_s)} s after the last request, by {_gaps(plan)}"


def _why_stopped(plan: IdlePlan, policy: Policy) -> str:
    if plan.keep_s >= policy.idle_timeout_s:
        return f"idle for {policy.idle_timeout_s:g} s (the idle timeout)"
    return f"stopped when idle for {_rounded(plan.keep_s)} s: by {_gaps(plan)}, waiting on costs more than a restart"


def _gaps(plan: IdlePlan) -> str:
    return f"the last {plan.gaps:.0f} idle times"


def _rounded(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds < 10 else f"{seconds:.0f}"


def _remembered(samples: tuple[Sample, ...], sample: Sample, now: float) -> tuple[Sample, ...]:
    """Return the samples of the stable window with this one. Of samples that lie close together, the largest figures remain."""
    # A sample that is older than the window shows that the whole window was observed.
    while len(samples) > 1 and now - samples[1].at >= STABLE_S - SAMPLE_S:
        samples = samples[1:]
    if samples and sample.at - samples[-1].at < SAMPLE_S:
        last = samples[-1]
        return (*samples[:-1], replace(last, load=max(last.load, sample.load), needed=max(last.needed, sample.needed)))
    return (*samples, sample)


def backoff_s(failures: int) -> float:
    """Return the seconds that the next start waits after the last of `failures` failed starts."""
    return 0.0 if failures == 0 else min(BACKOFF_MAX_S, BACKOFF_S * 2 ** min(failures - 1, 16))
