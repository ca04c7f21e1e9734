"""The observed replicas of a pool, and the time since which each condition holds. One pure function advances them from tick to tick."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from lmaas.states import Desired, Observed
from lmaas.store.replicas import Replica


class Condition(StrEnum):
    """A fact about a replica whose duration matters to a decision."""

    #: The replica has a row, and has not ended.
    RECORDED = "recorded"
    READY = "ready"
    #: The replica is desired to stop.
    STOPPING = "stopping"
    #: Its process runs, but no replica that has not ended has its id.
    STRAY = "stray"
    #: The replica is starting, and its supervisor has sent a heartbeat.
    BEGUN = "begun"
    #: The replica is ready or has begun, and its supervisor no longer sends heartbeats.
    SILENT = "silent"
    #: The replica is starting, and its supervisor has not sent a heartbeat yet, for instance because no machine has room for it.
    UNHEARD = "unheard"


@dataclass(frozen=True, slots=True)
class ReplicaObservation:
    """A replica as reported by three sources: its row in the database, its process at the provisioner, its entry in the queue.

    `row` is None if there is no row of a replica that has not ended. `load` (slots that interactive requests use) is None if the queue has
    no entry; `background` is the number of slots that background work uses. `since` has the time at which each current condition began to
    hold.
    """

    id: str
    row: Replica | None = None
    has_process: bool = False
    load: int | None = None
    background: int = 0
    since: Mapping[Condition, float] = field(default_factory=dict)

    def held_s(self, condition: Condition, now: float) -> float:
        """Return the seconds for which the condition has held, 0 if it does not hold."""
        return now - self.since.get(condition, now)

    def age_s(self, now: float) -> float:
        """Return the seconds for which the replica has been ready or, if it is not ready, has existed."""
        return self.held_s(Condition.READY if Condition.READY in self.since else Condition.RECORDED, now)


Replicas = Mapping[str, ReplicaObservation]


def observe_replicas(
    previous: Replicas,
    rows: Sequence[Replica],
    processes: Collection[str],
    loads: Mapping[str, int],
    now: float,
    background: Mapping[str, int] | None = None,
) -> dict[str, ReplicaObservation]:
    """Return every replica of a pool that any source reports, with the times at which its conditions began.

    `rows` are the replicas that have not ended, `processes` the ids that the provisioner runs, `loads` by id the slots that interactive
    requests use, from the queue, and `background` those that background work uses. A condition that already held in `previous` keeps its
    time, and one that no longer holds is removed. The order is that of `rows`, followed by the other ids in alphabetical order.
    """
    by_id = {row.id: row for row in rows}
    found = {}
    for replica_id in (*by_id, *sorted({*processes, *loads} - by_id.keys())):
        row, has_process, load = by_id.get(replica_id), replica_id in processes, loads.get(replica_id)
        before = previous[replica_id].since if replica_id in previous else {}
        since = {condition: before.get(condition, now) for condition in _conditions(row, has_process, load, before)}
        found[replica_id] = ReplicaObservation(replica_id, row, has_process, load, (background or {}).get(replica_id, 0), since)
    return found


def _conditions(row: Replica | None, has_process: bool, load: int | None, before: Collection[Condition]) -> list[Condition]:
    if row is None:
        return [Condition.STRAY] if has_process else []
    starting, known = row.observed == Observed.STARTING, load is not None
    begun = starting and (known or Condition.BEGUN in before)
    facts = {
        Condition.RECORDED: True,
        Condition.READY: row.observed == Observed.READY,
        Condition.STOPPING: row.desired == Desired.STOPPED,
        Condition.BEGUN: begun,
        Condition.SILENT: (begun or row.observed == Observed.READY) and not known,
        Condition.UNHEARD: starting and not begun,
    }
    return [condition for condition, holds in facts.items() if holds]
