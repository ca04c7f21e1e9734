"""What to do so that the observed replicas become the desired ones: a pure function."""

from dataclasses import dataclass
from enum import StrEnum

from lmaas.states import TERMINAL, Desired, Observed
from lmaas.store.replicas import Replica

#: How long beyond the drain timeout a replica may take to end before its process is killed.
STOP_GRACE_S = 20.0
#: How long the supervisor of a ready replica may be silent before it is taken for stuck.
SILENT_S = 90.0
#: How long a process may stay whose replica has ended, or that no row knows of.
STRAY_GRACE_S = 15.0


class Verb(StrEnum):
    """What is done to a replica."""

    START = "start"
    #: Desire that it drains and stops.
    STOP = "stop"
    #: Its process is gone without a word: write that down.
    LOSE = "lose"
    #: Nobody desires this process, or it does not end.
    KILL = "kill"
    #: Its supervisor has not begun for too long: it failed, and is taken from wherever it waits.
    GIVE_UP = "give up"


@dataclass(frozen=True, slots=True)
class Action:
    """One step. `replica` is empty for a start."""

    verb: Verb
    replica: str = ""


def plan(
    desired: int,
    rows: list[Replica],
    processes: frozenset[str],
    loads: dict[str, int],
    *,
    max_replicas: int,
    may_start: bool,
    stop_after_s: float,
    start_after_s: float,
    unheard_since: dict[str, float],
    stopping_since: dict[str, float],
    unknown_since: dict[str, float],
    silent_since: dict[str, float],
    now: float,
) -> list[Action]:
    """The steps for one pool.

    `rows` are its replicas that have not ended, `processes` the ids that the provisioner runs (of this pool), `loads` the slots in
    use by id, `stopping_since` when each was first seen desired to stop, `unknown_since` when a process without a row that is not ended was
    first seen, `silent_since` when a ready one stopped beating, `unheard_since` since when one that starts has not beaten (its supervisor
    does not run, for instance because no node has room for it); times are of the clock of `now`, in seconds.
    """
    actions: list[Action] = []
    alive = [row for row in rows if row.id in processes and row.observed not in TERMINAL]
    actions += [Action(Verb.LOSE, row.id) for row in rows if row.id not in processes]
    known = {row.id for row in rows}
    # One that has just written that it ended may still be on its way out.
    strays = [replica for replica in sorted(processes - known) if now - unknown_since.get(replica, now) > STRAY_GRACE_S]
    actions += [Action(Verb.KILL, replica) for replica in strays]
    for row in alive:
        late = row.desired == Desired.STOPPED and now - stopping_since.get(row.id, now) > stop_after_s
        if late or now - silent_since.get(row.id, now) > SILENT_S:
            actions.append(Action(Verb.KILL, row.id))
        elif row.observed == Observed.STARTING and now - unheard_since.get(row.id, now) > start_after_s:
            actions.append(Action(Verb.GIVE_UP, row.id))
    wanted = [row for row in alive if row.desired == Desired.RUNNING]
    # Fewest running requests first; of equals, one that is not ready yet, then the youngest.
    spare = sorted(wanted, key=lambda row: (loads.get(row.id, 0), row.observed == Observed.READY, -row.created_at.timestamp()))
    actions += [Action(Verb.STOP, row.id) for row in spare[: max(0, len(wanted) - desired)]]
    if may_start:
        # One that drains still has its memory.
        room = max_replicas - len(alive)
        actions += [Action(Verb.START)] * max(0, min(desired - len(wanted), room))
    return actions
