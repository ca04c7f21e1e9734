"""The autoscaler's decisions."""

import itertools
import random
from dataclasses import replace

import pytest

from lmaas.control.autoscaler import BACKOFF_MAX_S, STABLE_S, Demand, Policy, Sample, Scale, ScalingState, backoff_s, decide
from lmaas.control.idleness import Idleness, IdleTimes

NOW = 10_000.0
POLICY = Policy(min_replicas=0, max_replicas=4, idle_timeout_s=300, slots=4)
BUSY, IDLE = 0.0, 1000.0


def watched(load: int, needed: int, seconds: float = STABLE_S) -> ScalingState:
    """Return the memory of a pool that has had this demand for this long."""
    return ScalingState(tuple(Sample(NOW - second, load, needed) for second in range(int(seconds), 0, -1)))


NEW = ScalingState()


@pytest.mark.parametrize(
    ("queued", "running", "current", "memory", "expected", "reason"),
    [
        pytest.param(1, 0, 0, NEW, 1, "1 requests wait and there is no replica", id="from zero, at once"),
        pytest.param(5, 0, 0, NEW, 2, "5 requests wait", id="from zero as many as there is work for"),
        pytest.param(999, 0, 0, NEW, 4, "no more than max_replicas (4)", id="no more than allowed"),
        pytest.param(0, 4, 1, watched(4, 1), 1, "4.0 requests at once", id="as it should be"),
        pytest.param(1, 4, 1, watched(2, 1), 1, "2.0 requests at once", id="a moment over its slots"),
        pytest.param(1, 4, 1, watched(5, 1), 2, "5.0 requests at once", id="a minute over its slots"),
        pytest.param(8, 4, 1, watched(1, 1), 1, "1.2 requests at once", id="a burst that is over before another could start"),
        pytest.param(60, 4, 1, watched(4, 1), 4, "panic: 14 requests at once, and 1 x 4 slots", id="a panic that has just begun"),
        pytest.param(60, 4, 1, watched(64, 1, 5), 4, "panic: 64 requests at once, and 1 x 4 slots", id="a panic"),
        pytest.param(0, 1, 3, watched(1, 1), 1, "no more were needed for 60 s", id="down after the window"),
        pytest.param(0, 1, 3, watched(1, 1, 50), 3, "watching for 60 s", id="not before it"),
        pytest.param(0, 1, 3, NEW, 3, "watching for 60 s", id="a controller that comes anew watches first"),
        pytest.param(0, 1, 4, watched(9, 3), 3, "no more were needed", id="down to what was needed"),
        pytest.param(0, 1, 3, replace(watched(1, 1), panic_at=NOW - 59), 3, "after a panic", id="not after a panic"),
        pytest.param(0, 1, 3, replace(watched(1, 1), panic_at=NOW - 60), 1, "no more were needed", id="long after a panic"),
    ],
)
def test_with_work(queued: int, running: int, current: int, memory: ScalingState, expected: int, reason: str) -> None:
    scale = decide(Demand(queued, running, BUSY), POLICY, current, memory, NOW)
    assert scale.replicas == expected, scale.reason
    assert reason in scale.reason


@pytest.mark.parametrize(("start_s", "expected"), [(0.5, 4), (5, 4), (20, 2), (60, 1)])
def test_a_queue_that_takes_longer_than_a_start(start_s: float, expected: int) -> None:
    scale = decide(Demand(8, 4, BUSY, 20.0, start_s), POLICY, 1, watched(4, 1), NOW)
    assert scale.replicas == expected
    assert (f"the queue would take 40 s, a start {start_s if start_s >= 10 else float(start_s)} s" in scale.reason) == (expected > 1)


@pytest.mark.parametrize(
    ("idle_s", "current", "expected", "reason"),
    [
        (IDLE, 0, 0, "idle"),
        (10, 0, 0, "idle"),  # replicas that were lost or given away while idle do not come back by themselves
        (10, 1, 1, "kept warm until 300 s after the last request (the idle timeout)"),
        (299, 1, 1, "kept warm until 300 s"),
        (300, 1, 0, "idle for 300 s (the idle timeout)"),
        (59, 3, 3, "kept warm"),
        (60, 3, 1, "one stays warm"),
        (300, 3, 0, "idle for 300 s"),
    ],
)
def test_without_work(idle_s: float, current: int, expected: int, reason: str) -> None:
    # The pool's own memory of its last request counts: a controller's may be new.
    scale = decide(Demand(0, 0, idle_s), POLICY, current, NEW, NOW)
    assert scale.replicas == expected
    assert reason in scale.reason


UNKNOWN = Demand(0, 0, None)


@pytest.mark.parametrize("seconds", [1.0, POLICY.idle_timeout_s - 1])
def test_an_engine_that_runs_when_nothing_is_known_is_kept_for_the_idle_timeout(seconds: float) -> None:
    first = decide(UNKNOWN, POLICY, 1, NEW, NOW)
    assert first.replicas == 1
    assert decide(UNKNOWN, POLICY, 1, first.state, NOW + seconds).replicas == 1
    assert decide(UNKNOWN, POLICY, 1, first.state, NOW + POLICY.idle_timeout_s).replicas == 0


