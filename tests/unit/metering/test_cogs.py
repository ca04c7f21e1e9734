"""Engine time is apportioned to the last millisecond, and its cost to the last picodollar."""

from dataclasses import replace
from datetime import date, timedelta
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmaas.metering.cogs import MS_PER_HOUR, Line, allocate, apportion, report, rounded
from lmaas.states import Dimension, EnginePhase, WorkClass
from lmaas.store.engine_time import Charge, Consumer, EngineTime, Work

STARTING, LOADING, BUSY, BACKGROUND, IDLE = EnginePhase
MONDAY = date(2026, 11, 23)
TUESDAY, WEDNESDAY, SUNDAY = MONDAY + timedelta(1), MONDAY + timedelta(2), MONDAY - timedelta(1)
ACME_BOT = Consumer("ten_a", "acme", "base", "bot")
ACME = Consumer("ten_a", "acme", "base", None)
GLOBEX = Consumer("ten_g", "globex", "base", "bot")
NOBODY = Consumer(None, None, "base", None, None)
#: The background work of the same tenants.
ACME_LATER, GLOBEX_LATER = replace(ACME, work=WorkClass.BACKGROUND), replace(GLOBEX, work=WorkClass.BACKGROUND)


def spent(phase: EnginePhase, ms: int, day: date = MONDAY, replica: str = "rep_1", price: int = 0) -> EngineTime:
    return EngineTime(replica, "base", day, phase, price, ms)


def work(consumer: Consumer, run_ms: int, load_ms: int = 0, day: date = MONDAY, replica: str = "rep_1") -> Work:
    return Work(replica, day, consumer, run_ms, load_ms)


def in_phases(lines: dict[tuple[date, Consumer], Line]) -> dict[tuple[date, Consumer], dict[EnginePhase, int]]:
    return {key: {phase: ms for phase, ms in line.ms.items() if ms} for key, line in lines.items()}


@pytest.mark.parametrize(
    ("total", "weights", "parts"),
    [
        (10, {"a": 1}, {"a": 10}),
        (10, {"a": 1, "b": 1, "c": 1}, {"a": 4, "b": 3, "c": 3}),
        (10, {"c": 1, "b": 1, "a": 1}, {"c": 4, "b": 3, "a": 3}),
        (11, {"a": 1, "b": 1, "c": 1}, {"a": 4, "b": 4, "c": 3}),
        (100, {"a": 1, "b": 2, "c": 5}, {"a": 13, "b": 25, "c": 62}),
        (1, {"a": 1, "b": 2}, {"a": 0, "b": 1}),
        (0, {"a": 1, "b": 2}, {"a": 0, "b": 0}),
        (5, {"a": 0, "b": 2}, {"a": 0, "b": 5}),
    ],
)
def test_largest_remainder(total: int, weights: dict[str, int], parts: dict[str, int]) -> None:
    assert apportion(total, weights) == parts


@pytest.mark.parametrize(
    ("values", "divisor", "shown"),
    [
        ([], 10, []),
        ([5], 10, [1]),
        ([4], 10, [0]),
        ([5, 5], 10, [1, 0]),
        ([14, 14, 14], 10, [2, 1, 1]),
        ([9, 9, 9], 10, [1, 1, 1]),
        ([14, 20, 16], 10, [1, 2, 2]),
    ],
)
def test_rounded_lines_add_up_to_the_rounded_sum(values: list[int], divisor: int, shown: list[int]) -> None:
    assert rounded(values, divisor) == shown


