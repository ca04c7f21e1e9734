"""Pools that share full machines: the rules one by one, and then whole days of them on a clock of their own."""

import itertools
import math
import random
from dataclasses import dataclass, field, replace

import pytest

from lmaas.control.autoscaler import Demand, Policy, ScalingState, decide
from lmaas.control.background import Backlog, Due
from lmaas.control.sharing import HeldReplica, PoolClaim, SharingRules, WaitingSince, share
from lmaas.types import Resources

NOW = 10_000.0
RULES = SharingRules(quantum_s=60)
ONE = Resources(1, 0)
OLD = 1000.0


def pool(name: str, wanted: int, *held: HeldReplica, **facts: object) -> PoolClaim:
    """Return a pool that needs one CPU for each replica. If it wants more than it has, requests wait for it."""
    usual = {"queued": 1 if wanted > len(held) and not facts.get("ahead") else 0}
    return PoolClaim(**{"id": name, "name": name, "needs": ONE, "wanted": wanted, "held": held} | usual | facts)  # type: ignore[arg-type]


def idle(age_s: float = OLD) -> HeldReplica:
    return HeldReplica(f"idle-{age_s}", 0, age_s)


def busy(age_s: float = OLD, load: int = 1) -> HeldReplica:
    return HeldReplica(f"busy-{age_s}", load, age_s)


def lines(age_s: float = OLD) -> HeldReplica:
    """Return a replica that runs background work only."""
    return HeldReplica(f"lines-{age_s}", 0, age_s, background=4)


def filled(name: str, wanted: int, *held: HeldReplica, **facts: object) -> PoolClaim:
    """Return a pool in which only background work needs replicas, all of them by default."""
    return pool(name, wanted, *held, **{"queued": 0, "background": wanted, "idle_s": OLD} | facts)


STARTING = HeldReplica("starting", 0, OLD, ready=False)
LONG = {"a": NOW - 1000}


