"""A controller's observation of one pool and its decision for it: values without effects."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lmaas.config import Settings
from lmaas.control.autoscaler import Demand, Policy, Scale, backoff_s
from lmaas.control.observation import Condition, Replicas, observe_replicas
from lmaas.control.sharing import HeldReplica, PoolClaim, Share
from lmaas.states import Desired
from lmaas.store.models import BaseModel
from lmaas.store.replicas import Replica
from lmaas.types import Resources


@dataclass(frozen=True, slots=True)
class PoolObservation:
    """One pool as it is read in a tick.

    `rows` are its replicas that have not ended, `processes` the ids of those whose process runs, `stats` the scheduler's statistics.
    `failures` counts the starts that failed in a row, `failed_ago_s` is how long ago the last of them failed. `replicas` combines these
    facts for each replica, once `advanced` has been called.
    """

    model: BaseModel
    policy: Policy
    needs: Resources
    rows: list[Replica]
    processes: frozenset[str]
    stats: dict[str, Any]
    failures: int
    failed_ago_s: float
    replicas: Replicas = field(default_factory=dict)

    def advanced(self, previous: Replicas, now: float) -> "PoolObservation":
        """Return this observation with its `replicas`, whose conditions continue those of the `previous` tick."""
        loads = {replica: int(facts["load"]) for replica, facts in self.stats["replicas"].items()}
        return replace(self, replicas=observe_replicas(previous, self.rows, self.processes, loads, now))

    @property
    def current(self) -> int:
        """The number of desired replicas."""
        return sum(1 for row in self.rows if row.desired == Desired.RUNNING)

    @property
    def demand(self) -> Demand:
        """The demand, for the autoscaler."""
        stats = self.stats
        return Demand(stats["queued"], stats["load"], stats["idle_ms"] / 1000, stats["run_ms"] / 1000, stats["start_ms"] / 1000)

    @property
    def may_start(self) -> bool:
        """True if the last failed start is long enough ago."""
        return self.failed_ago_s >= backoff_s(self.failures)

    def claim(self, scale: Scale, now: float) -> PoolClaim:
        """Return the pool's claim for the sharing of machines: the replicas that it has and wants, and the resources that it needs."""
        alive = [each for each in self.replicas.values() if each.has_process and each.row and each.row.desired == Desired.RUNNING]
        return PoolClaim(
            id=self.model.id,
            name=self.model.name,
            needs=self.needs,
            wanted=scale.replicas,
            held=[HeldReplica(each.id, each.load or 0, each.age_s(now), Condition.READY in each.since) for each in alive],
            leaving=len(self.processes) - len(alive),
            min_replicas=self.policy.min_replicas,
            queued=self.stats["queued"],
            idle_s=self.demand.idle_s,
            ahead=scale.ahead,
            may_start=self.may_start,
            failing=self.failures > 0,
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """The decision for a pool: the number of `replicas` that it gets, of the `wanted` ones, and the reason. If `blocked`, it waits for a
    machine."""

    wanted: int
    replicas: int
    reason: str
    blocked: bool
    #: The plan for idle times (see IdlePlan), and the usual durations of requests and starts, in seconds.
    idle: dict[str, Any]
    service_s: float
    start_s: float
    #: The delay after a failed start before the next one may begin.
    backoff_s: float

    @classmethod
    def of(cls, pool: PoolObservation, scale: Scale, share: Share) -> "Decision":
        """Return the decision with its reason in words."""
        reason = scale.reason
        if share.reason:
            reason += f"; {share.reason}"
        blocked = share.replicas < scale.replicas and share.replicas == 0 and not scale.ahead and pool.may_start
        demand = pool.demand
        idle = {name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(scale.idle_plan).items()}
        return cls(scale.replicas, share.replicas, reason, blocked, idle, demand.service_s, demand.start_s, backoff_s(pool.failures))

    def shown(self) -> dict[str, Any]:
        """Return the decision as JSON for the table that the API reads."""
        return asdict(self)


def policy_of(model: BaseModel, settings: Settings) -> Policy:
    """Return the bounds that the operator set for this base model, or those of the settings."""
    low = model.min_replicas or 0
    high = max(low, settings.engine_max_replicas if model.max_replicas is None else model.max_replicas)
    return Policy(low, high, settings.idle_timeout_s if model.idle_timeout_s is None else model.idle_timeout_s, model.max_num_seqs)


def needs_of(model: BaseModel, settings: Settings, capacity: Resources | None) -> Resources:
    """Return the resources of a replica of this base model: those of its operator, or of the settings, or one accelerator if there are
    any."""
    accelerators = settings.engine_accelerators if model.accelerators is None else model.accelerators
    if accelerators is None:
        accelerators = 1 if capacity is not None and capacity.accelerators > 0 else 0
    return Resources(settings.engine_cpus if model.cpus is None else model.cpus, accelerators)
