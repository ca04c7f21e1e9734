"""The data that the model stores, and the figures that are counted from it."""

from collections import Counter
from typing import Any

from lmaas.scheduling.states import TRANSITIONS, TicketState
from lmaas.states import Observed
from tests.integration.scheduling.model.data import Held, Line, Replica, Rules
from tests.integration.scheduling.model.limits import Limits
from tests.integration.scheduling.model.reserve import Reserve


class State:
    """The data of one pool: tickets, replicas, limits and the figures that functions remember."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        #: The number of times that tickets changed from one state to another.
        self.moves: Counter[tuple[TicketState, TicketState]] = Counter()
        self.forget_everything()

    def forget_everything(self) -> None:
        """Lose all data, as FLUSHALL does."""
        self.tickets: dict[str, Held] = {}
        self.replicas: dict[str, Replica] = {}
        self.limits = Limits(self.rules.TURN_MS)
        #: Those of interactive tickets (False) and of background tickets (True).
        self.lines = {False: Line(), True: Line()}
        self.enqueued = 0
        self.reserve = Reserve()
        #: The numbers of background tickets that were placed and put back so far; how many one call may still put back, and its tries.
        self.ages = self.yields = 0
        self.may_yield, self.tries = self.rules.MAX_YIELDS, 0
        #: The largest number of turns so far that did not count as passing over.
        self.longest_turns = 0
        self.run_ms = self.rules.TURN_MS
        #: None before any supervisor has reported it.
        self.start_ms: int | None = None
        #: The server's time at the last call, and by how much the pool's time is later.
        self.reaped: int | None = None
        self.offset = 0
        self.spare_until = 0
        #: The number of replicas and of lists of lost tickets so far, and these lists: ticket ids that no call has reached yet.
        self.lives = 0
        self.lost: list[list[str]] = []
        self.budget = self.rules.MAX_REAPED
        #: The time at which a slot was last taken, or a replica became ready.
        self.turn: int | None = None
        self.active: int | None = None
        self.controller = self.delay_ms = 0
        self.first_ms = self.rules.START_MS
        #: Usage events; published messages (channel, message); placed tickets, for tests that watch them.
        self.events: list[dict[str, Any]] = []
        self.said: list[tuple[str, Any]] = []
        self.placements: list[tuple[str, list[str]]] = []
        #: For each placed background ticket, the free slots and the reserve after it, and the interactive tickets that waited.
        self.background_placements: list[tuple[int, int, int]] = []

    def move(self, held: Held, state: TicketState) -> None:
        """Change a ticket's state as the transition table allows it."""
        assert state in TRANSITIONS[held.state], f"{held.ticket.id}: {held.state} → {state}"
        self.moves[held.state, state] += 1
        held.state = state

    def time(self, wall: int) -> int:
        """Return the pool's time, which never goes back, at this time of the server's clock."""
        return max(wall, self.reaped or 0) + self.offset

    def begin(self, wall: int) -> int:
        """Begin a call. After an outage of the server itself, all owners get the time of a lease. Return the pool's time."""
        now, last = self.time(wall), wall if self.reaped is None else self.reaped
        self.offset, self.reaped, self.budget = now - wall, wall, self.rules.MAX_REAPED
        self.may_yield, self.tries = self.rules.MAX_YIELDS, 0
        if wall - last > self.rules.AWAY_MS:
            self.spare_until = now + self.rules.LEASE_MS
        return now

    def tell(self, held: Held, event: TicketState, **news: Any) -> None:
        self.said.append(
            (f"lmaas:gateway:{held.ticket.gateway}", {"id": held.ticket.id, "event": event, "attempts": held.attempts, **news})
        )

    def queue(self, tenant: str | None = None, *, background: bool = False) -> list[Held]:
        """Return the queued tickets of a class: all in order of arrival, or those of a tenant that did not come back, in their order of
        service."""
        waiting = [each for each in self.tickets.values() if each.state == TicketState.QUEUED and each.ticket.background == background]
        if tenant is None:
            return sorted(waiting, key=lambda each: each.turn)
        own = [each for each in waiting if each.ticket.tenant == tenant and not each.came_back]
        return sorted(own, key=lambda each: each.place)

    def on(self, replica: Replica) -> list[Held]:
        return [each for each in self.tickets.values() if each.replica == replica.id and each.life == replica.life]

    def load(self, replica: Replica) -> int:
        return sum(each.slots for each in self.on(replica))

    def back(self, replica: Replica) -> int:
        """Return the slots of its background tickets."""
        return sum(each.slots for each in self.on(replica) if each.ticket.background)

    def front(self, replica: Replica) -> int:
        """Return the slots of its interactive tickets."""
        return self.load(replica) - self.back(replica)

    def running(self, replica: Replica) -> dict[str, int]:
        """Return adapter → number of tickets that hold a slot with it."""
        adapters = [each.ticket.adapter for each in self.on(replica) if each.ticket.adapter]
        return {adapter: adapters.count(adapter) for adapter in adapters}

    def background_load(self) -> int:
        return sum(map(self.back, self.replicas.values()))

    def fresh(self, now: int, replica: Replica) -> bool:
        """Return whether the replica gets new work."""
        return replica.state == Observed.READY and not replica.suspect and now - replica.beat < self.rules.STALE_MS

    def open_replicas(self, now: int) -> list[Replica]:
        return [each for each in self.replicas.values() if self.fresh(now, each)]