@pytest.mark.parametrize(
    ("cpus", "pools", "since", "expected"),
    [
        pytest.param(9, [pool("a", 2), pool("b", 1, busy())], {}, "a2 b1", id="room for all"),
        pytest.param(0.5, [pool("a", 1), pool("b", 1, idle())], {}, "a0 b1", id="a pool that no machine could hold drains nobody"),
        pytest.param(2, [pool("a", 3), pool("b", 1, busy())], {}, "a1 b1", id="as much as there is room for"),
        pytest.param(1, [pool("a", 1), pool("b", 1, idle())], {}, "a0 b0", id="an idle one gives way"),
        pytest.param(1, [pool("a", 1), pool("b", 1, idle(14))], {}, "a0 b1", id="not at once"),
        pytest.param(1, [pool("a", 1), pool("b", 1, STARTING)], {}, "a0 b0", id="one that starts for nobody gives way"),
        pytest.param(1, [pool("a", 1), pool("b", 0, leaving=1)], {}, "a0 b0", id="what drains has its memory still"),
        pytest.param(2, [pool("a", 1), pool("b", 0, leaving=1), pool("c", 1, idle())], {}, "a0 b0 c1", id="and is enough"),
        pytest.param(
            2, [pool("a", 1), pool("b", 1, idle(), idle_s=50), pool("c", 1, idle(), idle_s=90)], {}, "a0 b1 c0", id="longest idle"
        ),
        pytest.param(1, [pool("a", 1), pool("b", 1, busy())], {}, "a0 b1", id="a busy one does not"),
        pytest.param(1, [pool("a", 1), pool("b", 1, busy())], {"a": NOW - 29}, "a0 b1", id="not yet"),
        pytest.param(1, [pool("a", 1), pool("b", 1, busy())], {"a": NOW - 30}, "a0 b0", id="a busy one does, for a pool that starves"),
        pytest.param(1, [pool("a", 1), pool("b", 1, busy(59))], LONG, "a0 b1", id="once it has been served for a quantum"),
        pytest.param(1, [pool("a", 1), pool("b", 1, STARTING, queued=1)], LONG, "a0 b1", id="one that starts has not been served"),
        pytest.param(2, [pool("a", 1), pool("b", 1, busy(100)), pool("c", 1, busy(200))], LONG, "a0 b1 c0", id="the longest-served"),
        pytest.param(
            2, [pool("a", 1), pool("b", 1, busy(), min_replicas=1), pool("c", 1, busy(70))], LONG, "a0 b1 c0", id="a promise is kept"
        ),
        pytest.param(2, [pool("a", 1), pool("b", 2, busy(20), busy(20))], {}, "a0 b1", id="of two busy ones, one gives way at once"),
        pytest.param(2, [pool("a", 1), pool("b", 2, busy(14), busy(14))], {}, "a0 b2", id="but not at once after its start"),
        pytest.param(2, [pool("a", 2, busy()), pool("b", 1, busy())], LONG, "a1 b1", id="a busy one never for more of somebody's"),
        pytest.param(2, [pool("a", 2, busy()), pool("b", 1, idle())], {}, "a1 b0", id="an idle one does"),
        pytest.param(1, [pool("a", 1, min_replicas=1, queued=0), pool("b", 1, idle())], {}, "a0 b0", id="for a promise, an idle one"),
        pytest.param(1, [pool("a", 1, min_replicas=1, queued=0), pool("b", 1, busy())], LONG, "a0 b1", id="for a promise, no busy one"),
        pytest.param(1, [pool("a", 1, ahead=True), pool("b", 1, idle())], {}, "a0 b1", id="nobody for a start ahead of time"),
        pytest.param(2, [pool("a", 1, ahead=True), pool("b", 1), pool("c", 1, idle())], {}, "a0 b1 c1", id="which comes last"),
        pytest.param(1, [pool("a", 1, may_start=False), pool("b", 1, idle())], {}, "a0 b1", id="nor for one that may not start yet"),
        pytest.param(1, [pool("a", 1, may_start=False), pool("b", 1)], LONG, "a0 b1", id="it keeps no place either"),
        pytest.param(1, [pool("a", 1, failing=True), pool("b", 1, busy())], LONG, "a0 b1", id="nor a busy one for one that fails"),
        pytest.param(1, [pool("a", 1, failing=True), pool("b", 1, idle())], LONG, "a0 b0", id="but an idle one"),
        pytest.param(
            4,
            [pool("f", 1, needs=Resources(4, 0), failing=True), pool("x", 1, busy(), needs=Resources(2, 0)), pool("c", 1)],
            {"f": NOW - 1000},
            "f0 x1 c1",
            id="what a busy one keeps it from is not kept free for it",
        ),
        pytest.param(
            4,
            [pool("f", 1, needs=Resources(4, 0)), pool("x", 1, busy(1), needs=Resources(2, 0)), pool("c", 1)],
            {"f": NOW - 1000},
            "f0 x1 c0",
            id="but for one that does not fail",
        ),
        pytest.param(
            4,
            [pool("f", 1, needs=Resources(4, 0), failing=True), pool("x", 0, leaving=1, needs=Resources(2, 0)), pool("c", 1)],
            {"f": NOW - 1000},
            "f0 x0 c0",
            id="and what comes without a busy one",
        ),
        pytest.param(1, [pool("a", 1), pool("b", 1)], {"a": NOW - 5, "b": NOW - 9}, "a0 b1", id="the longest wait goes first"),
        pytest.param(1, [pool("b", 2, busy(), queued=9), pool("a", 1)], {}, "b1 a0", id="who has some goes after"),
        pytest.param(3, [pool("a", 9), pool("b", 9), pool("c", 9)], {}, "a1 b1 c1", id="one for each"),
        pytest.param(6, [pool("a", 9), pool("b", 2), pool("c", 9, busy())], {}, "a2 b2 c2", id="more for who has least"),
        pytest.param(1, [pool("a", 1), pool("b", 0, idle())], {}, "a0 b0", id="what is not wanted goes anyway"),
        pytest.param(1, [pool("a", 1), filled("b", 1, lines(1))], {}, "a0 b0", id="background work gives way at once"),
        pytest.param(1, [pool("a", 1, failing=True), filled("b", 1, lines(1))], {}, "a0 b0", id="to one that fails as well"),
        pytest.param(1, [pool("a", 1), filled("b", 1, lines(1), due=True)], {}, "a0 b0", id="whatever its deadline"),
        pytest.param(2, [pool("a", 2, busy()), filled("b", 1, lines(1))], {}, "a1 b0", id="also for more of a busy pool"),
        pytest.param(1, [pool("a", 1, ahead=True), filled("b", 1, lines())], {}, "a0 b1", id="but not ahead of a request"),
        pytest.param(2, [pool("a", 1), filled("b", 1, lines()), pool("c", 1, idle())], {}, "a0 b0 c1", id="and before an idle replica"),
        pytest.param(2, [pool("a", 1), filled("b", 2, busy(5), lines(5), background=1)], {}, "a0 b1", id="what is besides a busy replica"),
        pytest.param(1, [pool("a", 1, busy()), filled("b", 1)], {}, "a1 b0", id="background work takes no busy replica"),
        pytest.param(1, [pool("a", 1, busy()), filled("b", 1, due=True)], LONG, "a1 b0", id="not even for a deadline"),
        pytest.param(1, [pool("a", 1, idle()), filled("b", 1)], {}, "a1 b0", id="nor an idle one"),
        pytest.param(1, [pool("a", 1, idle()), filled("b", 1, due=True)], {}, "a0 b0", id="but for a deadline"),
        pytest.param(1, [pool("a", 1, idle(14)), filled("b", 1, due=True)], {}, "a1 b0", id="not at once"),
        pytest.param(1, [filled("a", 1, lines()), filled("b", 1, due=True)], {}, "a0 b0", id="a deadline before other background work"),
        pytest.param(1, [filled("a", 1, lines(), due=True), filled("b", 1, due=True)], {}, "a1 b0", id="but not before another deadline"),
        pytest.param(1, [filled("a", 1), pool("b", 1)], {}, "a0 b1", id="interactive pools first"),
        pytest.param(1, [filled("a", 1), pool("b", 1, ahead=True)], {}, "a0 b1", id="and starts ahead of a request"),
        pytest.param(1, [filled("a", 1), filled("b", 1, due=True)], {}, "a0 b1", id="then deadlines"),
        pytest.param(3, [pool("a", 1), filled("b", 1), filled("c", 1)], {}, "a1 b1 c1", id="then the rest"),
    ],
)
def test_rules(cpus: float, pools: list[PoolClaim], since: dict[str, float], expected: str) -> None:
    shares, _ = share(Resources(cpus, 0), pools, WaitingSince(since), RULES, NOW)
    assert " ".join(f"{one.id}{shares[one.id].replicas}" for one in pools) == expected


