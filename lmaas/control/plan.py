"""The steps that turn a pool's observed replicas into the desired ones: a pure function."""

from dataclasses import dataclass
from enum import StrEnum

from lmaas.control.observation import Condition, Replicas
from lmaas.states import TERMINAL, Desired, Observed

#: The time that a replica may take to end, in addition to the drain timeout, before its process is killed.
STOP_GRACE_S = 20.0
#: The silence after which a supervisor that has sent heartbeats counts as stuck.
SILENT_S = 90.0
#: The time for which a process may run although its replica has ended or has no row. It may still be exiting after recording its end.
STRAY_GRACE_S = 15.0


class Verb(StrEnum):
    """The effect of an action on a replica."""

    START = "start"
    #: Desire that the replica drains and stops.
    STOP = "stop"
    #: Record that its process has gone without reporting an end.
    LOSE = "lose"
    #: Kill a process that is not desired or does not end.
    KILL = "kill"
    #: Record that its supervisor has not begun in time, and remove it from the provisioner.
    GIVE_UP = "give up"
    #: Remove the replica from the queue, which is the only place that still has it, because its supervisor was killed before it could do
    #: that.
    DEREGISTER = "deregister"


@dataclass(frozen=True, slots=True)
class Action:
    """One step. `replica` is empty for a start."""

    verb: Verb
    replica: str = ""


@dataclass(frozen=True, slots=True)
class PlanLimits:
    """The bounds of a plan: the maximum number of replicas, whether one may start now (not for a while after a failed start), and the
    seconds that a replica may take to stop and to send its first heartbeat."""

    max_replicas: int
    may_start: bool
    stop_after_s: float
    start_after_s: float


def plan(desired: int, replicas: Replicas, limits: PlanLimits, now: float) -> list[Action]:
    """Return the steps for one pool of which `desired` replicas are wanted and `replicas` are observed at `now` (seconds)."""
    recorded = [replica for replica in replicas.values() if replica.row is not None]
    actions = [Action(Verb.LOSE, replica.id) for replica in recorded if not replica.has_process]
    actions += [Action(Verb.KILL, replica.id) for replica in replicas.values() if replica.held_s(Condition.STRAY, now) > STRAY_GRACE_S]
    alive = [(replica, replica.row) for replica in recorded if replica.row and replica.has_process and replica.row.observed not in TERMINAL]
    for replica, _ in alive:
        if replica.held_s(Condition.STOPPING, now) > limits.stop_after_s or replica.held_s(Condition.SILENT, now) > SILENT_S:
            actions.append(Action(Verb.KILL, replica.id))
        elif replica.held_s(Condition.UNHEARD, now) > limits.start_after_s:
            actions.append(Action(Verb.GIVE_UP, replica.id))
    wanted = [(replica, row) for replica, row in alive if row.desired == Desired.RUNNING]
    # Fewest running requests first, then least background work; among equals, replicas that are not ready, then the youngest.
    spare = sorted(
        wanted,
        key=lambda each: (
            each[0].load or 0,
            each[0].background,
            each[1].observed == Observed.READY,
            -each[1].created_at.timestamp(),
        ),
    )
    actions += [Action(Verb.STOP, replica.id) for replica, _ in spare[: max(0, len(wanted) - desired)]]
    if limits.may_start:
        # A draining replica still uses its memory.
        room = limits.max_replicas - len(alive)
        actions += [Action(Verb.START)] * max(0, min(desired - len(wanted), room))
    actions += [Action(Verb.DEREGISTER, replica.id) for replica in replicas.values() if replica.row is None and not replica.has_process]
    return actions
