"""A controller's observation of one pool and its decision for it: values without effects."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lmaas.config import Settings
from lmaas.control.autoscaler import Demand, Policy, Scale, backoff_s
from lmaas.control.background import BackgroundFigures, Backlog, Due, Throughput
from lmaas.control.observation import Condition, Replicas, observe_replicas
from lmaas.control.sharing import HeldReplica, PoolClaim, Share
from lmaas.states import Desired, Observed
from lmaas.store.backlog import WaitingLines
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
    #: The lines of batches that wait, and whether there is a job runner for them.
    waiting: Sequence[WaitingLines] = ()
    #: The tokens that engines have processed, by batch.
    done: Mapping[str, int] = field(default_factory=dict)
    has_runner: bool = True
    replicas: Replicas = field(default_factory=dict)

    def advanced(self, previous: Replicas, now: float) -> "PoolObservation":
        """Return this observation with its `replicas`, whose conditions continue those of the `previous` tick."""
        seen = self.stats["replicas"].items()
        background = {replica: int(facts["background"]) for replica, facts in seen}
        loads = {replica: int(facts["load"]) - background[replica] for replica, facts in seen}
        return replace(self, replicas=observe_replicas(previous, self.rows, self.processes, loads, now, background))

    @property
    def current(self) -> int:
        """The number of desired replicas."""
        return sum(1 for row in self.rows if row.desired == Desired.RUNNING)

    @property
    def demand(self) -> Demand:
        """The demand, for the autoscaler."""
        return Demand.of(self.stats)

    @property
    def ready(self) -> int:
        """The number of replicas that take work."""
        return sum(1 for row in self.rows if row.desired == Desired.RUNNING and row.observed == Observed.READY)

    @property
    def background(self) -> Mapping[str, Any]:
        """The scheduler's statistics of background tickets: `queued`, `load` (in slots), `reserve` and `yields`."""
        found: Mapping[str, Any] = self.stats["background"]
        return found

    def backlog(self, tokens_per_s: float | None) -> Backlog:
        """Return the background work, for the autoscaler."""
        return Backlog(
            tuple(Due(each.due_s, each.lines, each.tokens) for each in self.waiting),
            queued=int(self.background["queued"]),
            running=int(self.background["load"]),
            ready=self.ready,
            tokens_per_s=tokens_per_s,
            has_runner=self.has_runner,
            waited_s=max((each.waited_s for each in self.waiting), default=0.0),
        )

    def throughput(self, before: Throughput, now: float) -> Throughput:
        """Return what the pool's replicas have shown of background work, with this observation."""
        return before.observed(
            now,
            self.done,
            running=int(self.background["load"]),
            ready=self.ready,
            slots=self.policy.slots,
        )

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
            held=[HeldReplica(each.id, each.load or 0, each.age_s(now), Condition.READY in each.since, each.background) for each in alive],
            leaving=len(self.processes) - len(alive),
            min_replicas=self.policy.min_replicas,
            queued=self.stats["queued"],
            idle_s=scale.state.idleness.idle_s(now),
            ahead=scale.ahead,
            may_start=self.may_start,
            failing=self.failures > 0,
            background=scale.background,
            due=scale.due,
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
    background: BackgroundFigures
    #: The requests that wait, and the slots that interactive requests use.
    queued: int
    running: int

    @classmethod
    def of(cls, pool: PoolObservation, scale: Scale, share: Share, throughput: Throughput) -> "Decision":
        """Return the decision with its reason in words."""
        reason = scale.reason
        if share.reason:
            reason += f"; {share.reason}"
        blocked = share.replicas < scale.replicas and share.replicas == 0 and not scale.ahead and pool.may_start
        demand = pool.demand
        idle = {name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(scale.idle_plan).items()}
        backlog = pool.backlog(throughput.tokens_per_s)
        background = BackgroundFigures(
            lines=backlog.lines,
            tokens=backlog.tokens,
            due_s=round(backlog.dues[0].due_s) if backlog.dues else None,
            queued=backlog.queued,
            running=backlog.running,
            reserve=int(pool.background["reserve"]),
            put_back=int(pool.background["yields"]),
            tokens_per_s=None if backlog.tokens_per_s is None else round(backlog.tokens_per_s, 1),
            replicas=scale.background,
        )
        return cls(
            scale.replicas,
            share.replicas,
            reason,
            blocked,
            idle,
            demand.service_s,
            demand.start_s,
            backoff_s(pool.failures),
            background,
            demand.queued,
            demand.running,
        )

    def shown(self) -> dict[str, Any]:
        """Return the decision as JSON for the table that the API reads."""
        return asdict(self)


def policy_of(model: BaseModel, settings: Settings) -> Policy:
    """Return the bounds that the operator set for this base model, or those of the settings."""
    low = model.min_replicas or 0
    high = max(low, settings.engine_max_replicas if model.max_replicas is None else model.max_replicas)
    idle_timeout_s = settings.idle_timeout_s if model.idle_timeout_s is None else model.idle_timeout_s
    max_wait_s = math.inf if settings.background_max_wait_s is None else settings.background_max_wait_s
    return Policy(low, high, idle_timeout_s, model.max_num_seqs, settings.background_worth_starts, max_wait_s)


def needs_of(model: BaseModel, settings: Settings, capacity: Resources | None) -> Resources:
    """Return the resources of a replica of this base model: those of its operator, or of the settings, or one accelerator if there are
    any."""
    accelerators = settings.engine_accelerators if model.accelerators is None else model.accelerators
    if accelerators is None:
        accelerators = 1 if capacity is not None and capacity.accelerators > 0 else 0
    return Resources(settings.engine_cpus if model.cpus is None else model.cpus, accelerators)