def test_without_a_bound_everybody_gets_what_they_want() -> None:
    shares, _ = share(None, [pool("a", 5), pool("b", 1, busy())], WaitingSince(), RULES, NOW)
    assert {name: one.replicas for name, one in shares.items()} == {"a": 5, "b": 1}


def test_reasons() -> None:
    def why(cpus: float, *pools: PoolClaim) -> list[str]:
        shares, _ = share(Resources(cpus, 0), pools, WaitingSince(LONG), RULES, NOW)
        return [shares[one.id].reason for one in pools]

    assert why(2, pool("a", 1), pool("b", 1, idle())) == ["", ""]
    assert why(1, pool("a", 1), filled("b", 1, lines())) == ["the machines are full", "gives way to a"]
    assert why(1, pool("a", 1, busy()), filled("b", 1, due=True)) == ["", "the machines are full"]
    assert why(1, pool("a", 1), pool("b", 1, idle())) == ["the machines are full", "gives way to a"]
    too_much = "a replica needs 1 CPUs and 0 accelerators, and all machines together have 0.5 CPUs and 0 accelerators"
    assert why(0.5, pool("a", 1)) == [too_much]
    assert why(1, pool("a", 1), pool("b", 1, busy(), min_replicas=1))[0].endswith("always have (min_replicas)")


def test_a_place_is_kept_for_who_needs_more() -> None:
    big = pool("big", 1, needs=Resources(2, 0))
    small = pool("small", 1)
    waits = WaitingSince({"big": NOW - 10, "small": NOW - 5})
    pools = [big, small, pool("c", 1, busy(20)), pool("d", 0)]
    # One CPU is free, and one is not: the big pool has waited longer.
    shares, _ = share(Resources(2, 0), pools, waits, RULES, NOW)
    assert [shares[name].replicas for name in ("big", "small", "c")] == [0, 0, 1]
    shares, _ = share(Resources(2, 0), [big, small], waits, RULES, NOW)
    assert [shares[name].replicas for name in ("big", "small")] == [1, 0]


def test_nobody_is_drained_in_vain() -> None:
    big = pool("big", 1, needs=Resources(2, 1))
    one = replace(pool("one", 1, idle()), needs=Resources(1, 0))
    other = replace(pool("other", 1, busy(5)), needs=Resources(1, 1))
    # The idle one alone does not free enough, and its resources are not the scarcest.
    shares, _ = share(Resources(2, 1), [big, one, other], WaitingSince(), RULES, NOW)
    assert [shares[name].replicas for name in ("one", "other")] == [1, 1]
    cpu_only = replace(pool("cpu", 1, idle()), needs=Resources(1, 0))
    gpu = pool("gpu", 1, needs=Resources(0, 1))
    held = replace(pool("held", 1, idle()), needs=Resources(0, 1))
    shares, _ = share(Resources(1, 1), [gpu, cpu_only, held], WaitingSince(), RULES, NOW)
    assert [shares[name].replicas for name in ("cpu", "held")] == [1, 0]


