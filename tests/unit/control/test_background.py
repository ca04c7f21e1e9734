"""The engines for background work: by its deadlines, by its amount, and for as long as it lasts."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from lmaas.control.autoscaler import Demand, Policy, Scale, ScalingState, decide
from lmaas.control.background import (
    DEFAULT_TOKENS_PER_S,
    ENOUGH_ENGINE_S,
    MARGIN_S,
    PAUSE_S,
    QUIET_S,
    STALLED_S,
    BackgroundState,
    Backlog,
    Due,
    Throughput,
)
from tests.unit.control.test_autoscaler import after

NOW = 10_000.0
DAY_S = 86_400.0
POLICY = Policy(min_replicas=0, max_replicas=4, idle_timeout_s=300, slots=4, worth_starts=10)
#: A start takes 18 s, so 200 s of work justify one.
IDLE = Demand(0, 0, 10_000.0, start_s=18)
NEW = ScalingState()


def work(*dues: tuple[float, int, int], rate: float | None = 100.0, **facts: Any) -> Backlog:
    """Return work of (due in seconds, lines, tokens)."""
    return Backlog(tuple(Due(*due) for due in dues), tokens_per_s=rate, **facts)


@pytest.mark.parametrize(
    ("backlog", "expected", "reason"),
    [
        pytest.param(work(), 0, "idle", id="none"),
        pytest.param(work((DAY_S, 5, 500)), 0, "5 lines of background work may run when an engine is warm", id="little"),
        pytest.param(work((DAY_S, 1, 500)), 0, "3 min more of work has gathered, or in 23.5 h", id="what it waits for"),
        pytest.param(work((DAY_S, 50, 19_999)), 0, "may run when an engine is warm", id="not quite enough"),
        pytest.param(work((DAY_S, 1000, 20_000)), 1, "1,000 lines of background work would keep an engine busy for 3 min", id="enough"),
        pytest.param(work((DAY_S, 10, 12_000), (DAY_S * 2, 10, 8_000)), 1, "which pays for its start", id="enough of two batches"),
        pytest.param(work((DAY_S, 5000, 6_700_000)), 1, "pays for its start", id="one engine does it in time"),
        pytest.param(work((MARGIN_S + 100, 1, 500)), 0, "may run", id="shortly before the latest start"),
        pytest.param(work((MARGIN_S + 20, 1, 500)), 1, "a deadline requires 1 replica now for 1 line of background work", id="a deadline"),
        pytest.param(work((60, 1, 500)), 1, "a deadline requires 1 replica now", id="a deadline that is close"),
        pytest.param(work((18, 1, 500)), 0, "may run", id="one that no start could meet"),
        pytest.param(work((-5, 1, 500)), 0, "may run", id="one that has passed"),
        pytest.param(work((DAY_S, 50_000, 20_000_000)), 3, "a deadline requires 3 replicas now", id="more than one engine can do"),
        pytest.param(work((DAY_S, 50_000, 90_000_000)), 4, "a deadline requires", id="no more than allowed"),
        pytest.param(work((DAY_S, 8, 90_000_000)), 2, "a deadline requires 2 replicas", id="no more than there are lines for"),
        pytest.param(work((DAY_S, 50_000, 90_000_000), rate=None), 1, "a deadline requires 1 replica", id="one shows first what it does"),
        pytest.param(work((7200, 500, 500_000), (DAY_S, 9, 9)), 2, "a deadline requires 2 replicas", id="the first deadline"),
        pytest.param(work((7200, 4, 4), (10_000, 500, 1_200_000)), 2, "a deadline requires 2 replicas", id="the second deadline"),
    ],
)
def test_from_zero(backlog: Backlog, expected: int, reason: str) -> None:
    scale = decide(IDLE, POLICY, 0, NEW, NOW, backlog)
    assert (scale.replicas, scale.background) == (expected, expected), scale.reason
    assert reason in scale.reason
    assert scale.due == ("deadline requires" in scale.reason)


@pytest.mark.parametrize(
    ("demand", "current", "backlog", "expected", "background", "reason"),
    [
        pytest.param(IDLE, 1, work((DAY_S, 1, 5), running=1, ready=1), 1, 1, "kept for 2 lines of background work", id="it runs"),
        pytest.param(IDLE, 1, work((DAY_S, 1, 5)), 1, 1, "kept for 1 line", id="it starts"),
        pytest.param(IDLE, 1, work(running=3, ready=1), 1, 1, "kept for 3 lines", id="only lines that run"),
        pytest.param(IDLE, 3, work((DAY_S, 999, 9999)), 1, 1, "kept for 999 lines", id="one is enough"),
        pytest.param(Demand(0, 1, 0), 1, work((DAY_S, 1, 5)), 1, 0, "1.0 requests at once", id="it rides on an engine that is needed"),
        pytest.param(Demand(0, 0, 9), 1, work((DAY_S, 1, 5)), 1, 0, "kept warm until 300 s", id="or is warm anyway"),
        pytest.param(Demand(0, 4, 0), 1, work((DAY_S, 9, 9999)), 1, 0, "4.0 requests at once", id="that has no room for it now"),
        pytest.param(Demand(0, 4, 0), 1, work((900, 9, 9)), 2, 1, "a deadline requires 2 replicas", id="until the deadline is close"),
        pytest.param(Demand(0, 2, 0), 1, work((900, 9, 9)), 1, 0, "2.0 requests at once", id="but there is room beside the requests"),
        pytest.param(Demand(0, 2, 0), 1, work((900, 99, 40_000)), 2, 1, "a deadline requires 2 replicas", id="too little room"),
        pytest.param(Demand(1, 0, 0), 0, work((DAY_S, 9, 9)), 1, 0, "1 requests wait", id="requests start engines as ever"),
    ],
)
def test_beside_interactive_requests(demand: Demand, current: int, backlog: Backlog, expected: int, background: int, reason: str) -> None:
    scale = decide(demand, POLICY, current, NEW, NOW, backlog)
    assert (scale.replicas, scale.background) == (expected, background), scale.reason
    assert reason in scale.reason


def test_background_work_is_neither_demand_nor_a_panic_nor_an_idle_time() -> None:
    huge = work((DAY_S, 50_000, 500_000), queued=5000, running=4, ready=1)
    with_work = without = NEW
    for second in range(400):
        demand = Demand(0, second % 3, 0.0 if second % 3 else 1.0, start_s=18)
        scale = decide(demand, POLICY, 1, with_work, NOW + second, huge)
        plain = decide(demand, POLICY, 1, without, NOW + second)
        assert (scale.replicas, scale.reason) == (plain.replicas, plain.reason)
        with_work, without = scale.state, plain.state
    assert replace(with_work, background=BackgroundState()) == without
    assert with_work.panic_at is None


def test_bounds_hold() -> None:
    late = work((900, 5000, 5_000_000))
    assert decide(IDLE, replace(POLICY, max_replicas=0), 0, NEW, NOW, late).replicas == 0
    assert decide(IDLE, replace(POLICY, min_replicas=2), 2, NEW, NOW, work()).replicas == 2
    assert decide(IDLE, replace(POLICY, min_replicas=2), 2, NEW, NOW, work((DAY_S, 9, 99))).background == 0


def test_an_operator_may_start_an_engine_for_any_work() -> None:
    assert decide(IDLE, replace(POLICY, worth_starts=0), 0, NEW, NOW, work((DAY_S, 1, 1))).replicas == 1


def test_an_engine_starts_for_work_that_has_waited_for_long() -> None:
    patient, hurried = POLICY, replace(POLICY, max_wait_s=30)
    backlog = replace(work((DAY_S, 1, 1)), waited_s=29.0)
    assert decide(IDLE, hurried, 0, NEW, NOW, backlog).replicas == 0
    assert "in 1 s, when they have waited for long" in decide(IDLE, hurried, 0, NEW, NOW, backlog).reason
    late = replace(backlog, waited_s=30.0)
    scale = decide(IDLE, hurried, 0, NEW, NOW, late)
    assert (scale.replicas, scale.reason) == (1, "after 30 s without an engine, one starts for 1 line of background work")
    assert decide(IDLE, patient, 0, NEW, NOW, late).replicas == 0


def test_a_start_ahead_of_a_request_may_be_used() -> None:
    state = after(*[3600] * 20)
    demand = Demand(0, 0, 3520.0)
    alone = decide(demand, POLICY, 0, state, NOW)
    assert (alone.replicas, alone.ahead) == (1, True)
    beside = decide(demand, POLICY, 0, state, NOW, work((DAY_S, 9, 9)))
    assert (beside.replicas, beside.ahead, beside.background) == (1, True, 0)


class Pool:
    """A pool without requests, second by second."""

    def __init__(self, current: int = 0) -> None:
        self.now, self.current, self.state = NOW, current, NEW

    def tick(self, backlog: Backlog, seconds: float = 1.0) -> Scale:
        self.now += seconds
        scale = decide(replace(IDLE, idle_s=self.now), POLICY, self.current, self.state, self.now, backlog)
        self.current, self.state = scale.replicas, scale.state
        return scale


def test_an_engine_stops_when_its_work_is_done() -> None:
    pool = Pool()
    assert pool.tick(work((DAY_S, 1000, 20_000))).replicas == 1
    assert pool.tick(work((DAY_S, 3, 20), running=3, ready=1)).replicas == 1
    assert pool.tick(work(ready=1), QUIET_S / 2).reason == "background work has just ended"
    assert pool.current == 1
    scale = pool.tick(work(ready=1), QUIET_S)
    assert (scale.replicas, scale.reason) == (0, "idle for 300 s (the idle timeout)")


def test_an_engine_of_a_pool_without_a_request_stops_when_its_work_is_done() -> None:
    state, current = NEW, 0
    for second, backlog in [(0, work()), (5, work((900, 1000, 20_000))), (40, work((900, 3, 20), running=3, ready=1)), (50, work(ready=1))]:
        scale = decide(replace(IDLE, idle_s=None), POLICY, current, state, NOW + second, backlog)
        state, current = scale.state, scale.replicas
    assert current == 0


def test_a_further_replica_is_not_started_again_and_again() -> None:
    pool, tokens, due_s = Pool(), 20_000_000.0, DAY_S
    counts = []
    while tokens > 0:
        scale = pool.tick(work((due_s, 5000, int(tokens)), running=4 * pool.current, ready=pool.current), 60)
        counts.append(scale.replicas)
        tokens, due_s = tokens - 60 * 100 * pool.current, due_s - 60
    assert due_s > 0  # all done in time
    changes = [(before, after) for before, after in pairwise(counts) if before != after]
    assert all(after < before for before, after in changes), changes
    assert counts[0] == 3


def test_work_that_does_not_run_keeps_no_engine() -> None:
    pool, backlog = Pool(), work((DAY_S, 1000, 20_000))
    assert pool.tick(backlog).replicas == 1
    assert pool.tick(backlog, 600).replicas == 1, "an engine may start slowly"
    ready = replace(backlog, ready=1)
    assert pool.tick(ready).replicas == 1
    assert pool.tick(ready, STALLED_S - 1).replicas == 1
    scale = pool.tick(ready, 2)
    assert scale.replicas == 0
    assert "no line has run for 60 s on a ready engine; none is kept for them for 10 min" in scale.reason
    assert pool.tick(work((900, 1000, 20_000)), PAUSE_S - 5).replicas == 0, "not even for a deadline"
    assert pool.tick(backlog, 10).replicas == 1


def test_work_that_waits_for_requests_to_end_has_not_stalled() -> None:
    backlog, state = work((DAY_S, 9, 9), ready=1), NEW
    for second in range(0, 600, 10):
        scale = decide(Demand(0, 4, 0), POLICY, 1, state, NOW + second, backlog)
        state = scale.state
    assert decide(IDLE, POLICY, 1, state, NOW + 600, backlog).replicas == 1


def test_without_a_job_runner_no_engine_starts_or_stays() -> None:
    late = work((900, 9, 99), has_runner=False)
    for current in (0, 1):
        scale = decide(IDLE, POLICY, current, NEW, NOW, late)
        assert scale.replicas == 0
        assert scale.reason.endswith("9 lines of background work wait for a job runner (`lmaas jobs`), and none is there")
    assert decide(IDLE, POLICY, 1, NEW, NOW, replace(late, running=1)).replicas == 1


class TestThroughput:
    def seen(self, per_s: float, *, running: int, ready: int = 1, seconds: int = 200, first: Throughput | None = None) -> Throughput:
        """Return the observations of engines that generate this many tokens a second."""
        seen = first or Throughput()
        for second in range(seconds):
            seen = seen.observed(NOW + second, {"a": int(per_s * second)}, running=running, ready=ready, slots=4)
        return seen

    def test_it_is_unknown_at_first(self) -> None:
        assert Throughput().tokens_per_s is None
        assert Backlog().rate == DEFAULT_TOKENS_PER_S

    def test_it_is_what_a_replica_does_with_most_of_its_slots(self) -> None:
        assert self.seen(500, running=6, ready=2).tokens_per_s == pytest.approx(250, rel=0.02)

    @pytest.mark.parametrize("running", [0, 1, 3])
    def test_engines_that_do_little_of_it_show_nothing(self, running: int) -> None:
        assert self.seen(500, running=running, ready=2).tokens_per_s is None

    def test_batches_that_come_and_go_are_no_work(self) -> None:
        seen = Throughput()
        for second in range(200):
            # Each lasts for 50 s, and the one before stays for some time.
            old, new = divmod(second, 50)
            done = {f"batch_{old}": 100 * new} | ({f"batch_{old - 1}": 5000} if old and new < 10 else {})
            seen = seen.observed(NOW + second, done, running=4, ready=1, slots=4)
        assert seen.tokens_per_s == pytest.approx(100, rel=0.02)

    def test_the_time_until_the_first_lines_end_does_not_count(self) -> None:
        seen = Throughput()
        for second in range(700):
            # Four at a time, which end together.
            seen = seen.observed(NOW + second, {"a": 20_000 * (second // 200)}, running=4, ready=1, slots=4)
            assert seen.tokens_per_s is None or second >= 200 + ENOUGH_ENGINE_S - 1
        assert seen.tokens_per_s == pytest.approx(100, rel=0.3)

    def test_it_follows_changes(self) -> None:
        first = Throughput.of(1000.0)
        assert first.tokens_per_s == 1000.0
        assert self.seen(10, running=4, seconds=3000, first=first).tokens_per_s == pytest.approx(10, rel=0.1)

    def test_it_needs_some_time(self) -> None:
        assert self.seen(500, running=4, seconds=int(ENOUGH_ENGINE_S)).tokens_per_s is None
        assert self.seen(500, running=4, seconds=int(ENOUGH_ENGINE_S) + 3).tokens_per_s is not None

    @pytest.mark.parametrize("stored", [None, "fast", True, -1, 0, float("inf"), float("nan"), [1]])
    def test_what_cannot_be_read_is_unknown(self, stored: object) -> None:
        assert Throughput.of(stored).tokens_per_s is None