@pytest.mark.parametrize(
    ("times", "work", "expected"),
    [
        pytest.param(
            [spent(STARTING, 300), spent(BUSY, 90), spent(IDLE, 600)],
            [work(ACME, 100), work(GLOBEX, 200)],
            {(MONDAY, ACME): {STARTING: 100, BUSY: 30, IDLE: 200}, (MONDAY, GLOBEX): {STARTING: 200, BUSY: 60, IDLE: 400}},
            id="by run time",
        ),
        pytest.param(
            [spent(LOADING, 100)],
            [work(ACME, 1000), work(ACME_BOT, 10, load_ms=30), work(GLOBEX, 10, load_ms=10)],
            {(MONDAY, ACME_BOT): {LOADING: 75}, (MONDAY, GLOBEX): {LOADING: 25}, (MONDAY, ACME): {}},
            id="loading by the wait for it",
        ),
        pytest.param([spent(LOADING, 100)], [work(ACME, 1)], {(MONDAY, ACME): {LOADING: 100}}, id="loading that nobody waited for"),
        pytest.param(
            [spent(BACKGROUND, 100), spent(IDLE, 40), spent(STARTING, 10)],
            [work(ACME, 1), work(ACME_LATER, 300), work(GLOBEX_LATER, 100)],
            {
                (MONDAY, ACME): {IDLE: 40, STARTING: 10},
                (MONDAY, ACME_LATER): {BACKGROUND: 75},
                (MONDAY, GLOBEX_LATER): {BACKGROUND: 25},
            },
            id="background work fills an engine that requests keep warm",
        ),
        pytest.param(
            [spent(BACKGROUND, 100), spent(IDLE, 40), spent(STARTING, 10)],
            [work(ACME_LATER, 300), work(GLOBEX_LATER, 100)],
            {
                (MONDAY, ACME_LATER): {BACKGROUND: 75, IDLE: 30, STARTING: 8},
                (MONDAY, GLOBEX_LATER): {BACKGROUND: 25, IDLE: 10, STARTING: 2},
            },
            id="an engine for background work alone",
        ),
        pytest.param(
            # 15 slots of background work all the time, and one request in a tenth of it.
            [spent(BUSY, 100), spent(BACKGROUND, 900)],
            [work(ACME, 100), work(GLOBEX_LATER, 15_000)],
            {(MONDAY, ACME): {BUSY: 6}, (MONDAY, GLOBEX_LATER): {BUSY: 94, BACKGROUND: 900}},
            id="both at once",
        ),
        pytest.param(
            [spent(LOADING, 100)],
            [work(ACME, 10, load_ms=10), work(ACME_LATER, 10, load_ms=30)],
            {(MONDAY, ACME): {LOADING: 25}, (MONDAY, ACME_LATER): {LOADING: 75}},
            id="loading for background work",
        ),
        pytest.param([spent(BACKGROUND, 9)], [work(ACME, 1)], {(MONDAY, ACME): {BACKGROUND: 9}}, id="background work that is not recorded"),
        pytest.param([spent(STARTING, 5), spent(IDLE, 7)], [], {(MONDAY, NOBODY): {STARTING: 5, IDLE: 7}}, id="without a request"),
        pytest.param(
            [spent(IDLE, 5)], [work(ACME, 0), work(GLOBEX, 9, replica="rep_2")], {(MONDAY, NOBODY): {IDLE: 5}}, id="used elsewhere only"
        ),
        pytest.param(
            [spent(STARTING, 8, SUNDAY), spent(BUSY, 6), spent(IDLE, 4, TUESDAY), spent(BUSY, 2, WEDNESDAY)],
            [work(ACME, 1, day=MONDAY), work(GLOBEX, 1, day=WEDNESDAY)],
            {
                (SUNDAY, ACME): {STARTING: 8},
                (MONDAY, ACME): {BUSY: 6},
                (TUESDAY, ACME): {IDLE: 4},
                (WEDNESDAY, GLOBEX): {BUSY: 2},
            },
            id="days without work follow the last that had some, or the first",
        ),
    ],
)
def test_who_used_what(times: list[EngineTime], work: list[Work], expected: dict[Any, Any]) -> None:
    found = in_phases(allocate(times, work))
    assert {key: phases for key, phases in found.items() if phases} == {key: phases for key, phases in expected.items() if phases}


def test_a_day_that_has_passed_does_not_change() -> None:
    times = [spent(STARTING, 30), spent(IDLE, 70), spent(IDLE, 50, TUESDAY)]
    before = allocate(times, [work(ACME, 10)])
    after = allocate([*times, spent(BUSY, 1000, WEDNESDAY)], [work(ACME, 10), work(GLOBEX, 999, day=WEDNESDAY)])
    assert {key: line for key, line in after.items() if key[0] != WEDNESDAY} == before