def test_waiting_begins_when_it_begins() -> None:
    _, waits = share(Resources(1, 0), [pool("a", 1), pool("b", 1, busy())], WaitingSince(), RULES, NOW)
    assert waits.pools == {"a": NOW}
    _, waits = share(Resources(1, 0), [pool("a", 1), pool("b", 1, busy())], waits, RULES, NOW + 5)
    assert waits.pools == {"a": NOW}
    _, waits = share(Resources(1, 0), [pool("a", 1, busy()), pool("b", 1)], waits, RULES, NOW + 9)
    assert waits.pools == {"b": NOW + 9}


def test_more_than_there_is_runs_already() -> None:
    # The operator has made the machine smaller: no replica is started, and none is drained for it.
    pools = [pool("a", 1), pool("b", 2, busy(20), busy(20)), pool("c", 1, busy(20))]
    shares, _ = share(Resources(2, 0), pools, WaitingSince(), RULES, NOW)
    assert [shares[name].replicas for name in "abc"] == [0, 2, 1]


# Whole days


@dataclass
class Engine:
    """A replica of the simulation."""

    pool: str
    ready_at: float
    made_at: float
    ends_at: float = math.inf
    #: The time at which each of its slots becomes free.
    slots: list[float] = field(default_factory=list)


@dataclass
class World:
    """Pools with random demand on machines with this many CPUs, by the real policies, second by second."""

    seed: int
    cpus: int = 2
    start_s: float = 8.0
    rules: SharingRules = RULES
    #: Background work that every pool has all the time.
    backlog: Backlog = field(default_factory=Backlog)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.names = [f"pool-{number}" for number in range(self.rng.randint(2, 5))]
        self.needs = {name: Resources(self.rng.choice([1, 1, 1, 2]), 0) for name in self.names}
        # Seconds between two requests, and the duration of each: from always busy to rarely.
        self.every = {name: 10 ** self.rng.uniform(-0.5, 2.5) for name in self.names}
        self.runs = {name: 10 ** self.rng.uniform(-0.5, 1.3) for name in self.names}
        self.engines: list[Engine] = []
        self.queues: dict[str, list[float]] = {name: [] for name in self.names}
        self.active = dict.fromkeys(self.names, 0.0)
        self.state = dict.fromkeys(self.names, ScalingState())
        self.waits = WaitingSince()
        self.waiting_since: dict[str, float] = {}
        self.longest_wait = 0.0
        self.drains: list[float] = []
        self.served = dict.fromkeys(self.names, 0)

    def run(self, seconds: int) -> None:
        """Run for this time, and check the invariants."""
        for second in range(seconds):
            self.step(float(second))
            used = sum(self.needs[engine.pool].cpus for engine in self.engines)
            assert used <= self.cpus, f"{used} CPUs at {second}"

    def step(self, now: float) -> None:
        self.engines = [engine for engine in self.engines if engine.ends_at > now]
        for name in self.names:
            if self.rng.random() < 1 - math.exp(-1 / self.every[name]):
                self.queues[name].append(now)
                self.active[name] = now
            for engine in self.engines:
                if engine.pool == name and engine.ready_at <= now and engine.ends_at == math.inf:
                    engine.slots = [end for end in engine.slots if end > now]
                    while self.queues[name] and len(engine.slots) < 2:
                        self.queues[name].pop(0)
                        self.served[name] += 1
                        engine.slots.append(now + self.runs[name])
                    if engine.slots:
                        self.active[name] = now
        pools = [self.pool(name, now) for name in self.names]
        shares, self.waits = share(Resources(self.cpus, 0), pools, self.waits, self.rules, now)
        for one in pools:
            self.act(one, shares[one.id].replicas, now)

    def pool(self, name: str, now: float) -> PoolClaim:
        mine = [engine for engine in self.engines if engine.pool == name and engine.ends_at == math.inf]
        ready = [engine for engine in mine if engine.ready_at <= now]
        running = sum(len(engine.slots) for engine in self.engines if engine.pool == name)
        demand = Demand(len(self.queues[name]), running, now - self.active[name], self.runs[name], self.start_s)
        # It fills the slots that requests leave free.
        filled = {id(engine): 2 - len(engine.slots) if self.backlog.dues else 0 for engine in ready}
        backlog = replace(self.backlog, running=sum(filled.values()), ready=len(ready))
        scale = decide(demand, Policy(0, 2, 300, 2), len(mine), self.state[name], now, backlog)
        self.state[name] = scale.state
        held = [
            HeldReplica(
                str(id(engine)),
                len(engine.slots),
                now - (engine.ready_at if engine in ready else engine.made_at),
                engine in ready,
                filled.get(id(engine), 0),
            )
            for engine in mine
        ]
        leaving = sum(engine.pool == name for engine in self.engines) - len(mine)
        # Record how long a pool with requests is without a ready engine.
        if self.queues[name] and not ready:
            self.waiting_since.setdefault(name, now)
            self.longest_wait = max(self.longest_wait, now - self.waiting_since[name])
        else:
            self.waiting_since.pop(name, None)
        claim = PoolClaim(
            name,
            name,
            self.needs[name],
            scale.replicas,
            held,
            leaving,
            0,
            len(self.queues[name]),
            scale.state.idleness.idle_s(now),
            scale.ahead,
        )
        return replace(claim, background=scale.background, due=scale.due)

    def act(self, one: PoolClaim, replicas: int, now: float) -> None:
        mine = [engine for engine in self.engines if engine.pool == one.id and engine.ends_at == math.inf]
        for engine in sorted(mine, key=lambda engine: (len(engine.slots), engine.ready_at <= now, -engine.made_at))[: len(mine) - replicas]:
            # It drains: running requests may end, within ten seconds.
            engine.ends_at = now + min(10.0, max([end - now for end in engine.slots], default=0.0)) + 1
            self.drains.append(now)
        for _ in range(replicas - len(mine)):
            self.engines.append(Engine(one.id, now + self.start_s, now))


