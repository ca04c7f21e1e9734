"""The time for which an idle pool keeps an engine: histories, plans and their costs."""

import json
import math
import random

import pytest

from lmaas.control.idleness import BINS, ENOUGH, FULL, MIN_GAP_S, RATIO, Idleness, IdlePlan, IdleTimes, idle_plan

TIMEOUT, START = 300.0, 10.0


def history(*gaps: float) -> IdleTimes:
    found = IdleTimes()
    for gap in gaps:
        found = found.with_gap(gap)
    return found


def cost(plan: IdlePlan, gaps: list[float], start_s: float = START, timeout_s: float = TIMEOUT) -> tuple[float, float]:
    """Return the real cost of this plan on these idle times: engine-seconds, and cold starts."""
    engine_s, cold = 0.0, 0
    for gap in gaps:
        engine_s += min(gap, plan.keep_s)
        if gap <= plan.keep_s:
            continue
        if plan.ready_s is not None and plan.until_s is not None:
            begun = plan.ready_s - plan.ahead_s
            engine_s += max(0.0, min(gap, plan.until_s) - begun)
            if plan.ready_s <= gap <= plan.until_s:
                continue
        cold += 1
    return engine_s, cold


@pytest.mark.parametrize(
    ("gaps", "keep_s", "ahead"),
    [
        pytest.param([], TIMEOUT, False, id="no history: the timeout"),
        pytest.param([3600] * 9, TIMEOUT, False, id="too little history"),
        pytest.param([3] * 50, TIMEOUT, False, id="always busy: nothing is gained by stopping"),
        pytest.param([20 + 5 * number for number in range(45)], TIMEOUT, False, id="the next request comes before the timeout"),
        pytest.param([250] * 50, 10, True, id="by the clock, before the timeout"),
        pytest.param([3600] * 20, 10, True, id="by the clock, long after the timeout"),
        pytest.param([3] * 30 + [3600] * 30, 10, True, id="in bouts, by the clock"),
        pytest.param([3] * 30 + [1000 * 2**i for i in range(6)] * 3, 10, False, id="in bouts, at any time"),
        pytest.param([3] * 90 + [9000], TIMEOUT, False, id="one long one proves nothing"),
        pytest.param([60] * 30 + [40_000 * 1.1**i for i in range(30)], 60, False, id="worth waiting for a minute"),
    ],
)
def test_plans(gaps: list[float], keep_s: float, ahead: bool) -> None:
    plan = idle_plan(history(*gaps), TIMEOUT, START)
    assert plan.keep_s == pytest.approx(keep_s, rel=RATIO - 1, abs=0.1)
    if ahead:
        assert plan.ready_s is not None
        assert plan.until_s is not None
        assert plan.ready_s < gaps[-1] < plan.until_s
    if not ahead and keep_s != 60:
        assert plan.ready_s is None


@pytest.mark.parametrize("seed", range(30))
def test_a_plan_never_costs_more_than_the_timeout_does(seed: int) -> None:
    rng = random.Random(seed)
    modes = [(10 ** rng.uniform(0.5, 4.5), rng.uniform(0.02, 1.0)) for _ in range(rng.randint(1, 3))]
    draw = [lambda mode=mode: mode[0] * math.exp(rng.gauss(0, mode[1])) for mode in modes]
    gaps = [rng.choice(draw)() for _ in range(150)]
    timeout_s, start_s = rng.choice([30.0, 300.0, 3600.0]), rng.uniform(1, 25)
    plan = idle_plan(history(*gaps), timeout_s, start_s)
    plain = IdlePlan(timeout_s)
    mine, default = (cost(found, gaps, start_s, timeout_s) for found in (plan, plain))
    # Engine-seconds, and a timeout's worth of them for each cold start; the bins are 2 % wide.
    assert mine[0] + timeout_s * mine[1] <= 1.1 * (default[0] + timeout_s * default[1])
    for gap in gaps:
        assert cost(plan, [gap], start_s)[0] <= timeout_s + 1e-6, "no idle time costs more than the timeout"
    if plan.gaps:
        assert plan.idle_engine_s == pytest.approx(mine[0] / len(gaps), rel=0.35, abs=3)
        assert plan.cold_share == pytest.approx(mine[1] / len(gaps), abs=0.15)


def test_what_is_planned_for_the_clock_saves_most_of_it() -> None:
    gaps = [3600.0] * 40
    plan = idle_plan(history(*gaps), TIMEOUT * 10, START)
    assert cost(plan, gaps)[1] == 0
    assert cost(plan, gaps)[0] < 0.5 * 3000 * 40


def test_bins() -> None:
    assert history(1.9).total == 0
    assert history(math.inf, math.nan, -5).total == 0
    assert history(2.0, 2.03, 2.05).bins == ((0, 2), (1, 1))
    assert history(10**9).bins == ((BINS - 1, 1),)
    assert MIN_GAP_S * RATIO**BINS >= 2 * 86400


def test_old_habits_fade() -> None:
    found = history(*[20.0] * 1000)
    assert found.total <= FULL
    found = history(*[20.0] * 1000, *[3600.0] * 400)
    plan = idle_plan(found, TIMEOUT, START)
    assert plan.keep_s < 30


@pytest.mark.parametrize(
    "stored", [[1.0], None, "x", [["x", 1]], [[1, math.nan]], [[-1, 1]], [[BINS, 1]], [[1, 0]], [[1, math.inf]], [[1, 1, 1]]]
)
def test_what_was_stored_and_is_not_a_history_is_none(stored: object) -> None:
    assert IdleTimes.of(stored) == IdleTimes()


def test_what_was_stored_comes_back() -> None:
    found = history(3, 40, 500, 5000)
    assert IdleTimes.of(json.loads(json.dumps(found.bins))) == found


def test_only_idle_times_are_remembered() -> None:
    idleness, now = Idleness(), 1000.0
    # For each second: the time since the last request, and whether one runs.
    story = [(0.2, True), (0.2, True), (0.4, False), (50.4, False), (0.1, True), (0.1, True), (6.0, True), (0.1, True)]
    for step, (idle_s, busy) in enumerate(story):
        now += 50 if step == 3 else 1
        idleness = idleness.observed(now, idle_s, busy, TIMEOUT, START)
    assert idleness.times == history(51.3)


def test_a_request_between_two_looks_ends_an_idle_time() -> None:
    idleness = Idleness()
    for now, idle_s in [(100.0, 20.0), (101.0, 21.0), (102.0, 0.5), (110.0, 8.5)]:
        idleness = idleness.observed(now, idle_s, False, TIMEOUT, START)
    assert idleness.times == history(21.5)


def test_a_plan_holds_while_the_pool_is_idle() -> None:
    idleness = Idleness(history(*[3600.0] * int(ENOUGH * 2))).observed(0.0, 0.0, True, TIMEOUT, 20.0)
    plan = idleness.plan
    assert plan is not None
    assert plan.ahead_s == 20.0
    assert idleness.observed(10.0, 10.0, False, TIMEOUT, 5.0).plan is plan
    assert idleness.observed(10.0, 10.0, False, TIMEOUT * 2, 5.0).plan is not plan
