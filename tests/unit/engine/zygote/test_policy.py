"""The reaction to a zygote that does not respond, by its observed state."""

from dataclasses import replace

import pytest

from lmaas.engine.zygote.policy import (
    CIRCLES_IMPORTS,
    CIRCLES_S,
    FIRST_START_S,
    REPLACED_S,
    STILL_S,
    first_start_s,
    import_left_s,
    start_delay_s,
    stuck,
    why_plain,
)
from lmaas.engine.zygote.progress import Sight

IMPORTS = Sight(pid=7, done=3, stages=20, used_s=4.0, age_s=5.0, usual_s=8.0, next_s=0.0)
SERVES = replace(IMPORTS, done=20, used_s=9.0, age_s=600.0)
GONE = Sight(usual_s=8.0, next_s=0.0)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (IMPORTS, ""),
        (replace(IMPORTS, age_s=10_000.0), ""),  # time alone is not a reason
        (replace(IMPORTS, used_s=500.0, age_s=10_000.0), ""),  # nor is much work, as long as stages are finished
        (replace(IMPORTS, still_s=STILL_S), ""),
        (replace(IMPORTS, still_s=STILL_S + 1), "no progress for 16 s"),
        (replace(SERVES, still_s=STILL_S + 1), "no progress"),
        (replace(IMPORTS, stage_used_s=CIRCLES_S), ""),
        (replace(IMPORTS, stage_used_s=CIRCLES_S + 1), "61 s of processor time without finishing a stage"),
        (replace(IMPORTS, stage_used_s=CIRCLES_S + 1, usual_s=CIRCLES_S / CIRCLES_IMPORTS + 1), ""),
    ],
)
def test_only_a_zygote_without_progress_is_stuck(seen: Sight, expected: str) -> None:
    reason = stuck(seen)
    assert expected in reason
    assert bool(reason) == bool(expected)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        # It imports: it is ready before a plain start would be.
        (IMPORTS, ""),
        (replace(IMPORTS, age_s=10_000.0), ""),
        (replace(IMPORTS, next_s=None), ""),
        # It is stuck: its owner replaces it, if it has one and does so in time.
        (replace(IMPORTS, still_s=STILL_S + 1), ""),
        (replace(IMPORTS, still_s=STILL_S + 1, next_s=None), "stuck"),
        (replace(IMPORTS, still_s=STILL_S + REPLACED_S + 1), "stuck"),
        (replace(IMPORTS, stage_used_s=CIRCLES_S + 1), ""),
        (replace(IMPORTS, stage_used_s=CIRCLES_S + 1, next_s=None), "stuck"),
        (replace(IMPORTS, stage_used_s=CIRCLES_S + REPLACED_S + 1), "stuck"),
        # There is none: the next one is waited for if it is expected soon.
        (GONE, ""),
        (replace(GONE, absent_s=REPLACED_S + 1), "no zygote was started"),
        (replace(GONE, next_s=6.0, absent_s=REPLACED_S + 1), ""),
        (replace(GONE, next_s=60.0), "in 60 s at the earliest"),
        (replace(GONE, next_s=None), "no zygote runs"),
    ],
)
def test_a_start_waits_as_long_as_that_is_quicker(seen: Sight, expected: str) -> None:
    reason = why_plain(seen)
    assert expected in reason
    assert bool(reason) == bool(expected)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (SERVES, 0.0),
        (replace(IMPORTS, used_s=4.0, age_s=4.0), 4.0),
        # It gets about half of a CPU, so it takes about twice as long.
        (replace(IMPORTS, used_s=4.0, age_s=9.0), 8.0),
        (replace(IMPORTS, used_s=4.0, age_s=99.0), 80.0),
        # The first measurements are too short to extrapolate from.
        (replace(IMPORTS, used_s=0.0, age_s=0.0), 8.0),
        (replace(IMPORTS, used_s=0.0, age_s=0.25), 10.0),
        # The estimate falls to the last second, and an import that is late needs as long again.
        (replace(IMPORTS, used_s=7.9, age_s=7.9), 1.0),
        (replace(IMPORTS, used_s=20.0, age_s=20.0), 12.0),
        # The time for which it stands still is added.
        (replace(IMPORTS, used_s=4.0, age_s=4.0, still_s=6.0), 10.0),
        # There is no zygote yet.
        (GONE, 8.0),
        (replace(GONE, next_s=5.0), 13.0),
    ],
)
def test_what_is_left_of_an_import(seen: Sight, expected: float) -> None:
    assert import_left_s(seen) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (SERVES, 0.0),
        (replace(IMPORTS, age_s=4.0), 4.0),
        (GONE, 8.0),
        (replace(GONE, next_s=300.0), 0.0),  # starts are plain
        (replace(GONE, next_s=None), 0.0),
    ],
)
def test_starts_are_delayed_by_an_import_that_they_wait_for(seen: Sight, expected: float) -> None:
    assert start_delay_s(seen) == pytest.approx(expected)


@pytest.mark.parametrize(("seen", "by"), [(SERVES, "zygote"), (IMPORTS, "zygote"), (replace(GONE, next_s=None), "plain")])
def test_a_first_start_takes_as_long_as_its_kind(seen: Sight, by: str) -> None:
    assert first_start_s(seen) == FIRST_START_S[by]
