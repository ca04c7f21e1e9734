"""The placement of waiting tickets in their order, and the room that is kept for those that were passed over. See dispatch.lua."""

from collections.abc import Iterator

from lmaas.scheduling.states import Signal, TicketState
from tests.integration.scheduling.model.data import Held, Here, Kept, Replica, Reply
from tests.integration.scheduling.model.placement import Placement


class Dispatch(Placement):
    """Rounds of placement."""

    def keep_adapter_slot(self, now: int, adapter: str, kept: Kept) -> None:
        """Empty the adapter slot with the fewest tickets, unless one is already being emptied for this adapter."""
        if any(adapter in here.holders for here in kept.at.values()) or kept.keeps >= self.rules.MAX_KEPT:
            return
        crowded = [
            (self.load(replica) / replica.slots, replica.id, running)
            for replica in self.replicas.values()
            if self.fresh(now, replica) and len(running := self.running(replica)) >= replica.adapter_slots and running
        ]
        found = [
            (count, replica_id + victim, replica_id, victim)
            for _, replica_id, running in sorted(crowded)[: self.rules.MAX_CROWDED]
            for victim, count in running.items()
            if adapter not in running
            and not kept.at.get(replica_id, Here()).whole
            and victim not in kept.at.get(replica_id, Here()).victims
        ]
        if found:
            _, _, replica_id, victim = min(found)
            here = kept.on(replica_id)
            here.victims.add(victim)
            here.holders.add(adapter)

    def keep_replica(self, now: int, kept: Kept) -> None:
        """Empty the least loaded replica."""
        found = [replica.id for replica in self.free(now) if not kept.at.get(replica.id, Here()).whole]
        if found and kept.keeps < self.rules.MAX_KEPT:
            kept.on(found[0]).whole = True

    def dispatch(self, now: int, caller: str = "") -> None:
        """Grant every slot that can be granted: to background tickets if no interactive one waits."""
        while (found := self.next_placement(now, background=False)) is not None:
            self.place_next(now, *found, caller)
        for _ in range(0 if self.queue() else self.rules.MAX_BACKGROUND_PLACED):
            if self.background_room(now) <= 0 or (found := self.next_placement(now, background=True)) is None:
                return
            self.place_next(now, *found, caller)
            self.background_placements.append((self.room(now), self.reserved(now), len(self.queue())))

    def place_next(self, now: int, held: Held, replica: Replica, passed: list[Held], caller: str) -> None:
        for each in passed:
            each.passed_at = self.lines[held.ticket.background].placed
        self.place(now, held, replica, caller)

    def next_placement(self, now: int, *, background: bool) -> tuple[Held, Replica, list[Held]] | None:
        """Return the first ticket that fits, its replica, and the tickets that are passed over for the first time."""
        passed: list[Held] = []
        kept = Kept()
        for needs, held in self.with_needs(background=background):
            replica = None if needs in self.failed else self.choose(now, held, kept)
            if replica is None and needs not in self.failed and not background and any(self.back(each) for each in self.replicas.values()):
                replica = self.make_room(now, held, kept)
            if replica is not None:
                return held, replica, passed
            self.failed.add(needs)
            if held.passed_at is None:
                passed.append(held)
                continue
            passes = self.passes(held)
            if passes >= self.rules.RESERVE_PASSES and held.ticket.adapter:
                self.keep_adapter_slot(now, held.ticket.adapter, kept)
            if passes >= self.rules.MAX_PASSES and held.ticket.weight > 1:
                self.keep_replica(now, kept)
        return None

    def with_needs(self, *, background: bool) -> Iterator[tuple[tuple[int, str], Held]]:
        """Return the tickets of a round with their needs. If nothing was found for one, nothing will be for another one with the same
        needs."""
        self.failed: set[tuple[int, str]] = set()
        for held in self.in_order(background=background):
            yield (held.ticket.weight, held.ticket.adapter), held

    def passes(self, held: Held) -> int:
        """Return the number of times that a ticket was passed over, less the turns that all tenants would take in fair order until its own
        tenant has nothing waiting."""
        if held.passed_at is None:
            return 0
        turns, background = 0, held.ticket.background
        if not held.came_back:
            tenants = self.tenants_waiting(background=background)[: self.rules.MAX_TENANTS]
            own = self.queue(held.ticket.tenant, background=background)[: self.rules.MAX_DEPTH]
            turns = min(self.rules.MAX_TURNS, len(own) * len(tenants))
        self.longest_turns = max(self.longest_turns, self.rules.FAIR_TURNS * turns)
        return self.lines[background].placed - held.passed_at - self.rules.FAIR_TURNS * turns

    def is_kept_something(self, held: Held) -> bool:
        """Return whether the ticket was passed over so often that room is kept for it as soon as there is any."""
        passes = self.passes(held)
        return passes >= self.rules.RESERVE_PASSES if held.ticket.adapter else passes >= self.rules.MAX_PASSES and held.ticket.weight > 1

    def place(self, now: int, held: Held, replica: Replica, caller: str) -> None:
        ahead = list(self.in_order(background=held.ticket.background))
        held_up = [each.ticket.id for each in ahead[: ahead.index(held)] if not self.is_kept_something(each)]
        self.placements.append((held.ticket.id, held_up))
        adapter = held.ticket.adapter
        self.lines[held.ticket.background].placed += 1
        resident = not adapter or adapter in replica.resident
        self.move(held, TicketState.GRANTED if resident else TicketState.LOADING)
        held.passed_at, held.placed = None, now
        self.left_the_queue(held)
        self.charge(held, held.ticket.prompt_tokens)
        self.hold(now, held, replica)
        if resident:
            news = self.grant(now, held)
            if held.ticket.id != caller:
                self.tell(held, TicketState.GRANTED, **news)
        elif adapter not in replica.loading:
            replica.loading[adapter] = held.ticket.source
            self.said.append((f"lmaas:replica:{replica.id}", Signal.LOAD))

    def hold(self, now: int, held: Held, replica: Replica) -> None:
        slots = min(held.ticket.weight, replica.slots)
        if held.ticket.background:
            self.ages += 1
            held.age = replica.latest = self.ages
        else:
            self.turn = now
        held.replica, held.life, held.slots = replica.id, replica.life, slots
        if held.ticket.adapter:
            replica.used[held.ticket.adapter] = now

    def grant(self, now: int, held: Held) -> Reply:
        held.granted = now
        return self.lease(held)

    def lease(self, held: Held) -> Reply:
        assert held.replica is not None
        assert held.placed is not None
        assert held.granted is not None
        url = self.replicas[held.replica].url
        return {"replica": held.replica, "url": url, "queue_ms": held.placed - held.submitted, "load_ms": held.granted - held.placed}
