"""How many replicas a pool should have: a pure function of demand, history and time.

Up at once from zero; otherwise by the concurrency of the last minute, by how long the queue will take compared with a start, and in a panic
(twice the demand that the replicas can run at once) by the last seconds. Down when nothing of the last minute needed so many. To zero,
and perhaps ahead of time back from it, by the pool's idle times (see idleness). The windows are those of Knative's autoscaler.
"""

import math
from dataclasses import dataclass, field, replace

from lmaas.control.idleness import Idleness, IdlePlan

#: After a start that failed, the next waits this long, doubled for each failure in a row.
BACKOFF_S = 5.0
BACKOFF_MAX_S = 300.0

#: Fewer replicas only if none of the demand in this window needed them.
STABLE_S = 60.0
#: In a panic, demand is averaged over this window.
PANIC_S = 6.0
#: So many times what the replicas can run at once is a panic: the short window counts, and nothing goes down for STABLE_S. Otherwise the
#: stable window does.
PANIC = 2.0
#: A replica more or less for less than this part of one is not worth its start.
TOLERANCE = 0.1
#: Samples closer together than this are one.
SAMPLE_S = 0.5


@dataclass(frozen=True, slots=True)
class Demand:
    """What a pool is asked for: `queued` requests, `running` ones (in slots), and how many seconds ago there was the last of either.

    `service_s` is how long a request usually holds its slot, `start_s` how long an engine usually takes to its first token.
    """

    queued: int
    running: int
    idle_s: float
    service_s: float = 2.0
    start_s: float = 20.0


@dataclass(frozen=True, slots=True)
class Policy:
    """The pool's bounds. `slots` is how many sequences a replica runs at once."""

    min_replicas: int
    max_replicas: int
    idle_timeout_s: float
    slots: int


@dataclass(frozen=True, slots=True)
class Sample:
    """Demand at one moment: queued and running requests, and the replicas that were needed."""

    at: float
    load: int
    needed: int


@dataclass(frozen=True, slots=True)
class Memory:
    """What one decision hands to the next. Whoever has none begins with `Memory()`; only the idle times' history is worth keeping."""

    samples: tuple[Sample, ...] = ()
    panic_at: float | None = None
    idleness: Idleness = field(default_factory=Idleness)


@dataclass(frozen=True, slots=True)
class Scale:
    """The decision: how many `replicas`, in words why, and what to remember. `ahead` says that nobody asks for them yet."""

    replicas: int
    reason: str
    memory: Memory
    ahead: bool = False

    @property
    def idle_plan(self) -> IdlePlan:
        """What is done when the pool is idle."""
        plan = self.memory.idleness.plan
        assert plan is not None  # noqa: S101 (each decision makes one)
        return plan


def decide(demand: Demand, policy: Policy, current: int, memory: Memory, now: float) -> Scale:
    """How many replicas there should be; `current` counts those that are desired now, `memory` is the last decision's."""
    load = demand.queued + demand.running
    idleness = memory.idleness.seen(now, demand.idle_s, load > 0, policy.idle_timeout_s, demand.start_s)
    needed, why, panic = _needed(demand, policy, current, memory, now)
    panic_at = now if panic else memory.panic_at
    samples = _remembered(memory.samples, Sample(now, load, needed), now)
    memory = Memory(samples, panic_at, idleness)
    high = max(policy.min_replicas, policy.max_replicas)
    target = min(needed, high)
    if load == 0:
        target, why, ahead = _idle(memory, demand, policy, current)
        if ahead:
            return Scale(min(target, high), why, memory, ahead=target > 0)
    if current > high:
        return Scale(high, f"no more than max_replicas ({high})", memory)
    if needed > high:
        why += f"; no more than max_replicas ({high})"
    if target < current and load > 0:
        target, why = _down(samples, panic_at, target, current, why, now)
    if target < policy.min_replicas:
        target, why = policy.min_replicas, f"min_replicas ({policy.min_replicas})"
    return Scale(target, why, memory)


def _needed(demand: Demand, policy: Policy, current: int, memory: Memory, now: float) -> tuple[int, str, bool]:
    """The replicas that the demand needs now, why, and whether it is a panic."""
    load = demand.queued + demand.running
    if load == 0:
        return 0, "no requests", False
    at_once = math.ceil(load / policy.slots)
    if current == 0:
        return at_once, f"{load} requests wait and there is no replica", True
    capacity = current * policy.slots
    now_load, usual_load = _average(memory.samples, load, now, PANIC_S), _average(memory.samples, load, now, STABLE_S)
    # What the present replicas work off before another could be ready needs no other.
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
    """Fewer replicas, once the whole stable window says so."""
    if panic_at is not None and now - panic_at < STABLE_S:
        return current, f"after a panic nothing goes down for {STABLE_S:.0f} s"
    if now - samples[0].at < STABLE_S - SAMPLE_S:
        return current, f"watching for {STABLE_S:.0f} s whether fewer do"
    most = max(target, *(sample.needed for sample in samples))
    if most < current:
        return most, f"no more were needed for {STABLE_S:.0f} s"
    return current, why


def _idle(memory: Memory, demand: Demand, policy: Policy, current: int) -> tuple[int, str, bool]:
    """What an idle pool keeps, why, and whether that is a start ahead of time."""
    plan = memory.idleness.plan or IdlePlan(policy.idle_timeout_s)
    if current == 0:
        if plan.ready_s is not None and plan.keep_s <= demand.idle_s and plan.warm(demand.idle_s):
            target = max(1, policy.min_replicas)
            return target, f"started ahead: after {_gaps(plan)}, the next request is expected after {_rounded(plan.ready_s)} s", True
        return 0, "idle", False
    if not plan.warm(demand.idle_s):
        return 0, _why_stopped(plan, policy), False
    if demand.idle_s >= STABLE_S and current > 1:
        return 1, f"idle for {STABLE_S:.0f} s: one stays warm", False
    return current, _why_warm(plan, policy, demand), False


def _why_warm(plan: IdlePlan, policy: Policy, demand: Demand) -> str:
    if demand.idle_s >= plan.keep_s and plan.until_s is not None:
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
    """The samples of the stable window, with this one; of those that lie close together, the one that needed most."""
    # One that is older than the window shows that all of it was watched.
    while len(samples) > 1 and now - samples[1].at >= STABLE_S - SAMPLE_S:
        samples = samples[1:]
    if samples and sample.at - samples[-1].at < SAMPLE_S:
        last = samples[-1]
        return (*samples[:-1], replace(last, load=max(last.load, sample.load), needed=max(last.needed, sample.needed)))
    return (*samples, sample)


def backoff_s(failures: int) -> float:
    """How long after the last of `failures` failed starts the next may come."""
    return 0.0 if failures == 0 else min(BACKOFF_MAX_S, BACKOFF_S * 2 ** min(failures - 1, 16))
