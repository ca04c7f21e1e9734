"""The limits of a tenant's prompts in a minute."""

import pytest

from lmaas.errors import OverLimit
from lmaas.inference.counting import MAX_PROMPTS, Readings
from lmaas.inference.recent_work import MAX_CPU_S, WINDOW_S


def test_the_number_of_prompts_is_limited() -> None:
    readings = Readings()
    for number in range(MAX_PROMPTS):
        readings.begin(number / 100)
    with pytest.raises(OverLimit) as caught:
        readings.begin(10.0)
    assert (caught.value.error_code, caught.value.retry_after_s) == ("too_many_token_counts", WINDOW_S - 10.0)
    # The first is older than a minute.
    readings.begin(WINDOW_S)
    with pytest.raises(OverLimit):
        readings.begin(WINDOW_S)


def test_the_computing_time_is_limited() -> None:
    readings = Readings()
    readings.begin(0.0)
    readings.ended.append((1.0, MAX_CPU_S / 2))
    readings.begin(2.0)
    readings.ended.append((3.0, MAX_CPU_S / 2))
    with pytest.raises(OverLimit) as caught:
        readings.begin(4.0)
    assert (caught.value.error_code, caught.value.retry_after_s) == ("too_many_token_counts", 1.0 + WINDOW_S - 4.0)
    readings.begin(1.0 + WINDOW_S)