def test_cost_charge_and_margin() -> None:
    # An engine-hour at 0.36 $ is 0.1 micro-dollars a millisecond.
    times = [spent(BUSY, 300, price=360_000), spent(IDLE, 100, replica="rep_2", price=720_000)]
    charges = [Charge(MONDAY, ACME_BOT, 40_000_000), Charge(TUESDAY, GLOBEX, 500_000)]
    found = report(times, [work(ACME_BOT, 1), work(GLOBEX, 2)], charges)
    assert [(line.day, line.consumer, line.cost_microusd, line.charge_microusd) for line in found.lines] == [
        (TUESDAY, replace(GLOBEX, work=None), 0, 1),
        (MONDAY, replace(ACME_BOT, work=None), 10, 40),
        (MONDAY, replace(GLOBEX, work=None), 20, 0),
        (MONDAY, NOBODY, 20, 0),
    ]
    assert [(line.margin_microusd, line.margin_ratio) for line in found.lines] == [(1, 1.0), (30, 0.75), (-20, None), (-20, None)]
    total = found.total
    assert (total.cost_microusd, total.charge_microusd, total.margin_microusd, total.margin_ratio) == (50, 41, -9, -0.2195)
    assert (found.engine_ms, found.allocated_ms, found.unallocated_ms) == (400, 300, 100)


@pytest.mark.parametrize(
    ("by", "who"),
    [
        ((Dimension.DAY,), [(TUESDAY, None), (MONDAY, None)]),
        ((Dimension.TENANT,), [(None, "acme"), (None, "globex"), (None, None)]),
        ((Dimension.TENANT, Dimension.ADAPTER), [(None, "acme"), (None, "acme"), (None, "globex"), (None, None)]),
        ((Dimension.DAY, Dimension.TENANT), [(TUESDAY, "acme"), (TUESDAY, None), (MONDAY, "acme"), (MONDAY, "globex")]),
        ((Dimension.TENANT, Dimension.WORK), [(None, "acme"), (None, "globex"), (None, None)]),
    ],
)
def test_lines_are_grouped(by: tuple[Dimension, ...], who: list[tuple[date | None, str | None]]) -> None:
    times = [spent(BUSY, 30), spent(BUSY, 20, TUESDAY), spent(IDLE, 5, TUESDAY, "rep_2")]
    found = report(times, [work(ACME, 1), work(ACME_BOT, 1), work(GLOBEX, 1), work(ACME, 5, day=TUESDAY)], [], by)
    assert [(line.day, line.consumer.tenant if line.consumer else None) for line in found.lines] == who
    assert sum(sum(line.ms.values()) for line in found.lines) == 55


def test_two_tenants_of_one_name_stay_two() -> None:
    late = Consumer("ten_b", "acme", "base", None)
    found = report([spent(BUSY, 30)], [work(ACME, 1), work(late, 2)], [], (Dimension.TENANT,))
    assert [sum(line.ms.values()) for line in found.lines] == [10, 20]


def test_classes_of_work_are_shown_apart_if_asked_for() -> None:
    times = [spent(BUSY, 20), spent(BACKGROUND, 30), spent(IDLE, 50), spent(IDLE, 7, replica="rep_2")]
    done = [work(ACME, 10), work(ACME_LATER, 25), work(ACME_BOT, 10)]
    charges = [Charge(MONDAY, ACME, 10**6), Charge(MONDAY, ACME_LATER, 10**6)]
    found = report(times, done, charges, (Dimension.WORK,))
    shown = [(line.consumer.work if line.consumer else "", sum(line.ms.values()), line.charge_microusd) for line in found.lines]
    assert shown == [(WorkClass.BACKGROUND, 36, 1), (WorkClass.INTERACTIVE, 64, 1), (None, 7, 0)]
    together = report(times, done, charges)
    assert [(line.consumer, sum(line.ms.values())) for line in together.lines] == [
        (replace(ACME, work=None), 68),
        (replace(ACME_BOT, work=None), 32),
        (NOBODY, 7),
    ]