def test_the_last_request_is_known_although_the_scheduler_has_lost_its_memory() -> None:
    before = decide(Demand(0, 0, 100.0), POLICY, 1, NEW, NOW)
    after = decide(UNKNOWN, POLICY, 1, before.state, NOW + 100)
    assert after.replicas == 1
    assert after.state.idleness.idle_s(NOW + 100) == 200
    assert decide(UNKNOWN, POLICY, 1, after.state, NOW + 200).replicas == 0


def test_a_pool_without_a_request_is_not_kept_warm_and_has_no_idle_time() -> None:
    first = decide(UNKNOWN, POLICY, 0, NEW, NOW)
    assert first.replicas == 0
    # Another process has started an engine.
    second = decide(UNKNOWN, POLICY, 1, first.state, NOW + 1)
    assert (second.replicas, second.reason) == (0, "no request yet")
    third = decide(Demand(1, 0, 0.0), POLICY, 0, second.state, NOW + 100)
    assert third.replicas == 1
    assert third.state.idleness.times == NEW.idleness.times


@pytest.mark.parametrize(
    ("low", "high", "queued", "idle_s", "current", "replicas"),
    [
        (1, 3, 0, IDLE, 0, 1),
        (1, 3, 0, IDLE, 1, 1),
        (2, 1, 0, IDLE, 0, 2),
        (2, 2, 100, BUSY, 0, 2),
        (0, 0, 100, BUSY, 0, 0),
        pytest.param(0, 1, 100, BUSY, 3, 1, id="the operator has lowered the bound"),
        pytest.param(0, 0, 100, BUSY, 1, 0, id="to nothing"),
        pytest.param(0, 0, 0, 1.0, 1, 0, id="to nothing, while idle"),
    ],
)
def test_bounds(low: int, high: int, queued: int, idle_s: float, current: int, replicas: int) -> None:
    assert decide(Demand(queued, 0, idle_s), Policy(low, high, 300, 4), current, NEW, NOW).replicas == replicas


def after(*gaps: float) -> ScalingState:
    """Return a pool with these past idle times."""
    history = IdleTimes()
    for gap in gaps:
        history = history.with_gap(gap)
    return ScalingState(idleness=Idleness(history))


def test_a_pool_whose_next_request_comes_long_after_the_timeout_is_stopped_early_and_started_ahead() -> None:
    memory, current, seen = after(*[3600] * 20), 1, []
    for second in range(0, 4800, 5):
        scale = decide(Demand(0, 0, float(second)), POLICY, current, memory, NOW + second)
        if scale.replicas != current:
            seen.append((second, scale.replicas, scale.ahead))
        current, memory = scale.replicas, scale.state
    [(stopped, _, _), (started, _, ahead), (gone, _, _)] = seen
    assert 10 <= stopped < 300
    assert ahead
    assert 2000 < started < 3600 - 20
    assert gone > 3600
    assert "after the last 20 idle times" not in scale.reason


def test_a_pool_that_is_woken_before_the_timeout_stays() -> None:
    rng = random.Random(1)
    memory, current = after(*(rng.uniform(20, 250) for _ in range(50))), 1
    for second in range(0, 250, 10):
        scale = decide(Demand(0, 0, float(second)), POLICY, current, memory, NOW + second)
        assert scale.replicas == 1, second
        memory = scale.state


def run(load: list[int], start: int = 0, policy: Policy = POLICY) -> list[int]:
    """Return the number of replicas by second, for a demand by second that is met as far as there are slots, by replicas that are ready at
    once."""
    current, memory, seen, active = start, NEW, [], 0
    for second, work in enumerate(load):
        active = second if work else active
        running = min(work, current * policy.slots)
        scale = decide(Demand(work - running, running, float(second - active)), policy, current, memory, NOW + second)
        current, memory = scale.replicas, scale.state
        seen.append(current)
    return seen


def test_a_day_in_the_life_of_a_pool() -> None:
    seen = run([0] * 5 + [3] * 60 + [60] * 60 + [4] * 200 + [0] * 400)
    assert seen[:5] == [0] * 5
    assert set(seen[5:65]) == {1}
    assert max(seen) == 4
    assert seen.index(4) - 65 < 30, "the flood is met within seconds"
    assert set(seen[125:180]) == {4}, "the replicas stay for a minute, in case the flood returns"
    assert set(seen[260:324]) == {1}
    assert seen[-1] == 0
    assert seen.index(0, 100) - 325 in range(295, 305)


def test_a_pool_that_flickers_neither_flaps_nor_keeps_more_than_it_needs() -> None:
    seen = run([second % 20 // 10 for second in range(420)], start=3)
    assert seen[-1] == 1
    assert sum(before != after for before, after in itertools.pairwise(seen)) == 1


def test_a_decision_says_what_is_done_when_idle() -> None:
    scale: Scale = decide(Demand(1, 0, 0), POLICY, 0, NEW, NOW)
    assert (scale.idle_plan.keep_s, scale.idle_plan.ready_s, scale.idle_plan.gaps) == (300, None, 0)


@pytest.mark.parametrize(("failures", "seconds"), [(0, 0), (1, 5), (2, 10), (3, 20), (6, 160), (7, 300), (50, 300)])
def test_backoff(failures: int, seconds: float) -> None:
    assert backoff_s(failures) == seconds <= BACKOFF_MAX_S


def test_backoff_has_no_end() -> None:
    assert backoff_s(5000) == BACKOFF_MAX_S
