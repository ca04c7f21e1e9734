"""The number of lines that are leased for a pool."""

import pytest

from lmaas.jobs.window import MAX_AHEAD, MAX_TOGETHER, MIN_AHEAD, Room, Window


@pytest.mark.parametrize(
    ("room", "waiting", "wanted"),
    [
        (Room(ready=0, slots=0, room=0, queued=0), 0, 0),  # no engine: nothing is leased for one that may start
        (Room(ready=0, slots=0, room=8, queued=0), 0, 0),
        (Room(ready=1, slots=1, room=0, queued=0), 0, MIN_AHEAD),
        (Room(ready=1, slots=8, room=0, queued=0), 0, 8),  # running ones may end together
        (Room(ready=1, slots=8, room=8, queued=0), 0, 16),
        (Room(ready=1, slots=8, room=8, queued=0), 16, 0),  # they are on their way
        (Room(ready=1, slots=8, room=8, queued=5), 0, 11),  # including those of other runners
        (Room(ready=1, slots=8, room=0, queued=9), 0, 0),
        (Room(ready=1, slots=8, room=0, queued=0), 4, 4),
        (Room(ready=1, slots=8, room=0, queued=0), 5, 0),
        (Room(ready=90, slots=9000, room=0, queued=0), 0, MAX_TOGETHER),
    ],
)
def test_a_new_window(room: Room, waiting: int, wanted: int) -> None:
    assert Window().wanted(room, waiting) == wanted


def test_the_window_follows_what_engines_take() -> None:
    window, now = Window(), 100.0
    window.observe(50, 0, now)
    assert window.ahead == MIN_AHEAD, "the first observation has no earlier one"
    for _ in range(10):
        now += 0.5
        window.observe(20, 0, now)
    assert 36 <= window.ahead <= 40
    full = Room(1, 4, 0, 0)
    assert window.wanted(full, window.ahead) == 0
    assert window.wanted(full, window.ahead // 2 + 1) == 0, "several lines at a time"
    assert window.wanted(full, window.ahead // 2) == window.ahead - window.ahead // 2
    for _ in range(10):
        now += 0.5
        window.observe(0, 0, now)
    assert window.ahead == MIN_AHEAD


def test_the_window_is_bounded() -> None:
    window = Window()
    for now in range(1, 20):
        window.observe(100_000, 0, float(now))
    assert window.ahead == MAX_AHEAD


def test_lines_that_are_put_back_close_the_window() -> None:
    window = Window()
    for now in range(1, 10):
        window.observe(100, 0, float(now))
    assert window.ahead > 90
    window.observe(100, 1, 10.0)
    assert window.ahead == MIN_AHEAD
    full = Room(1, 64, 0, 0)
    assert window.wanted(full, 0) == MIN_AHEAD
    window.observe(0, 0, 11.0)
    assert window.wanted(full, 0) == MIN_AHEAD, "no line has begun since"
    window.observe(10, 0, 12.0)
    assert MIN_AHEAD < window.ahead <= 10
    assert window.wanted(full, 0) == 64


def test_how_long_a_pool_is_cold() -> None:
    window = Window()
    cold, warm = Room(0, 0, 0, 5), Room(1, 1, 0, 5)
    assert [window.cold_s(cold, 1.0), window.cold_s(cold, 3.0), window.cold_s(warm, 4.0), window.cold_s(cold, 9.0)] == [0, 2, 0, 0]


def test_a_clock_that_stands_still_changes_nothing() -> None:
    window = Window()
    window.observe(0, 0, 1.0)
    window.observe(100, 0, 1.0)
    assert window.ahead == MIN_AHEAD