@pytest.mark.parametrize("seed", range(10))
def test_a_day_on_full_machines(seed: int) -> None:
    world = World(seed)
    seconds = 3600
    world.run(seconds)
    # A waiting pool is served after each other pool has had its quantum, with its drain and its start.
    bound = len(world.names) * (RULES.quantum_s + 11 + 2 * world.start_s + RULES.starvation_s)
    assert world.longest_wait <= bound
    assert all(world.served.values())
    # No replica is drained before it has run for a while, and on two CPUs there are two at most.
    assert len(world.drains) <= 2 * seconds / (15 + world.start_s) + 2


@pytest.mark.parametrize("due_s", [86_400.0, 1000.0])
@pytest.mark.parametrize("seed", range(3))
def test_background_work_keeps_no_request_waiting_for_a_machine(seed: int, due_s: float) -> None:
    backlog = Backlog((Due(due_s, 5000, 10**6),), tokens_per_s=100.0)
    alone, beside = World(seed), World(seed, backlog=backlog)
    for world in (alone, beside):
        world.run(3600)
    bound = len(beside.names) * (RULES.quantum_s + 11 + 2 * beside.start_s + RULES.starvation_s)
    assert beside.longest_wait <= bound
    assert all(beside.served.values())
    # Requests are served as without background work, except for the time in which its engines give way.
    assert sum(beside.served.values()) >= 0.95 * sum(alone.served.values())


def test_two_busy_pools_take_turns_of_a_quantum() -> None:
    world = World(1, cpus=1)
    world.names = ["a", "b"]
    world.needs = dict.fromkeys(world.names, ONE)
    world.every, world.runs = dict.fromkeys(world.names, 0.5), dict.fromkeys(world.names, 2.0)
    world.queues, world.active = {name: [] for name in world.names}, dict.fromkeys(world.names, 0.0)
    world.state, world.served = dict.fromkeys(world.names, ScalingState()), dict.fromkeys(world.names, 0)
    world.run(3600)
    gaps = [later - earlier for earlier, later in itertools.pairwise(world.drains)]
    assert all(RULES.quantum_s <= gap <= 1.5 * RULES.quantum_s for gap in gaps)
    assert len(gaps) > 30
    assert 0.8 < world.served["a"] / world.served["b"] < 1.25


@pytest.mark.parametrize("seed", range(3))
def test_two_pools_with_a_request_now_and_then_do_not_drain_each_other_for_ever(seed: int) -> None:
    world = World(seed, cpus=1)
    world.names = world.names[:2]
    world.needs = dict.fromkeys(world.names, ONE)
    world.every, world.runs = dict.fromkeys(world.names, 4.0), dict.fromkeys(world.names, 0.5)
    world.run(3600)
    assert len(world.drains) <= 3600 / (15 + world.start_s) + 1
    assert world.longest_wait <= RULES.quantum_s + RULES.starvation_s + 11 + 2 * world.start_s
