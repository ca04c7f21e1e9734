"""The scheduler in plain Python, as a specification of the Lua functions. It has no Redis, and the time is an argument (`now`, ms).

It follows the comments in lmaas/scheduling/*.lua in the simplest way: where the functions keep running figures (a replica's load, the
waiting tenants, the usage of a minute), it counts anew each time. A method takes the arguments of the method of Scheduler and returns its
result, except for the epoch. The model has one pool.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmaas.scheduling.client import Beat, Bounds, Seed, Ticket
from lmaas.scheduling.states import GATEWAY_LOST, RUNNER_LOST, TRANSITIONS, NoTicket, RetryReason, Signal, TicketState, WaitPhase
from lmaas.states import Observed, UsageStatus
from tests.integration.scheduling.model_limits import Limits, Reservation, Tokens
from tests.integration.scheduling.model_reserve import Reserve

Reply = dict[str, Any]


@dataclass(frozen=True)
class Rules:
    """The scheduler's constants, by their names in Lua."""

    LEASE_MS: int = 6000
    STALE_MS: int = 5000
    GONE_MS: int = 30_000
    AWAY_MS: int = 3000
    PRESENT_MS: int = 10_000
    MAX_ATTEMPTS: int = 2
    TURN_MS: int = 2000
    START_MS: int = 20_000
    MAX_PASSES: int = 64
    RESERVE_PASSES: int = 32
    FAIR_TURNS: int = 2
    MAX_TURNS: int = 128
    MAX_TENANTS: int = 256
    MAX_LINE: int = 64
    MAX_DEPTH: int = 64
    MAX_VISITS: int = 512
    MAX_REAPED: int = 64
    MAX_CANDIDATES: int = 16
    MAX_GONE: int = 4
    MAX_KEPT: int = 16
    MAX_CROWDED: int = 4
    MAX_COUNTERS: int = 10_000
    MAX_YIELDS: int = 16
    MAX_TRIES: int = 4
    MAX_BACKGROUND_QUEUED: int = 10_000
    MAX_BACKGROUND_PLACED: int = 32


@dataclass
class Held:
    """A ticket that the scheduler has: queued → (loading →) granted, or an end that its gateway has yet to settle."""

    ticket: Ticket
    submitted: int
    attempts: int
    expires: int
    state: TicketState = TicketState.QUEUED
    #: Its place among all tickets, and among those of its tenant. The smallest goes first.
    turn: tuple[int, int] = (0, 0)
    place: tuple[int, str] = (0, "")
    #: The total number of placed tickets when a later ticket was first placed before this one.
    passed_at: int | None = None
    replica: str | None = None
    #: Which replica of this name.
    life: int = 0
    #: The replica that it lost.
    revoked: str | None = None
    #: The slots that it takes on its replica.
    slots: int = 0
    #: Its number among the background tickets that were placed.
    age: int = 0
    placed: int | None = None
    granted: int | None = None
    progress: Tokens | None = None
    reservations: list[Reservation] = field(default_factory=list)
    #: True if it was put back, in which case it runs even without room.
    restored: bool = False

    @property
    def came_back(self) -> bool:
        return self.turn[0] == 0

    @property
    def sequence(self) -> float:
        """The order in which it is taken from a replica that is lost."""
        came_back, number = self.turn
        return 0 if number == 0 else -1 / number if came_back == 0 else number

    def charged(self) -> int:
        """The tokens charged to its tenant's counter for it, before the division by the share."""
        if self.placed is None or self.state == TicketState.YIELDED:
            return 0
        return units(self.progress) if self.progress else self.ticket.prompt_tokens


@dataclass
class Replica:
    """One engine."""

    id: str
    #: Its number among all replicas, by which tickets know it.
    life: int
    since: int
    url: str = ""
    slots: int = 0
    adapter_slots: int = 0
    state: Observed = Observed.STARTING
    beat: int = 0
    #: The remaining time of its start by its supervisor's last heartbeat, and the time by which it is late.
    left: int | None = None
    late: int = 0
    suspect: bool = False
    #: The age of the latest background ticket that was placed there.
    latest: int = 0
    resident: set[str] = field(default_factory=set)
    #: Adapter → the place of its files.
    loading: dict[str, str] = field(default_factory=dict)
    #: Adapter → the time at which a ticket was last placed with it.
    used: dict[str, int] = field(default_factory=dict)


