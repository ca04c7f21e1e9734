"""The remaining time of a start, and the time at which it has failed."""

from typing import cast

import pytest

from lmaas.engine.activity import Activity
from lmaas.engine.launch import EngineProcess
from lmaas.engine.zygote.policy import FIRST_START_S
from lmaas.engine.zygote.progress import Sight
from lmaas.replica.progress import STILL_S, StartProgress, start_left_s, stuck
from tests.support.clocks import Clock


@pytest.mark.parametrize(
    ("still_s", "used_s", "elapsed_s", "expected"),
    [
        (0.0, 5.0, 10.0, ""),
        (STILL_S, 5.0, 70.0, ""),
        (STILL_S + 1, 5.0, 70.0, "stood still for 61 s"),
        (0.0, 50.0, 100_000.0, ""),  # slow, but it makes progress
        (0.0, 599.0, 601.0, ""),
        (0.0, 601.0, 601.0, "not ready within 600 s, in which it used 601 s of processor time"),
        (0.0, 5000.0, 300.0, ""),  # many CPUs at once
    ],
)
def test_a_start_fails_without_progress_and_not_by_the_clock(still_s: float, used_s: float, elapsed_s: float, expected: str) -> None:
    reason = stuck(still_s, used_s, elapsed_s, 600.0)
    assert expected in reason
    assert bool(reason) == bool(expected)


@pytest.mark.parametrize(
    ("activity", "elapsed_s", "expected"),
    [
        (Activity(), 0.0, (20.0, 0.0)),
        (Activity(used_s=5.0, wanted_s=5.0), 5.0, (15.0, 0.0)),
        # It gets a quarter of the CPUs that it could use.
        (Activity(used_s=5.0, wanted_s=20.0), 20.0, (60.0, 0.0)),
        (Activity(used_s=20.0, wanted_s=20.0), 19.9, (1.0, 0.0)),
        (Activity(used_s=20.0, wanted_s=20.0), 50.0, (30.0, 30.0)),
    ],
)
def test_what_is_left_of_a_start(activity: Activity, elapsed_s: float, expected: tuple[float, float]) -> None:
    assert start_left_s(20.0, activity, elapsed_s) == pytest.approx(expected)


class Forked:
    """The part of an engine that StartProgress reads."""

    by = "zygote"


def test_the_estimate_falls_while_the_zygote_imports_and_the_engine_starts() -> None:
    clock = Clock()
    progress = StartProgress(clock)
    assert progress.left_ms() == (1000 * FIRST_START_S["zygote"], 0)
    progress.usual_s = 2.0
    assert progress.left_ms() == (2000, 0)
    told = []
    # It gets half a CPU: 16 s in all for an import of 8 s, and 4 s for the start after it.
    for used_s in (1.0, 3.0, 5.0, 7.0):
        progress.saw(Sight(pid=1, stages=20, used_s=used_s, age_s=2 * used_s + 1, usual_s=8.0))
        told.append(progress.left_ms())
        clock.now += 4.0
    assert told == [(18_000, 0), (14_000, 0), (10_000, 0), (6_000, 0)]
    assert progress.waited_s == 16.0
    progress.began(cast("EngineProcess", Forked()))
    clock.now += 1.5
    assert progress.left_ms() == (1000, 0)
    assert progress.waited_s == 16.0


def test_an_import_that_takes_longer_than_ever_is_late() -> None:
    progress = StartProgress(Clock())
    progress.usual_s = 2.0
    progress.saw(Sight(pid=1, stages=20, used_s=20.0, age_s=209.0, usual_s=8.0))
    assert progress.left_ms() == (140_000, 120_000)


def test_between_two_looks_the_estimate_counts_down() -> None:
    clock = Clock()
    progress = StartProgress(clock)
    progress.usual_s = 2.0
    progress.saw(Sight(pid=1, stages=20, used_s=4.0, age_s=4.0, usual_s=8.0))
    clock.now += 1.0
    assert progress.left_ms() == (5000, 0)
