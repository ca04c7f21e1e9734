"""The simulated day of batch lines: the bar holds, every line ends in time, and engines start seldom."""

from bench.wakes import DAY_S, LINES, AtOnce, Controlled, lines, simulate
from lmaas.simulation.profile import Profile


def test_engines_start_for_work_that_has_gathered() -> None:
    arriving, profile = lines(seed=0), Profile()
    assert len(arriving) == LINES
    gathered, at_once = simulate(Controlled, arriving, profile), simulate(AtOnce, arriving, profile)
    assert gathered.done == at_once.done == LINES
    assert gathered.engine_s <= 0.2 * at_once.engine_s
    assert gathered.starts < at_once.starts / 20
    assert gathered.longest_s < DAY_S


def test_a_single_line_waits_for_its_deadline() -> None:
    found = simulate(Controlled, lines(seed=0, count=1), Profile())
    assert (found.done, found.starts) == (1, 1)
    assert DAY_S - 1900 < found.longest_s < DAY_S - 1700