@dataclass
class Here:
    """The room that is kept on a replica for tickets that have waited too long: all of it, or adapter slots, emptied of `victims` for
    `holders`."""

    whole: bool = False
    victims: set[str] = field(default_factory=set)
    holders: set[str] = field(default_factory=set)


@dataclass
class Kept:
    """All room that is kept in a round, by replica, and how often some was."""

    at: dict[str, Here] = field(default_factory=dict)
    keeps: int = 0

    def on(self, replica: str) -> Here:
        """Keep something on a replica."""
        self.keeps += 1
        return self.at.setdefault(replica, Here())


@dataclass
class Line:
    """The order of service of one class of tickets, interactive or background."""

    #: The counters of its tenants.
    counters: dict[str, float] = field(default_factory=dict)
    last_to_leave: str | None = None
    #: The least of the counters that were dropped.
    least_counter: float = 0.0
    #: For each waiting tenant, the number of tickets that it has queued since it began to wait.
    sequences: dict[str, int] = field(default_factory=dict)
    placed: int = 0


def units(tokens: Tokens) -> int:
    """Return the cost of tokens. A completion token costs twice a prompt token."""
    return tokens[0] + 2 * tokens[2]


class Model:
    """The scheduler of one pool."""

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

    # What is there.

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

    def loading_on(self, replica: Replica, adapter: str) -> list[Held]:
        if replica.state == Observed.DRAINING:
            return []  # they are lost
        return [each for each in self.on(replica) if each.state == TicketState.LOADING and each.ticket.adapter == adapter]

    def get(self, name: str) -> Held | None:
        """Return a ticket. If it has lost its place and no call has reached it yet, take it back first."""
        held = self.tickets.get(name)
        if held is not None and held.replica is not None and not self.stands(held, held.replica):
            self.displace(held)
        return held

    def stands(self, held: Held, replica_id: str) -> bool:
        replica = self.replicas.get(replica_id)
        drains = replica is not None and replica.state == Observed.DRAINING
        return replica is not None and replica.life == held.life and not (held.state == TicketState.LOADING and drains)

    def fresh(self, now: int, replica: Replica) -> bool:
        """Return whether the replica gets new work."""
        return replica.state == Observed.READY and not replica.suspect and now - replica.beat < self.rules.STALE_MS

    # Whose turn it is.

    def tenants_waiting(self, *, background: bool = False) -> list[str]:
        """Return the waiting tenants by counter. A tenant does not wait if only tickets that came back are in its queue."""
        tenants = {each.ticket.tenant for each in self.queue(background=background) if not each.came_back}
        return sorted(tenants, key=lambda tenant: (self.lines[background].counters.get(tenant, 0), tenant))

    def in_order(self, *, background: bool = False) -> Iterator[Held]:
        """Return the tickets of one round in the order of service, starting with those that came back."""
        order = [each for each in self.queue(background=background) if each.came_back]
        for tenant in self.tenants_waiting(background=background)[: self.rules.MAX_TENANTS]:
            order += self.queue(tenant, background=background)[: self.rules.MAX_DEPTH]
        yield from order[: self.rules.MAX_VISITS]

    def floor(self, *, background: bool) -> float:
        """Return the least counter of a tenant that begins to wait."""
        line, waiting = self.lines[background], self.tenants_waiting(background=background)
        if waiting:
            return line.counters.get(waiting[0], 0)
        return max(line.least_counter, line.counters.get(line.last_to_leave or "", 0))

    def charge(self, held: Held, amount: int) -> None:
        if amount:
            counters, tenant = self.lines[held.ticket.background].counters, held.ticket.tenant
            counters[tenant] = max(0.0, counters.get(tenant, 0) + amount / held.ticket.share)

    def enqueue(self, held: Held, front: bool) -> None:
        self.enqueued += 1
        tenant, background = held.ticket.tenant, held.ticket.background
        line, floor = self.lines[background], self.floor(background=background)
        if not front and not self.queue(tenant, background=background):
            line.sequences[tenant] = 0
            # Behind the tenants that wait already.
            behind = 0.001 if self.tenants_waiting(background=background) else 0
            line.counters[tenant] = max(line.counters.get(tenant, 0), floor + behind)
            if len(line.counters) > self.rules.MAX_COUNTERS:
                line.least_counter = self.floor(background=background)
                line.counters = {name: value for name, value in line.counters.items() if value >= line.least_counter}
        held.turn = (0 if front else 1, self.enqueued)
        if not front:
            line.sequences[tenant] += 1
            held.place = (line.sequences[tenant] - held.ticket.head_start, held.ticket.id)
        if held.state != TicketState.QUEUED:
            self.move(held, TicketState.QUEUED)
        held.replica, held.revoked, held.slots, held.placed, held.granted = None, None, 0, None, None
        held.passed_at = None
        self.tickets[held.ticket.id] = held

    def left_the_queue(self, held: Held) -> None:
        background = held.ticket.background
        if not held.came_back and not self.queue(held.ticket.tenant, background=background):
            self.lines[background].last_to_leave = held.ticket.tenant

    # Where it runs.

    def free(self, now: int) -> list[Replica]:
        """Return the replicas that get work and have a free slot, the least loaded first."""
        open_ones = [each for each in self.replicas.values() if self.fresh(now, each) and self.load(each) < each.slots]
        return sorted(open_ones, key=lambda each: (self.load(each) / each.slots, each.id))

    def choose(self, now: int, held: Held, kept: Kept) -> Replica | None:
        """Return the replica: first where the adapter runs, then where it is resident, then where an adapter slot is free; then the least
        loaded. Of each, the first few are considered."""
        adapter, free, window = held.ticket.adapter, self.free(now), self.rules.MAX_CANDIDATES + len(kept.at)

        def first(replicas: list[Replica]) -> Replica | None:
            return next((each for each in replicas if self.fits(now, held, each, kept)), None)

        def least_of(replicas: list[Replica], members: set[str]) -> Replica | None:
            some = sorted(members)[:window]
            least = [each for each in replicas[:window] if each.id in members] if len(some) == window else []
            return first(least) or first([each for each in replicas if each.id in some])

        if not adapter:
            return first(free[:window])
        found = least_of(free, {name for name, each in self.replicas.items() if adapter in self.running(each)})
        if held.ticket.background and self.reserve.is_busy(now) and self.adapter_room(now) < 2:
            return found
        spare = [each for each in free if len(self.running(each)) < each.adapter_slots]
        return (
            found
            or least_of(spare, {name for name, each in self.replicas.items() if adapter in each.resident})
            or first([each for each in spare[:window] if adapter not in self.running(each)])
        )

    def fits(self, now: int, held: Held, replica: Replica, kept: Kept) -> bool:
        """Return whether a replica has the slots for a ticket, and none of them is kept for others."""
        slots = min(held.ticket.weight, replica.slots)
        if self.load(replica) + slots > replica.slots or (held.ticket.background and slots > self.background_room(now)):
            return False
        return self.is_left(held.ticket.adapter, replica, kept)

    def is_left(self, adapter: str, replica: Replica, kept: Kept) -> bool:
        """Return whether nothing that a ticket needs is kept for others."""
        here = kept.at.get(replica.id, Here())
        if here.whole:
            return False
        if adapter in self.running(replica):
            return adapter not in here.victims
        return not adapter or not here.holders or adapter in here.holders

    # Background work.

    def open_replicas(self, now: int) -> list[Replica]:
        return [each for each in self.replicas.values() if self.fresh(now, each)]

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
        return fits and self.is_left(held.ticket.adapter, replica, kept)

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
        """Return the tickets of a round with what they need. If nothing was found for one, nothing will be for another one with the same
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

    def tell(self, held: Held, event: TicketState, **news: Any) -> None:
        self.said.append(
            (f"lmaas:gateway:{held.ticket.gateway}", {"id": held.ticket.id, "event": event, "attempts": held.attempts, **news})
        )

    # How it ends.

    def forget(self, now: int, held: Held, used: Tokens | None) -> None:
        """End a ticket: settle it to its usage, and free everything that it held."""
        if held.placed is not None and held.state != TicketState.YIELDED:
            self.charge(held, (units(used) if used else 0) - held.charged())
        del self.tickets[held.ticket.id]
        if held.state == TicketState.QUEUED:
            self.left_the_queue(held)
        self.limits.settle(now - self.offset, held.ticket, held.submitted - self.offset, held.reservations, used)
        self.active = self.active if held.ticket.background else now

    def take_back(self, held: Held) -> None:
        """Return the ticket's charge, because its client has received nothing."""
        self.charge(held, -held.charged())
        held.replica, held.slots, held.placed, held.granted, held.progress = None, 0, None, None, None

    def requeue(self, held: Held, delivered: bool) -> None:
        """Put a ticket back at the front of the queue, unless it has been delivered often enough."""
        held.attempts += delivered
        self.take_back(held)
        if delivered and held.attempts >= self.rules.MAX_ATTEMPTS:
            self.move(held, TicketState.FAILED)
        else:
            self.enqueue(held, front=True)

    def displace(self, held: Held) -> None:
        """Take a ticket from a replica that is removed or drains. One whose adapter was loading waits again. The gateway of one that ran is
        notified, and it holds nothing any more."""
        if held.state == TicketState.LOADING:
            self.requeue(held, delivered=False)
        else:
            self.move(held, TicketState.REVOKED)
            held.replica, held.slots, held.revoked = None, 0, held.replica
            self.tell(held, TicketState.REVOKED)

    def list_as_lost(self, tickets: list[Held]) -> None:
        self.lives += 1
        if tickets:
            self.lost.append([each.ticket.id for each in sorted(tickets, key=lambda each: (each.sequence, each.ticket.id))])

    def take_back_lost(self) -> None:
        """Take back as many lost tickets as one call may."""
        while self.lost and self.budget:
            taken, self.lost[0] = self.lost[0][: self.budget], self.lost[0][self.budget :]
            for name in taken:
                self.get(name)
            self.budget -= len(taken)
            if not self.lost[0]:
                del self.lost[0]

    def remove(self, replica: Replica) -> None:
        """Remove a replica. Its tickets are lost."""
        tickets = self.on(replica)
        del self.replicas[replica.id]
        self.list_as_lost(tickets)
        self.take_back_lost()

    def reap(self, now: int) -> bool:
        """Return whether anything was removed because its owner had gone."""
        found = bool(self.lost)
        self.take_back_lost()
        if now < self.spare_until:
            return found
        lost = sorted((each.expires, name) for name, each in self.tickets.items() if each.expires <= now)[: self.budget]
        self.budget -= len(lost)
        for _, name in lost:
            self.give_up(now, name)
        gone = [replica for _, replica in sorted(self.replicas.items()) if now - replica.beat > self.rules.GONE_MS]
        for replica in gone[: self.rules.MAX_GONE]:
            self.remove(replica)
        return found or bool(lost or gone)

    def give_up(self, now: int, name: str) -> None:
        """End a ticket whose gateway is gone."""
        held = self.get(name)
        assert held is not None
        used = held.progress or (0, 0, 0)
        self.events.append(
            {
                "request_id": held.ticket.id,
                "status": UsageStatus.WASTED if held.ticket.durable else UsageStatus.LOST,
                "code": RUNNER_LOST if held.ticket.durable else GATEWAY_LOST,
                "prompt_tokens": used[0],
                "cached_tokens": used[1],
                "completion_tokens": used[2],
                "queue_ms": (now if held.placed is None else held.placed) - held.submitted,
                "load_ms": 0 if held.placed is None else (now if held.granted is None else held.granted) - held.placed,
                "run_ms": 0 if held.granted is None else now - held.granted,
                "replica_id": held.replica or held.revoked,
            }
        )
        self.forget(now, held, None if held.ticket.durable else used)

    # What is answered.

    def estimate(self, now: int, position: int) -> Reply:
        """Estimate the wait of a ticket at this position. Something that is late is estimated to need the same time again by which it is
        late."""
        ready = [replica for replica in self.replicas.values() if replica.state == Observed.READY]
        starting = [replica for replica in self.replicas.values() if replica.state == Observed.STARTING]
        starting = sorted(starting, key=lambda each: (each.since, each.id))[: self.rules.MAX_CANDIDATES]
        usual = self.first_ms if self.start_ms is None else self.start_ms
        if slots := sum(replica.slots for replica in ready):
            phase, usual = WaitPhase.BUSY, self.run_ms
            elapsed = 0 if self.turn is None else now - self.turn
            left, late = self.left(usual, elapsed), max(0, elapsed - usual)
        elif starting:
            phase, slots = WaitPhase.STARTING, 16
            left, late = min(self.left_of_start(replica, usual, now) for replica in starting)
        else:
            phase, slots = WaitPhase.ASKED, 16
            elapsed = now - self.queue()[0].submitted if self.queue() else 0
            left, late = self.left(usual, elapsed), max(0, elapsed - usual)
            if (delay := self.delay_ms - (now - self.controller)) > 0:
                left, late = delay + usual, 0
        return {
            "wait_ms": left + (-(-position // slots) - 1) * self.run_ms,
            "late_ms": late,
            "phase": phase,
            "assumed": phase != WaitPhase.BUSY and self.start_ms is None,
        }

    def left_of_start(self, replica: Replica, usual: int, now: int) -> tuple[int, int]:
        """Return the remaining time of a start and its lateness, from its supervisor's report or by the clock."""
        if replica.left is None:
            return self.left(usual, now - replica.since), max(0, now - replica.since - usual)
        return max(min(1000, replica.left), replica.left - (now - replica.beat)), replica.late

    @staticmethod
    def left(usual: int, elapsed: int) -> int:
        return max(min(1000, usual), usual - elapsed, elapsed - usual)

    def position(self, held: Held) -> int:
        """Return the position in the order of service: behind tickets that came back, if the tenants' turns cost the same. The last tenants
        count with one ticket each."""
        front = [each for each in self.queue() if each.came_back]
        if held in front:
            return front.index(held) + 1
        tenant, order = held.ticket.tenant, self.tenants_waiting()
        own, turn = self.queue(tenant).index(held), order.index(tenant)
        if own == 0:
            return len(front) + turn + 1
        others = 0
        for at, each in enumerate(order):
            if each != tenant:
                others += min(len(self.queue(each)), own + (at < turn)) if at < self.rules.MAX_LINE else 1
        return len(front) + own + others + 1

    def report(self, now: int, held: Held) -> Reply:
        reply: Reply = {"state": held.state, "attempts": held.attempts}
        if held.state == TicketState.QUEUED:
            waiting = self.queue(background=True)
            position = waiting.index(held) + 1 if held.ticket.background else self.position(held)
            reply |= {"position": position} | self.estimate(now, position)
        if held.state == TicketState.GRANTED:
            reply |= self.lease(held)
        return reply

    def ask_for_replica(self) -> None:
        if self.queue() and all(replica.state == Observed.DRAINING or replica.suspect for replica in self.replicas.values()):
            self.said.append(("lmaas:control", Signal.DEMAND))

    # The functions.

    def submit(
        self, now: int, ticket: Ticket, bounds: Bounds, *, waited_ms: int = 0, attempts: int = 0, seeds: Mapping[str, Seed] | None = None
    ) -> Reply:
        wall, now = now, self.begin(now)
        if self.reap(now):
            self.dispatch(now)
        if (known := self.get(ticket.id)) is not None:
            self.dispatch(now, ticket.id)
            return self.report(now, known)
        accepted_before = waited_ms > 0
        self.limits.take_seeds(wall, seeds or {})
        if not accepted_before and ticket.background:
            if len(self.queue(background=True)) >= self.rules.MAX_BACKGROUND_QUEUED:
                return {"state": NoTicket.REFUSED_BY_POOL, "wait_ms": self.run_ms}
        elif not accepted_before and len(self.queue(ticket.tenant)) >= bounds.max_queued:
            return {"state": NoTicket.REFUSED}
        elif not accepted_before and len(self.queue()) >= bounds.max_queued_pool:
            return {"state": NoTicket.REFUSED_BY_POOL, "wait_ms": self.estimate(now, len(self.queue()))["wait_ms"]}
        refused, left, made = self.limits.reserve(wall, ticket, accepted_before)
        if refused is not None:
            return refused
        held = Held(ticket, now - waited_ms, attempts, now + self.rules.LEASE_MS, reservations=made)
        self.enqueue(held, front=False)
        if not ticket.background:
            self.active = self.reserve.arrived = now
        self.dispatch(now, ticket.id)
        self.ask_for_replica()
        return self.report(now, held) | ({} if left is None else {"left": left})

    def release(self, now: int, ticket: Ticket, event: Reply | None, run_ms: int | None, used: Tokens | None) -> bool:
        now = self.begin(now)
        if event is not None:
            self.events.append(event)
        held = self.get(ticket.id)
        if held is not None:
            if run_ms is not None and not ticket.background:
                self.run_ms += (run_ms - self.run_ms) // 8
            self.forget(now, held, used)
        self.reap(now)
        self.dispatch(now)
        return held is not None

    def retry(self, now: int, ticket: Ticket, replica_id: str, reason: RetryReason, attempt: int) -> Reply:
        now = self.begin(now)
        held = self.get(ticket.id)
        if held is None:
            return {"state": NoTicket.UNKNOWN}
        if held.state in (TicketState.GRANTED, TicketState.REVOKED) and held.attempts == attempt:
            if (replica := self.replicas.get(replica_id)) is not None:
                if reason == RetryReason.ENGINE:
                    replica.suspect = True
                else:
                    replica.resident.discard(ticket.adapter)
                self.said.append((f"lmaas:replica:{replica_id}", reason))
            self.requeue(held, delivered=True)
        self.dispatch(now, ticket.id)
        self.ask_for_replica()
        return self.report(now, held)

    def renew(self, now: int, progress: Sequence[tuple[str, Tokens | None]]) -> Reply:
        now = self.begin(now)
        known = dict(self.tickets)
        for name, tokens in progress:
            if (held := self.get(name)) is not None:
                held.expires = now + self.rules.LEASE_MS
                if tokens is not None and held.state == TicketState.YIELDED:
                    held.progress = tokens
                elif tokens is not None and held.state in (TicketState.GRANTED, TicketState.REVOKED):
                    before, held.progress = held.charged(), tokens
                    self.charge(held, held.charged() - before)
        self.reap(now)
        self.dispatch(now)
        if any(name not in known or not known[name].ticket.background for name, _ in progress):
            self.active = now
        return {
            "tickets": [
                self.report(now, self.tickets[name]) if name in self.tickets else {"state": NoTicket.UNKNOWN} for name, _ in progress
            ]
        }

    def restore(self, now: int, ticket: Ticket, replica_id: str, *, waited_ms: int, attempts: int) -> bool:
        wall, now = now, self.begin(now)
        replica = self.replicas.get(replica_id)
        if self.get(ticket.id) is not None:
            self.dispatch(now)
            return True
        if replica is None:
            return False
        made = self.limits.reserve(wall, ticket, True)[2]
        held = Held(ticket, now - waited_ms, attempts, now + self.rules.LEASE_MS, TicketState.GRANTED, reservations=made, restored=True)
        held.placed = held.granted = now
        self.tickets[ticket.id] = held
        self.reserve.arrived = self.reserve.arrived if ticket.background else now
        self.charge(held, ticket.prompt_tokens)
        self.hold(now, held, replica)
        self.dispatch(now)
        return True

    def heartbeat(self, now: int, replica_id: str, beat: Beat) -> Reply:
        now = self.begin(now)
        if replica_id not in self.replicas:
            self.lives += 1
            self.replicas[replica_id] = Replica(replica_id, self.lives, now, resident=set(beat.resident))
        replica = self.replicas[replica_id]
        if beat.state == Observed.READY and replica.state == Observed.STARTING:
            self.turn = now
            replica.resident |= set(beat.resident)
        if beat.start_ms is not None:
            self.start_ms = beat.start_ms
        if replica.state != Observed.DRAINING:
            replica.state = beat.state
        replica.url, replica.slots, replica.adapter_slots, replica.beat = beat.url, beat.slots, beat.adapter_slots, now
        replica.left, replica.late = beat.left_ms, beat.late_ms or 0
        replica.suspect = beat.suspect or (replica.suspect and not beat.cleared)
        self.reap(now)
        self.dispatch(now)
        return {
            "state": replica.state,
            "load": self.load(replica),
            "background": self.back(replica),
            "suspect": replica.suspect,
            "loads": replica.loading,
            "running": {adapter: len(self.loading_on(replica, adapter)) for adapter in replica.loading},
            "used": {adapter: now - at for adapter, at in replica.used.items()} if replica.loading else {},
            "controller": now - self.controller < self.rules.PRESENT_MS,
        } | ({"warm": self.awaited(replica.adapter_slots)} if replica.state == Observed.STARTING else {})

    def awaited(self, count: int) -> dict[str, str]:
        """Return the adapters that are needed first, as many as can run at once."""
        order = [held for background in (False, True) for held in self.in_order(background=background) if held.ticket.adapter]
        wanted = {held.ticket.adapter: held.ticket.source for held in reversed(order)}
        return {adapter: wanted[adapter] for adapter in list(dict.fromkeys(held.ticket.adapter for held in order))[:count]}

    def loaded(self, now: int, replica_id: str, adapter: str) -> int:
        now = self.begin(now)
        if (replica := self.replicas.get(replica_id)) is None:
            return 0
        waiting = self.loading_on(replica, adapter)
        replica.resident.add(adapter)
        replica.loading.pop(adapter, None)
        for held in waiting:
            self.move(held, TicketState.GRANTED)
            self.tell(held, TicketState.GRANTED, **self.grant(now, held))
        return len(waiting)

    def load_failed(self, now: int, replica_id: str, adapter: str, reason: str) -> int:
        now = self.begin(now)
        if (replica := self.replicas.get(replica_id)) is None:
            return 0
        failed = self.loading_on(replica, adapter)
        replica.loading.pop(adapter, None)
        for held in failed:
            self.take_back(held)
            self.move(held, TicketState.LOAD_FAILED)
            self.tell(held, TicketState.LOAD_FAILED, reason=reason)
        self.dispatch(now)
        return len(failed)

    def evict(self, now: int, replica_id: str, adapter: str) -> bool:
        now = self.begin(now)
        replica = self.replicas.get(replica_id)
        if replica is None or adapter in self.running(replica):
            return False
        replica.resident.discard(adapter)
        replica.used.pop(adapter, None)
        return True

    def drain(self, now: int, replica_id: str) -> int:
        now = self.begin(now)
        if (replica := self.replicas.get(replica_id)) is None:
            return -1
        loading = [held for adapter in replica.loading for held in self.loading_on(replica, adapter)]
        replica.state = Observed.DRAINING
        self.list_as_lost(loading)
        replica.loading = {}
        self.take_back_lost()
        latest = sorted((each for each in self.on(replica) if each.ticket.background), key=lambda each: -each.age)[: self.may_yield]
        for each in latest:
            held = self.get(each.ticket.id)
            assert held is not None
            if held.state == TicketState.GRANTED:
                self.put_back(held)
        self.dispatch(now)
        return self.load(replica)

    def deregister(self, now: int, replica_id: str) -> None:
        now = self.begin(now)
        if (replica := self.replicas.get(replica_id)) is not None:
            self.remove(replica)
        self.dispatch(now)
        self.ask_for_replica()

    def stats(self, now: int, delay_ms: int = 0, first_ms: int = Rules.START_MS) -> Reply:
        now = self.begin(now)
        self.reap(now)
        self.dispatch(now)
        self.controller, self.delay_ms, self.first_ms = now, delay_ms, first_ms
        self.active = now if self.active is None else self.active
        replicas = {
            name: {
                "state": replica.state,
                "load": self.load(replica),
                "slots": replica.slots,
                "background": self.back(replica),
                "beat_ms": now - replica.beat,
                "resident": len(replica.resident),
                "running": len(self.running(replica)),
            }
            for name, replica in self.replicas.items()
        }
        return {
            "queued": len(self.queue()),
            "load": sum(self.front(replica) for replica in self.replicas.values()),
            "background": {
                "queued": len(self.queue(background=True)),
                "load": self.background_load(),
                "yields": self.yields,
                "reserve": self.reserved(now),
            },
            "replicas": replicas,
            "idle_ms": now - self.active,
            "run_ms": self.run_ms,
            "start_ms": self.rules.START_MS if self.start_ms is None else self.start_ms,
        }

    def background_load(self) -> int:
        return sum(map(self.back, self.replicas.values()))

    def read_room(self, now: int) -> Reply:
        """Return what `Scheduler.room` does."""
        now = self.begin(now)
        self.reap(now)
        self.dispatch(now)
        ready = self.open_replicas(now)
        adapters = Counter(adapter for each in self.replicas.values() for adapter in each.resident)
        return {
            "ready": len(ready),
            "slots": sum(each.slots for each in ready),
            "room": 0 if self.queue() else max(0, self.background_room(now)),
            "queued": len(self.queue(background=True)),
            "load": self.background_load(),
            "resident": sorted(adapters, key=lambda each: (adapters[each], each), reverse=True),
        }
