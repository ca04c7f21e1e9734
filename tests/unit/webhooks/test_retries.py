"""The pauses between attempts."""

import pytest

from lmaas.webhooks.retries import MAX_RETRY_AFTER_S, PAUSES_S, retry_in_s


def test_pauses_grow_until_about_three_days_have_passed() -> None:
    pauses = [retry_in_s(failures, None, 0.0) for failures in range(len(PAUSES_S))]
    assert pauses == list(PAUSES_S) == sorted(PAUSES_S)
    assert 2.5 * 86400 < sum(PAUSES_S) < 3.5 * 86400
    assert retry_in_s(len(PAUSES_S), None, 0.0) is None
    assert retry_in_s(len(PAUSES_S) + 5, 1.0, 0.0) is None


@pytest.mark.parametrize(
    ("failures", "retry_after_s", "chance", "pause_s"),
    [
        (0, None, 1.0, 5.5),
        (1, None, 0.5, 63.0),
        (0, 2.0, 0.0, 5.0),
        (0, 90.0, 1.0, 90.0),
        (0, 10.0**9, 0.0, MAX_RETRY_AFTER_S),
    ],
)
def test_a_pause_is_spread_and_at_least_what_the_target_asks_for(
    failures: int, retry_after_s: float | None, chance: float, pause_s: float
) -> None:
    assert retry_in_s(failures, retry_after_s, chance) == pytest.approx(pause_s)
