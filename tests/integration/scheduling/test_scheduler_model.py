"""Random histories of the scheduler: the functions in a real Valkey agree with the model, and all promises hold after every step.

It tries 60 histories, times LMAAS_TEST_EFFORT. Each has up to 80 steps, and a step a few calls. After each call everything is compared.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from redis import Redis

from lmaas.scheduling.client import Beat, Bounds, LimitedScope, Seed, Ticket
from lmaas.scheduling.states import RetryReason, TicketState
from lmaas.states import Observed
from tests.integration.scheduling.model.data import Held, Kept, Rules
from tests.integration.scheduling.model.limits import Tokens, month_of
from tests.integration.scheduling.side_by_side import POOL, Both, Direct, library_with
from tests.support.effort import tries

HISTORIES = tries(60)
#: True if a failing history is made as short as possible; that takes a minute or more.
SHRINK = os.environ.get("LMAAS_SHRINK", "1") == "1"
#: With these constants, leases, heartbeats and the bounds of passing over run out within a few seconds and tickets.
SHORT = Rules(
    LEASE_MS=2500, STALE_MS=2000, GONE_MS=4000, AWAY_MS=1500, PRESENT_MS=3000, MAX_PASSES=4, RESERVE_PASSES=2, FAIR_TURNS=0, MAX_TRIES=100
)
#: With these as well, a call does not look at everything that waits, nor keep every counter.
NARROW = replace(
    SHORT,
    MAX_PASSES=3,
    RESERVE_PASSES=1,
    FAIR_TURNS=1,
    MAX_TURNS=3,
    MAX_TENANTS=2,
    MAX_LINE=2,
    MAX_DEPTH=2,
    MAX_VISITS=3,
    MAX_COUNTERS=3,
    MAX_REAPED=3,
    MAX_CANDIDATES=1,
    MAX_GONE=1,
    MAX_KEPT=2,
    MAX_CROWDED=1,
    MAX_YIELDS=2,
    MAX_TRIES=1,
    MAX_BACKGROUND_QUEUED=6,
    MAX_BACKGROUND_PLACED=2,
)
RULES = {"short": SHORT, "narrow": NARROW}
#: Half a minute before a month ends, and the middle of another.
STARTS = (1_769_903_970_000, 1_773_144_000_123)

SHARES = {"a": 1.0, "b": 1.0, "c": 2.0, "d": 4.0, "e": 0.5}
#: Replica → slots, adapter slots.
REPLICAS = {"z": (4, 2), "x": (2, 1), "y": (3, 2)}
GATEWAYS = ("g", "h")
REFUSED = ("refused", "refused_by_pool", "limited", "unseeded")
USAGES: tuple[Tokens | None, ...] = (None, (0, 0, 0), (3, 1, 0), (7, 2, 5), (20, 10, 40))

#: The kinds of limits, each with those of a tenant and its key.
LIMITS: dict[str, Callable[[str], tuple[LimitedScope, ...]]] = {
    "none": lambda _: (),
    "requests": lambda tenant: (LimitedScope(f"t{tenant}", "tenant", requests_per_minute=3),),
    "tokens": lambda tenant: (LimitedScope(f"t{tenant}", "tenant", tokens_per_minute=60),),
    "concurrency": lambda tenant: (
        LimitedScope(f"t{tenant}", "tenant", max_concurrent=2),
        LimitedScope(f"k{tenant}", "key", requests_per_minute=2),
    ),
    "month of the key": lambda tenant: (
        LimitedScope(f"t{tenant}", "tenant", max_concurrent=9),
        LimitedScope(f"k{tenant}", "key", tokens_per_month=150),
    ),
    "all": lambda tenant: (
        LimitedScope(f"t{tenant}", "tenant", 9, 200, 9, 300, 400),
        LimitedScope(f"k{tenant}", "key", 5, 90, 5, None, 300),
    ),
}

#: Tickets for which a gateway holds, or has just lost, a lease.
LEASED = (TicketState.GRANTED, TicketState.REVOKED)
picks = st.integers(0, 999)
adapters = st.sampled_from(["", "", "A", "B", "C", "D"])
names = st.sampled_from(list(REPLICAS))


class Histories(RuleBasedStateMachine):
    """Gateways, supervisors and a controller that act in a random order, and die."""

    client: Redis
    schedulers: dict[str, Direct]
    histories = steps = 0
    moves: ClassVar[Counter[tuple[TicketState, TicketState]]] = Counter()

    @initialize(rules=st.sampled_from(["short", "short", "narrow"]), start=st.sampled_from(STARTS), places=st.integers(1, 3))
    def begin(self, rules: str, start: int, places: int) -> None:
        self.both = Both(self.client, RULES[rules], start, self.schedulers[rules])
        self.model, self.constants = self.both.model, RULES[rules]
        self.model.moves = Histories.moves
        Histories.histories += 1
        self.month = month_of(start + 3_600_000)
        self.number = 0
        #: Tickets accepted since the server last lost its memory; those whose gateway spoke again after it was given up.
        self.accepted: dict[str, Ticket] = {}
        self.late: set[str] = set()
        self.forgotten: list[Held] = []
        self.dead_gateways: set[str] = set()
        self.absent: set[str] = set()  # replicas that do not beat
        self.lives = dict.fromkeys(REPLICAS, 0)
        self.passes: dict[str, int] = {}
        self.overfull: set[str] = set()
        self.may_idle = False
        #: Ticket → when it was accepted, its scopes, its requests and tokens.
        self.taken: dict[str, tuple[int, list[str], int, int]] = {}
        self.places = list(REPLICAS)[:places]
        for place in self.places[1:]:
            self.beat(place)

    # Gateways.

    @rule(
        count=st.integers(1, 4),
        tenant=st.sampled_from(list(SHARES)),
        adapter=adapters,
        weight=st.sampled_from([1, 1, 1, 2, 5]),
        head_start=st.sampled_from([0, 0, 0, 2, -2]),
        tokens=st.sampled_from([(1, 0), (1, 10), (5, 20), (30, 5), (30, 40)]),
        limits=st.sampled_from(["none", *LIMITS]),
        priced=st.booleans(),
        gateway=st.sampled_from(GATEWAYS),
        bounds=st.sampled_from([(100, 100), (100, 100), (2, 100), (100, 6)]),
        seed=st.sampled_from([(0, 0), (0, 10), (0, 230), (0, None), (-1, 5)]),
        background=st.sampled_from([False, False, True]),
    )
    def submit(self, count: int, **wish: Any) -> None:
        for _ in range(count):
            self.ask(**wish)

    @rule(
        lines=st.lists(st.tuples(st.sampled_from(list(SHARES)), adapters, st.sampled_from([1, 1, 1, 2])), min_size=3, max_size=9),
        quiet_s=st.sampled_from([0, 5, 61]),
        comes=st.lists(st.tuples(adapters, st.sampled_from([1, 1, 2, 5])), max_size=3),
    )
    def batch(self, lines: list[tuple[str, str, int]], quiet_s: int, comes: list[tuple[str, int]]) -> None:
        """A batch runs after a time without requests, and then some requests come."""
        for _ in range(quiet_s // 61):
            self.nobody_calls(61_000, True)
        self.all_is_well(load=True, replaced=True)
        for tenant, adapter, weight in lines:
            self.ask(tenant, adapter, weight=weight, background=True)
        if quiet_s == 5:
            self.time_passes(quiet_s, None)
        for adapter, weight in comes:
            self.ask("a", adapter, weight=weight)

    @rule(pick=picks, adapter=adapters, count=st.integers(2, 6))
    def busy(self, pick: int, adapter: str, count: int) -> None:
        """A request comes whenever one ends."""
        for tenant in ("abcde" * 2)[pick % 5 :][:count]:
            self.ask(tenant, adapter)
            self.release(pick, 1, (5, 0, 20), 100)

    @rule(
        mix=st.lists(
            st.tuples(st.sampled_from(list(SHARES)), st.sampled_from("AABC"), st.sampled_from([1, 1, 1, 4])), min_size=4, max_size=9
        ),
        pick=picks,
    )
    def mixture(self, mix: list[tuple[str, str, int]], pick: int) -> None:
        """More adapters than adapter slots, and a heavy ticket of the base model. Running tickets end soon, waiting ones are passed
        over."""
        for tenant, adapter, weight in mix:
            self.ask(tenant, adapter if weight == 1 else "", weight=weight)
        self.all_is_well(load=True, replaced=True)
        for _ in mix:
            self.ask(mix[0][0], mix[0][1])
            if held := self.pick(pick, TicketState.GRANTED):
                self.end(held.ticket, (1, 0, 1), None)

    @rule(
        tenant=st.sampled_from(list(SHARES)),
        limits=st.tuples(*[st.sampled_from(list(LIMITS))] * 2),
        ms=st.sampled_from([1000, 59_000, 59_999, 60_000, 60_999, 61_000]),
        pick=picks,
        used=st.sampled_from(USAGES),
    )
    def at_the_limit(self, tenant: str, limits: tuple[str, str], ms: int, pick: int, used: Tokens | None) -> None:
        """Submit up to the limits, and again after about a minute, when the limits may be others."""
        for _ in range(3):
            self.ask(tenant, limits=limits[0])
        self.release(pick, 1, used, None)
        self.nobody_calls(ms, True)
        for _ in range(2):
            self.ask(tenant, limits=limits[1])
        self.release(pick, 1, used, None)

    def ask(
        self,
        tenant: str,
        adapter: str = "",
        *,
        weight: int = 1,
        head_start: int = 0,
        tokens: tuple[int, int] = (5, 20),
        limits: str = "none",
        priced: bool = True,
        gateway: str = "g",
        bounds: tuple[int, int] = (100, 100),
        seed: tuple[int, int | None] = (0, 0),
        background: bool = False,
    ) -> None:
        """Submit a new ticket, as a gateway does. `seed` is the month (from this one) and the ledger's tokens."""
        self.number += 1
        name = f"r{self.number}"
        event, prices = json.dumps({"request_id": name}), (1_000_000, 100_000, 4_000_000) if priced else (0, 0, 0)
        scopes = LIMITS[limits]("ab"[ord(tenant) % 2])  # few, so that they are used up
        ticket = Ticket(
            name,
            POOL,
            tenant,
            gateway,
            adapter,
            f"src/{adapter}",
            weight,
            event,
            SHARES[tenant],
            head_start,
            *tokens,
            prices,
            scopes,
            background=background,
            durable=background,
        )
        reply = self.both.submit(ticket, Bounds(*bounds))
        if reply["state"] == "unseeded" and seed[1] is not None:
            self.took(dispatched=False)
            seeds = {scope: Seed(reply["month"] + seed[0], seed[1], seed[1] * 1_000_000) for scope in reply["scopes"]}
            reply = self.both.submit(ticket, Bounds(*bounds), seeds=seeds)
        taken = reply["state"] not in REFUSED
        if taken:
            self.accept(ticket)
        self.took(dispatched=taken)
        if taken:
            self.within_limits(ticket)

    def accept(self, ticket: Ticket) -> None:
        self.accepted[ticket.id] = ticket
        tokens = ticket.prompt_tokens + ticket.completion_tokens
        # Background work counts only in the month's figures.
        self.taken[ticket.id] = (self.both.now, [limit.id for limit in ticket.limits if not ticket.background], 1, tokens)

    def within_limits(self, ticket: Ticket) -> None:
        """Check that the last 60 s accepted no more than the limits allow, that no more ran at once, and that the month reserved and used
        no more."""
        for limit in ticket.limits:
            recent = [each for each in self.taken.values() if limit.id in each[1] and each[0] > self.both.now - 60_000]
            running = [name for name in self.model.tickets if limit.id in self.taken[name][1]]
            tokens, cost = self.model.limits.scopes[limit.id].month_figures(self.both.now)
            assert sum(each[2] for each in recent) <= (limit.requests_per_minute or 10**9)
            assert sum(each[3] for each in recent) <= (limit.tokens_per_minute or 10**9)
            assert len(running) <= (limit.max_concurrent or 10**9)
            assert tokens <= (limit.tokens_per_month or 10**9)
            assert cost <= (limit.budget_per_month or 10**9) * 1_000_000

    def pick(self, pick: int, *states: TicketState) -> Held | None:
        """Return one of the tickets of gateways that live."""
        known = [each for each in self.model.tickets.values() if each.ticket.gateway not in self.dead_gateways]
        known = [each for each in known if not states or each.state in states]
        return known[pick % len(known)] if known else None

    @rule(pick=picks, count=st.integers(1, 4), used=st.sampled_from(USAGES), run_ms=st.sampled_from([None, 0, 500, 9000]))
    def release(self, pick: int, count: int, used: Tokens | None, run_ms: int | None) -> None:
        for _ in range(count):
            if held := self.pick(pick):
                self.end(held.ticket, used if held.placed is not None else None, run_ms)

    def end(self, ticket: Ticket, used: Tokens | None, run_ms: int | None) -> None:
        self.settled(ticket.id, used)
        self.both.release(ticket, {"request_id": ticket.id, "status": "done"}, run_ms, used)
        self.took()

    def settled(self, name: str, used: Tokens | None) -> None:
        if name in self.taken:
            at, scopes, _, _ = self.taken[name]
            tokens = used[0] + used[2] if used else 0
            self.taken[name] = (at, scopes, 1 if tokens else 0, tokens)

    @rule(pick=picks, late=st.booleans())
    def say_again(self, pick: int, late: bool) -> None:
        """Repeat a submit whose reply was lost, or send the release of a gateway that was given up but was only slow."""
        ended = sorted(set(self.accepted) - set(self.model.tickets) - self.late)
        if late and ended:
            name = ended[pick % len(ended)]
            self.late.add(name)
            self.both.release(self.accepted[name], {"request_id": name}, None, (1, 0, 1))
            self.took()
        elif held := self.pick(pick):
            self.both.submit(held.ticket, Bounds(1, 1))
            self.took(dispatched=False)

    @rule(
        pick=picks,
        count=st.sampled_from([1, 1, 3]),
        reason=st.sampled_from([RetryReason.ENGINE, RetryReason.ENGINE, RetryReason.ADAPTER]),
        stale=st.sampled_from([0, 0, 0, 1]),
        elsewhere=names,
    )
    def retry(self, pick: int, count: int, reason: RetryReason, stale: int, elsewhere: str) -> None:
        """Deliver a ticket again, perhaps repeatedly, since the supervisor finds the engine well."""
        held = self.pick(pick, *LEASED)
        for _ in range(count):
            if held is not None and held.state in LEASED:
                replica = held.replica or held.revoked or self.name(elsewhere)
                self.both.retry(held.ticket, replica, reason, held.attempts - stale)
                self.took()
            if count > 1:
                self.beat(elsewhere, cleared=True)

    @rule(gateway=st.sampled_from(GATEWAYS), tokens=st.sampled_from([None, (3, 1, 1), (5, 0, 12), (30, 10, 40)]))
    def renew(self, gateway: str, tokens: Tokens | None) -> None:
        """Renew all tickets, whether they run or not: a gateway's reports may come late."""
        mine = [each.ticket.id for each in self.model.tickets.values() if each.ticket.gateway == gateway]
        self.both.renew([*((name, tokens) for name in mine), ("nobody", tokens)])
        self.took()

    # Supervisors.

    def name(self, place: str) -> str:
        """Return the current name of the replica at this place: after its end, a new one with another name takes its place."""
        place = place if place in self.places else self.places[0]
        return f"{place}{self.lives[place]}"

    def beat(self, place: str, state: str = "ready", **facts: Any) -> None:
        name = self.name(place)
        self.both.heartbeat(name, Beat(f"http://{name}", *REPLICAS[name[0]], Observed(state), **({"resident": []} | facts)))
        self.took()

    @rule(
        place=names,
        state=st.sampled_from(["ready", "ready", "ready", "starting", "stopped"]),
        cleared=st.booleans(),
        resident=st.sampled_from([[], ["A"], ["B", "C"]]),
        suspect=st.sampled_from([False, False, True]),
        start_ms=st.sampled_from([None, 5000]),
    )
    def heartbeat(self, place: str, state: str, cleared: bool, resident: list[str], suspect: bool, start_ms: int | None) -> None:
        self.beat(place, state, cleared=cleared, resident=resident, suspect=suspect, start_ms=start_ms)

    @rule(load=st.sampled_from([True, True, False]), replaced=st.booleans())
    def all_is_well(self, load: bool, replaced: bool) -> None:
        """Let every replica send a heartbeat and load the adapters that it should; drained ones make room for others."""
        self.absent.clear()
        for place in self.places:
            self.beat(place, cleared=True)
            replica = self.model.replicas[self.name(place)]
            if replaced and replica.state != "ready":
                self.end_of(place)
                self.beat(place)
            for adapter in list(replica.loading) if load else ():
                self.both.loaded(replica.id, adapter)
                self.took(dispatched=False)

    def end_of(self, place: str) -> None:
        self.both.deregister(self.name(place))
        self.lives[self.name(place)[0]] += 1
        self.took()

    @rule(pick=picks, well=st.booleans())
    def load(self, pick: int, well: bool) -> None:
        loads = [(name, adapter) for name, replica in self.model.replicas.items() for adapter in replica.loading]
        if loads:
            (self.both.loaded if well else self.both.load_failed)(*loads[pick % len(loads)])
            self.took(dispatched=not well)

    @rule(place=names, adapter=adapters, what=st.sampled_from(["drains", "ends", "is silent", "evicts", "loads", "fails to load"]))
    def a_replica(self, place: str, adapter: str, what: str) -> None:
        """A supervisor's report may name an unknown replica, or an adapter that no request needs."""
        name, adapter = self.name(place), adapter or "A"
        match what:
            case "drains":
                self.both.drain(name)
            case "ends":
                self.end_of(place)
            case "is silent":
                self.absent ^= {place}
            case "evicts":
                self.both.evict(name, adapter)
            case "loads":
                self.both.loaded(name, adapter)
            case _:
                self.both.load_failed(name, adapter)
        self.took(dispatched=what in ("drains", "ends"))

    # Time, and the server.

    @rule(seconds=st.sampled_from([1, 1, 2, 5]), tokens=st.sampled_from([None, None, (5, 0, 7)]))
    def time_passes(self, seconds: int, tokens: Tokens | None) -> None:
        """Let time pass, while every live process calls every second."""
        for _ in range(seconds):
            self.both.at(self.both.now + 1000)
            self.everybody_calls(tokens)

    def everybody_calls(self, tokens: Tokens | None) -> None:
        for gateway in GATEWAYS:
            if gateway not in self.dead_gateways:
                self.renew(gateway, tokens)
        for place in self.places:
            if place not in self.absent and self.name(place) in self.model.replicas:
                self.beat(place, self.model.replicas[self.name(place)].state)
        self.both.room()
        self.both.stats()
        self.took()

    @rule(ms=st.sampled_from([1, 400, 999, 1600, 3000, 60_000, 61_000]), then=st.sampled_from([True, True, False]))
    def nobody_calls(self, ms: int, then: bool) -> None:
        """Let time pass without calls; after it, every process may call."""
        self.both.at(self.both.now + ms)
        if then:
            self.everybody_calls(None)

    @rule(
        what=st.sampled_from(["gateway g", "gateway h", "gateway h", "clock", "memory", "memory, mended", "memory, mended"]),
        often=st.booleans(),
    )
    def misfortune(self, what: str, often: bool) -> None:
        match what.split(maxsplit=1)[0] if often else "":
            case "gateway":
                self.dead_gateways ^= {what[-1]}
                self.time_passes(3, None)
            case "clock" if month_of(self.both.now - 3_600_000) == self.month:
                # Set the clock back, within a month. The minute's limits forget their usage, and a silent replica looks fresh until the
                # next call.
                self.both.at(self.both.now - 3_600_000)
                self.taken = {name: (0, scopes, requests, tokens) for name, (_, scopes, requests, tokens) in self.taken.items()}
                self.may_idle = True
            case "memory" | "memory,":
                self.lose_memory(mended="mended" in what)

    def lose_memory(self, mended: bool) -> None:
        """Lose the memory; the next second may restore all of it."""
        there = list(self.model.replicas.values())
        self.forgotten += self.model.tickets.values()
        self.both.flush()
        self.accepted, self.late, self.passes, self.taken = {}, set(), {}, {}
        self.overfull.clear()
        if mended:
            for replica in there:
                self.beat(replica.id[0], replica.state, resident=sorted(replica.resident))
            for _ in list(self.forgotten):
                self.put_back(0)

    @rule(pick=picks)
    def put_back(self, pick: int) -> None:
        """Do a gateway's next renewal: it restores running tickets, and submits the rest."""
        if not self.forgotten:
            return
        held = self.forgotten.pop(pick % len(self.forgotten))
        waited_ms = max(1, self.both.now - held.submitted)
        if held.state == TicketState.GRANTED and held.replica is not None:
            if not self.both.restore(held.ticket, held.replica, waited_ms, held.attempts):
                self.forgotten.append(held)  # until its replica is back
                return
            self.overfull.add(held.replica)
        else:
            self.both.submit(held.ticket, Bounds(1, 1), waited_ms, held.attempts)
        self.accept(held.ticket)
        self.took()

    # Promises that hold after every step.

    def took(self, dispatched: bool = True) -> None:
        """Check the effects of one call."""
        Histories.steps += 1
        self.may_idle = self.may_idle and not dispatched
        for room, reserved, waiting in self.model.background_placements:
            assert room >= reserved, "a background ticket took a reserved slot"
            assert waiting == 0, "a background ticket was placed while an interactive one waited"
        self.model.background_placements.clear()
        ended = [event for event in self.model.events if event.get("status") == "lost"]
        for event in ended:
            self.settled(event["request_id"], (event["prompt_tokens"], event["cached_tokens"], event["completion_tokens"]))
        for placed, ahead in self.model.placements:
            self.passes.pop(placed, None)
            for each in ahead:
                self.passes[each] = self.passes.get(each, 0) + 1
                assert self.passes[each] <= self.constants.MAX_PASSES + self.model.longest_turns, each
        queued = {each.ticket.id for background in (False, True) for each in self.model.queue(background=background)}
        self.passes = {name: count for name, count in self.passes.items() if name in queued}
        self.model.placements.clear()

    @invariant()
    def promises(self) -> None:
        self.every_accepted_ticket_is_in_one_place_and_ends_in_one_event()
        self.no_replica_is_over_its_capacity()
        self.nothing_waits_that_could_run()

    def every_accepted_ticket_is_in_one_place_and_ends_in_one_event(self) -> None:
        names = [event["request_id"] for event in self.model.events]
        for name in self.accepted:
            assert (name in self.model.tickets) + names.count(name) - (name in self.late) == 1, name

    def no_replica_is_over_its_capacity(self) -> None:
        """Check that no replica exceeds its capacity, except with tickets that were put back, which run in any case. Interactive tickets
        may run beside background ones."""
        for name, replica in self.model.replicas.items():
            slots, adapter_slots = REPLICAS[name[0]]
            most = max(self.model.front(replica), self.model.back(replica))
            if most <= slots and len(self.model.running(replica)) <= adapter_slots:
                self.overfull.discard(name)
            assert most <= slots or name in self.overfull
            assert len(self.model.running(replica)) <= adapter_slots or name in self.overfull

    def nothing_waits_that_could_run(self) -> None:
        """Check that no ticket waits that could run, unless a slot is kept for an earlier one that has been passed over often."""
        if self.may_idle:
            return
        now = self.model.time(self.both.now)
        for number, held in enumerate(self.model.in_order()):
            assert self.model.choose(now, held, Kept()) is None, held.ticket.id
            if number == 0 and self.constants.MAX_TRIES > 1:  # else the call may have stopped looking before
                # No background ticket is in the way of the first ticket either.
                yielding = [each for each in self.model.open_replicas(now) if self.model.back(each)]
                assert all(self.model.in_the_way(held, each, Kept()) is None for each in yielding), held.ticket.id
            if self.model.passes(held) >= self.constants.RESERVE_PASSES:
                return

    def teardown(self) -> None:
        """Check that in the end, with replicas that work, every ticket has had its turn."""
        if not getattr(self, "both", None) or not self.both.agreed:
            return  # the history has ended already
        self.dead_gateways.clear()
        # After a minute without requests, nothing is reserved for them.
        self.nobody_calls(61_000, True)
        for _ in range(self.number * 4 + 20):
            for place in self.places:
                self.beat(place, cleared=True)
                if self.model.replicas[self.name(place)].state == "draining":
                    self.end_of(place)
                for adapter in list(self.model.replicas[self.name(place)].loading) if self.name(place) in self.model.replicas else ():
                    self.both.loaded(self.name(place), adapter)
            for held in list(self.model.tickets.values()):
                if held.state not in (TicketState.QUEUED, TicketState.LOADING):
                    self.end(held.ticket, (1, 0, 1), None)
            if not self.model.tickets:
                break
        assert not self.model.tickets
        assert not any(map(self.model.load, self.model.replicas.values()))


@pytest.fixture(scope="module")
def client(valkey_url: str) -> Iterator[Redis]:
    with Redis.from_url(valkey_url, decode_responses=True) as client:
        yield client


@pytest.mark.search
def test_the_functions_do_what_the_model_says(client: Redis) -> None:
    class Here(Histories):
        pass

    Here.client, Here.schedulers = client, {name: Direct(client, library_with(rules)) for name, rules in RULES.items()}
    profile = settings(
        max_examples=HISTORIES,
        stateful_step_count=80,
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
        phases=[phase for phase in Phase if phase is not Phase.explain and (SHRINK or phase is not Phase.shrink)],
    )
    try:
        run_state_machine_as_test(Here, settings=profile)
    finally:
        print(f"{Histories.histories} histories, {Histories.steps} calls compared; {dict(Histories.moves)}")  # noqa: T201
