"""How many replicas a pool should have: a pure function of demand and time."""

import math
from dataclasses import dataclass

#: After a start that failed, the next waits this long, doubled for each failure in a row.
BACKOFF_S = 5.0
BACKOFF_MAX_S = 300.0
#: Failures older than this are forgiven.
FAILURE_WINDOW_S = 1800.0


@dataclass(frozen=True, slots=True)
class Demand:
    """What a pool is asked for: `queued` and `running` requests, and for how long (seconds) there has been neither."""

    queued: int
    running: int
    idle_s: float


@dataclass(frozen=True, slots=True)
class Policy:
    """The pool's bounds. `slots` is how many sequences a replica runs at once."""

    min_replicas: int
    max_replicas: int
    idle_timeout_s: float
    slots: int


@dataclass(frozen=True, slots=True)
class Scale:
    """The decision: `replicas` desired, and since when (`now`'s clock) fewer would have done, or None."""

    replicas: int
    low_since: float | None


def decide(demand: Demand, policy: Policy, current: int, low_since: float | None, now: float) -> Scale:
    """Up at once, down only after the idle timeout; to a maximum that was lowered, at once.

    `current` counts the replicas that are desired now, `low_since` is what the last decision said.
    """
    needed = math.ceil((demand.queued + demand.running) / policy.slots)
    wanted = max(policy.min_replicas, min(needed, policy.max_replicas))
    current = min(current, max(policy.min_replicas, policy.max_replicas))
    if wanted >= current:
        return Scale(wanted, None)
    since = now if low_since is None else low_since
    if wanted == 0:
        # The pool's own memory of its last request outlives a controller's.
        since = min(since, now - demand.idle_s) if needed == 0 else since
        if demand.idle_s < policy.idle_timeout_s:
            return Scale(current, since)
    if now - since >= policy.idle_timeout_s:
        return Scale(wanted, None)
    return Scale(current, since)


def backoff_s(failures: int) -> float:
    """How long after the last of `failures` failed starts the next may come."""
    return 0.0 if failures == 0 else min(BACKOFF_MAX_S, BACKOFF_S * 2 ** min(failures - 1, 16))
