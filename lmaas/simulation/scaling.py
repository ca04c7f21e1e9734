"""Calls the real autoscaler, and keeps its state between decisions."""

from collections.abc import Mapping
from typing import Any

from lmaas.control.autoscaler import Demand, Policy, ScalingState, decide


class Scaling:
    """The number of replicas that one pool should have, by the controller's own policy."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._state = ScalingState()

    def desired(self, stats: Mapping[str, Any], current: int, now_s: float) -> int:
        """Return the decision for a pool of `current` replicas. `stats` is the reply of the scheduler's function of that name."""
        scale = decide(Demand.of(stats), self.policy, current, self._state, now_s)
        self._state = scale.state
        return scale.replicas

    def quiet_s(self, idle_s: float) -> float | None:
        """Return the seconds for which a pool without replicas, idle for `idle_s`, will have none. None means until the next request."""
        plan = self._state.idleness.plan
        if plan is None or plan.ready_s is None or plan.until_s is None or idle_s >= plan.until_s:
            return None
        return max(0.0, plan.ready_s - plan.ahead_s - idle_s)
