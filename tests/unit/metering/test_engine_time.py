"""An engine's time by phase, on a clock of the test's own."""

from datetime import UTC, date, datetime, time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmaas.metering.engine_time import DAY_MS, EngineMeter, Span, phase_when_ready
from lmaas.states import EnginePhase

STARTING, LOADING, BUSY, BACKGROUND, IDLE = EnginePhase
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
TODAY, TOMORROW = date(2026, 11, 22), date(2026, 11, 23)


@pytest.mark.parametrize(
    ("load", "waiting", "background", "phase"),
    [
        (0, 0, 0, IDLE),
        (1, 1, 0, LOADING),
        (3, 3, 0, LOADING),
        (1, 0, 0, BUSY),
        (3, 2, 0, BUSY),
        (0, 1, 0, IDLE),
        (3, 0, 3, BACKGROUND),
        (3, 2, 3, BACKGROUND),
        (3, 3, 3, LOADING),
        (3, 0, 2, BUSY),
    ],
)
def test_the_phase_of_an_engine_that_is_ready(load: int, waiting: int, background: int, phase: EnginePhase) -> None:
    assert phase_when_ready(load, waiting, background) is phase


def test_what_is_observed_holds_until_something_else_is() -> None:
    meter = EngineMeter(NOON, 1000.0, 7)
    meter.observe(1020.5, phase=IDLE)
    meter.observe(1021.5, phase=BUSY)
    meter.observe(1022.0, phase=BUSY)
    meter.observe(1024.0, price=9)
    meter.observe(1025.0)
    assert meter.spans == {(TODAY, STARTING, 7): 20_500, (TODAY, IDLE, 7): 1000, (TODAY, BUSY, 7): 2500, (TODAY, BUSY, 9): 1000}
    assert meter.total_ms == 25_000


def test_a_day_ends_at_midnight() -> None:
    meter = EngineMeter(datetime(2026, 11, 22, 23, 59, 59, 250_000, tzinfo=UTC), 5.0, 0)
    meter.observe(5.5, phase=IDLE)
    meter.observe(6.0, phase=BUSY)
    meter.observe(6.0 + 86_400 * 2)
    assert meter.spans == {
        (TODAY, STARTING, 0): 500,
        (TODAY, IDLE, 0): 250,
        (TOMORROW, IDLE, 0): 250,
        (TOMORROW, BUSY, 0): 86_399_750,
        (date(2026, 11, 24), BUSY, 0): 86_400_000,
        (date(2026, 11, 25), BUSY, 0): 250,
    }


def test_late_news_moves_no_time() -> None:
    meter = EngineMeter(NOON, 0.0, 0)
    meter.observe(2.0, phase=IDLE)
    meter.observe(1.0, phase=BUSY)
    meter.observe(3.0)
    assert meter.spans == {(TODAY, STARTING, 0): 2000, (TODAY, BUSY, 0): 1000}


@settings(deadline=None)
@given(
    st.datetimes(datetime(2026, 11, 22), datetime(2026, 11, 23)),
    st.floats(0, 1e7, allow_nan=False),
    st.lists(st.tuples(st.floats(0, 50_000), st.sampled_from([None, *EnginePhase]), st.sampled_from([None, 0, 5]))),
)
def test_the_sum_is_the_time_that_has_passed(
    launched: datetime, start: float, seen: list[tuple[float, EnginePhase | None, int | None]]
) -> None:
    launched_at = launched.replace(tzinfo=UTC)
    meter = EngineMeter(launched_at, start, 0)
    now = start
    before: dict[Span, int] = {}
    for wait_s, phase, price in seen:
        now += wait_s
        meter.observe(now, phase=phase, price=price)
        assert sum(meter.spans.values()) == meter.total_ms == int((now - start) * 1000)
        # Written values never shrink, so an older write does no harm.
        assert all(meter.spans[span] >= ms for span, ms in before.items())
        before = dict(meter.spans)
    first_ms = round(launched_at.timestamp() * 1000)
    for day in {day for day, _, _ in meter.spans}:
        midnight_ms = round(datetime.combine(day, time(), UTC).timestamp() * 1000)
        within_ms = min(midnight_ms + DAY_MS, first_ms + meter.total_ms) - max(midnight_ms, first_ms)
        assert sum(ms for (of, _, _), ms in meter.spans.items() if of == day) == within_ms
