"""The times at which a runner may declare others lost."""

import pytest

from lmaas.jobs.runner import BEAT_S, Beats


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        pytest.param([0, BEAT_S, 2 * BEAT_S], [True, True, True], id="renewals in time"),
        pytest.param([0, 7, 14], [True, True, True], id="late renewals"),
        pytest.param(
            [0, 20, 22, 28, 34, 35, 37], [True, False, False, False, False, True, True], id="after an outage, others have time to renew"
        ),
        pytest.param([9], [False], id="registered only after an outage"),
        pytest.param([0, 20, 28, 35, 42, 43], [True, False, False, False, False, True], id="late again after an outage"),
    ],
)
def test_others_are_spared_after_an_outage(times: list[float], expected: list[bool]) -> None:
    beats = Beats(0.0)
    assert [beats.succeeded(now) for now in times] == expected
