"""The measurements of an engine in the benchmark, and its comparisons."""

from itertools import pairwise

import pytest

from bench.bill import ALWAYS_ON, DEDICATED, on_engines_of
from bench.bill.fit import line, prompt
from bench.bill.real import TENANTS, Outcome, compared, trace
from lmaas.simulation.replay import Arrangement


def test_a_line_is_found_through_its_points_and_near_them() -> None:
    assert line([1, 4, 12], [0.025, 0.031, 0.047]) == pytest.approx((0.023, 0.002))
    base, slope = line([1, 2, 3], [0.10, 0.13, 0.12])
    assert base == pytest.approx(0.0967, abs=1e-3)
    assert slope == pytest.approx(0.01)
    # An engine does not get faster with more sequences, and each step takes some time.
    assert line([1, 2], [0.2, 0.1]) == pytest.approx((0.15, 0.0))
    assert line([1, 2], [0.1, 0.3])[0] > 0


def test_prompts_are_the_same_for_a_seed() -> None:
    assert prompt(1, 5) == prompt(1, 5) != prompt(2, 5)
    assert len(prompt(3, 100)) == 100


def test_the_short_trace_has_every_tenant_and_an_idle_time_that_stops_an_engine() -> None:
    requests = list(trace())
    assert {request.tenant for request in requests} == set(TENANTS)
    assert 30 < len(requests) < 150
    assert requests[-1].at_s < 100
    gaps = [later.at_s - earlier.at_s for earlier, later in pairwise(requests)]
    assert max(gaps) > 25


def test_an_error_is_a_part_of_the_real_figure() -> None:
    found = compared(Outcome(100.0, 0.5, 1.0, 2, {"idle": 60.0}), Outcome(110.0, 0.4, 1.0, 2, {}))
    assert found["error"] == {"engine_s": 0.1, "ttft_p50_s": -0.2}
    assert found["real"]["phases_s"] == {"idle": 60.0}
    assert "phases_s" not in found["simulated"]


def test_the_ratios_of_the_short_trace_are_real_and_simulated() -> None:
    checks = {
        str(Arrangement.SHARED): compared(Outcome(50.0, 1, 1, 1, {}), Outcome(60.0, 1, 1, 1, {})),
        str(Arrangement.SCALE_TO_ZERO): compared(Outcome(100.0, 1, 1, 1, {}), Outcome(100.0, 1, 1, 1, {})),
    }
    own = on_engines_of(DEDICATED, checks)
    assert (own["real"], own["simulated"]) == (0.5, 0.6)
    always = on_engines_of(ALWAYS_ON, checks)
    assert always["real"] == pytest.approx(50 / (3 * trace().span_s), abs=1e-3)
