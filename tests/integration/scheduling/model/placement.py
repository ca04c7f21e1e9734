"""The choice of a ticket's replica, and of the background tickets that are put back for it. See placement.lua and yielding.lua."""

from lmaas.scheduling.states import TicketState
from tests.integration.scheduling.model.data import Held, Here, Kept, Replica
from tests.integration.scheduling.model.endings import Endings


class Placement(Endings):
    """The choice of a replica."""

    def free(self, now: int) -> list[Replica]:
        """Return the replicas that get work and have a free slot, the least loaded first."""
        open_ones = [each for each in self.replicas.values() if self.fresh(now, each) and self.load(each) < each.slots]
        return sorted(open_ones, key=lambda each: (self.load(each) / each.slots, each.id))

    def choose(self, now: int, held: Held, kept: Kept) -> Replica | None:
        """Return the replica: first where the adapter runs, then where it is resident, then where an adapter slot is free; then the least
        loaded. Of each, the first few are considered."""
        adapter, free, window = held.ticket.adapter, self.free(now), self.rules.MAX_CANDIDATES + len(kept.at)

        def first(replicas: list[Replica], *, runs: bool = False) -> Replica | None:
            return next((each for each in replicas if self.fits(now, held, each, kept, runs=runs)), None)

        def least_of(replicas: list[Replica], members: set[str], *, runs: bool = False) -> Replica | None:
            some = sorted(members)[:window]
            least = [each for each in replicas[:window] if each.id in members] if len(some) == window else []
            return first(least, runs=runs) or first([each for each in replicas if each.id in some], runs=runs)

        if not adapter:
            return first(free[:window])
        found = least_of(free, {name for name, each in self.replicas.items() if adapter in self.running(each)}, runs=True)
        if held.ticket.background and self.reserve.is_busy(now) and self.adapter_room(now) < 2:
            return found
        spare = [each for each in free if len(self.running(each)) < each.adapter_slots]
        return (
            found
            or least_of(spare, {name for name, each in self.replicas.items() if adapter in each.resident})
            # The adapter may run on one of these, if it runs on more replicas than were considered.
            or first(spare[:window])
        )

    def fits(self, now: int, held: Held, replica: Replica, kept: Kept, *, runs: bool) -> bool:
        """Return whether a replica has the slots for a ticket, and none of them is kept for others."""
        slots = min(held.ticket.weight, replica.slots)
        if self.load(replica) + slots > replica.slots or (held.ticket.background and slots > self.background_room(now)):
            return False
        return self.is_left(held.ticket.adapter, replica, kept, runs=runs)

    def is_left(self, adapter: str, replica: Replica, kept: Kept, *, runs: bool) -> bool:
        """Return whether nothing that a ticket needs is kept for others. `runs`: its adapter is known to run there."""
        here = kept.at.get(replica.id, Here())
        if here.whole:
            return False
        if runs:
            return adapter not in here.victims
        return not adapter or not here.holders or adapter in here.holders

    def room(self, now: int) -> int:
        """Return the free slots."""
        return sum(max(0, each.slots - self.load(each)) for each in self.open_replicas(now))

    def adapter_room(self, now: int) -> int:
        """Return the free adapter slots."""
        return sum(max(0, each.adapter_slots - len(self.running(each))) for each in self.open_replicas(now))

    def reserved(self, now: int) -> int:
        """Return the free slots that background tickets must leave."""
        return self.reserve.slots(now, sum(each.slots for each in self.open_replicas(now)))

    def background_room(self, now: int) -> int:
        return self.room(now) - self.reserved(now)

    def make_room(self, now: int, held: Held, kept: Kept) -> Replica | None:
        """Return a replica where an interactive ticket fits beside background ones, and put back those that hold the adapter slot that
        it needs."""
        if self.may_yield <= 0:
            return None
        self.tries += 1
        if self.tries > self.rules.MAX_TRIES:
            return None
        yielding = sorted((each for each in self.open_replicas(now) if self.back(each)), key=lambda each: (-each.latest, each.id))
        found, crowded = [], [each for each in yielding if self.is_in_reach(held, each, kept) and self.lacks_adapter_slot(held, each)]
        for at, replica in enumerate(yielding[: self.rules.MAX_CANDIDATES]):
            if replica in crowded[self.rules.MAX_CROWDED :]:
                continue
            tickets = self.in_the_way(held, replica, kept)
            if tickets is not None:
                adapter = held.ticket.adapter
                rank = 0 if not adapter or adapter in self.running(replica) else 1 if adapter in replica.resident else 2
                found.append((rank, self.front(replica) / replica.slots, at, replica, tickets))
        if not found:
            return None
        *_, replica, tickets = min(found, key=lambda each: each[:3])
        for each in tickets:
            self.reserve.see_yield(now, each.slots)
            self.put_back(each)
        return replica

    def is_in_reach(self, held: Held, replica: Replica, kept: Kept) -> bool:
        """Return whether an interactive ticket fits on a replica beside its background tickets."""
        fits = self.front(replica) + min(held.ticket.weight, replica.slots) <= replica.slots
        return fits and self.is_left(held.ticket.adapter, replica, kept, runs=held.ticket.adapter in self.running(replica))

    def lacks_adapter_slot(self, held: Held, replica: Replica) -> bool:
        running = self.running(replica)
        return bool(held.ticket.adapter) and held.ticket.adapter not in running and len(running) >= replica.adapter_slots

    def in_the_way(self, held: Held, replica: Replica, kept: Kept) -> list[Held] | None:
        """Return the background tickets that hold the adapter slot that a ticket needs on a replica, or None if it has no room there."""
        if not self.is_in_reach(held, replica, kept):
            return None
        if not self.lacks_adapter_slot(held, replica):
            return []
        latest = sorted((each for each in self.on(replica) if each.ticket.background), key=lambda each: -each.age)[: self.may_yield]
        names = [each.ticket.adapter for each in latest]
        alone = [name for name in names if name and self.running(replica)[name] == names.count(name)]
        return [each for each in latest if each.ticket.adapter == alone[0]] if alone else None

    def put_back(self, held: Held) -> None:
        """Take its slot from a background ticket."""
        self.charge(held, -held.charged())
        self.yields += 1
        self.may_yield -= 1
        self.move(held, TicketState.YIELDED)
        held.replica, held.slots, held.revoked = None, 0, held.replica
        self.tell(held, TicketState.YIELDED)
