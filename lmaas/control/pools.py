"""What a controller sees of one pool, and what it has decided for it: values, without effects."""

from dataclasses import asdict, dataclass
from typing import Any

from lmaas.config import Settings
from lmaas.control.autoscaler import Demand, Policy, Scale, backoff_s
from lmaas.control.sharing import Held, Pool, Share
from lmaas.states import Desired, Observed
from lmaas.store.models import BaseModel
from lmaas.store.replicas import Replica
from lmaas.types import Resources


@dataclass(frozen=True, slots=True)
class Look:
    """One pool as it is now. `rows` are its replicas that have not ended, `processes` those whose supervisor runs, `stats` what the
    queue says; of the starts that failed in a row, how many there were and how long ago (seconds) the last one was."""

    model: BaseModel
    policy: Policy
    needs: Resources
    rows: list[Replica]
    processes: frozenset[str]
    stats: dict[str, Any]
    failures: int
    failed_ago_s: float

    @property
    def current(self) -> int:
        """The replicas that are desired."""
        return sum(1 for row in self.rows if row.desired == Desired.RUNNING)

    @property
    def demand(self) -> Demand:
        """For the autoscaler."""
        stats = self.stats
        return Demand(stats["queued"], stats["load"], stats["idle_ms"] / 1000, stats["run_ms"] / 1000, stats["start_ms"] / 1000)

    @property
    def loads(self) -> dict[str, int]:
        """Replica → slots in use."""
        return {replica: int(facts["load"]) for replica, facts in self.stats["replicas"].items()}

    @property
    def may_start(self) -> bool:
        """Whether the last failed start is long enough ago."""
        return self.failed_ago_s >= backoff_s(self.failures)

    def pool(self, scale: Scale, ages: dict[str, float]) -> Pool:
        """For the sharing of machines. `ages` is for how long (seconds) each replica has been ready, or there."""
        alive = [row for row in self.rows if row.id in self.processes and row.desired == Desired.RUNNING]
        loads = self.loads
        return Pool(
            id=self.model.id,
            name=self.model.name,
            needs=self.needs,
            wanted=scale.replicas,
            held=[Held(row.id, loads.get(row.id, 0), ages.get(row.id, 0.0), row.observed == Observed.READY) for row in alive],
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
    """What was decided for a pool: `replicas` of those that it `wanted`, and why. `blocked` says that it waits for a machine."""

    wanted: int
    replicas: int
    reason: str
    blocked: bool
    #: What happens when it is idle (see IdlePlan), and what requests and starts usually take, in seconds.
    idle: dict[str, Any]
    service_s: float
    start_s: float
    #: How long after a start that failed the next one comes.
    backoff_s: float

    @classmethod
    def of(cls, look: Look, scale: Scale, share: Share) -> "Decision":
        """The decision, in words for people."""
        reason = scale.reason
        if share.reason:
            reason += f"; {share.reason}"
        blocked = share.replicas < scale.replicas and share.replicas == 0 and not scale.ahead and look.may_start
        demand = look.demand
        idle = {name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(scale.idle_plan).items()}
        return cls(scale.replicas, share.replicas, reason, blocked, idle, demand.service_s, demand.start_s, backoff_s(look.failures))

    def shown(self) -> dict[str, Any]:
        """For the table that the API reads."""
        return asdict(self)


def policy_of(model: BaseModel, settings: Settings) -> Policy:
    """The operator's own bounds, or the settings'."""
    low = model.min_replicas or 0
    high = max(low, settings.engine_max_replicas if model.max_replicas is None else model.max_replicas)
    return Policy(low, high, settings.idle_timeout_s if model.idle_timeout_s is None else model.idle_timeout_s, model.max_num_seqs)


def needs_of(model: BaseModel, settings: Settings, capacity: Resources | None) -> Resources:
    """What a replica of this base model takes: the operator's word, then the setting's; one accelerator where there are any."""
    accelerators = settings.engine_accelerators if model.accelerators is None else model.accelerators
    if accelerators is None:
        accelerators = 1 if capacity is not None and capacity.accelerators > 0 else 0
    return Resources(settings.engine_cpus if model.cpus is None else model.cpus, accelerators)