DAYS = st.sampled_from([SUNDAY, MONDAY, TUESDAY, WEDNESDAY])
REPLICAS = st.sampled_from(["rep_1", "rep_2", "rep_3"])
CONSUMERS = st.sampled_from([ACME, ACME_BOT, ACME_LATER, GLOBEX, GLOBEX_LATER, Consumer("ten_g", "globex", "other", None)])
TIMES = st.builds(EngineTime, REPLICAS, st.just("base"), DAYS, st.sampled_from(EnginePhase), st.integers(0, 10**10), st.integers(0, 10**9))
WORK = st.builds(Work, REPLICAS, DAYS, CONSUMERS, st.integers(0, 10**7), st.integers(0, 10**5))
CHARGES = st.builds(Charge, DAYS, CONSUMERS, st.integers(0, 10**15))
BY = st.lists(st.sampled_from(Dimension), min_size=1, unique=True)


@settings(deadline=None)
@given(st.lists(TIMES), st.lists(WORK))
def test_every_millisecond_and_its_cost_is_in_exactly_one_line(times: list[EngineTime], work: list[Work]) -> None:
    lines = allocate(times, work)
    for day in {time.day for time in times}:
        for phase in EnginePhase:
            there = sum(time.ms for time in times if (time.day, time.phase) == (day, phase))
            assert sum(line.ms[phase] for (of, _), line in lines.items() if of == day) == there
    cost = sum(Fraction(time.ms * time.price, MS_PER_HOUR) for time in times)
    assert sum(Fraction(line.cost, MS_PER_HOUR) for line in lines.values()) == cost
    assert all(line.cost >= 0 and min(line.ms.values()) >= 0 for line in lines.values())


def test_a_remainder_goes_to_the_same_one_whatever_came_first() -> None:
    mine, theirs = work(ACME, 1), work(GLOBEX, 1)
    assert allocate([spent(IDLE, 3)], [mine, theirs]) == allocate([spent(IDLE, 3)], [theirs, mine])


@settings(deadline=None)
@given(st.lists(TIMES), st.lists(WORK), st.randoms())
def test_the_order_of_rows_means_nothing(times: list[EngineTime], work: list[Work], random: Any) -> None:
    shuffled, mixed = list(times), list(work)
    random.shuffle(shuffled)
    random.shuffle(mixed)
    assert allocate(shuffled, mixed) == allocate(times, work)


@settings(deadline=None)
@given(st.lists(TIMES), st.lists(WORK), st.lists(CHARGES), BY)
def test_a_report_adds_up_as_shown(times: list[EngineTime], work: list[Work], charges: list[Charge], by: list[Dimension]) -> None:
    found = report(times, work, charges, by)
    assert found.engine_ms == found.allocated_ms + found.unallocated_ms == sum(time.ms for time in times)
    assert sum(sum(line.ms.values()) for line in found.lines) == sum(found.total.ms.values()) == found.engine_ms
    exact = Fraction(sum(time.ms * time.price for time in times), MS_PER_HOUR)
    assert sum(line.cost_microusd for line in found.lines) == found.total.cost_microusd
    assert abs(2 * (found.total.cost_microusd - exact)) <= 1
    paid = Fraction(sum(charge.picousd for charge in charges), 10**6)
    assert sum(line.charge_microusd for line in found.lines) == found.total.charge_microusd
    assert abs(2 * (found.total.charge_microusd - paid)) <= 1
    assert sum(line.margin_microusd for line in found.lines) == found.total.margin_microusd


@settings(deadline=None)
@given(st.integers(0, 10**12), st.dictionaries(st.text(max_size=2), st.integers(0, 10**9), min_size=1).filter(lambda w: any(w.values())))
def test_no_part_is_more_than_one_from_its_share(total: int, weights: dict[str, int]) -> None:
    parts = apportion(total, weights)
    assert sum(parts.values()) == total
    assert all(abs(parts[key] - Fraction(total * weight, sum(weights.values()))) < 1 for key, weight in weights.items())
