"""The division of a start's time into stages."""

import time

import pytest

from lmaas.replica.start import Times, process_began, start_record
from lmaas.states import START_PHASES

TIMES = Times(asked=10.0, began=10.2, healthy=12.0, generated=12.1, resident=12.05, ready=12.11, waited=0.05)


MARKS = {"loading": 10.6, "loaded": 11.1, "cached": 11.3}


WITH_MARKS = {
    "spawn_ms": 150, "zygote_ms": 50, "import_ms": 400, "weights_ms": 500, "kv_ms": 200, "warmup_ms": 700, "first_token_ms": 100,
    "adapter_ms": 50, "total_ms": 2110,
}  # fmt: skip


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        (MARKS, WITH_MARKS),
        ({}, WITH_MARKS | {"import_ms": 1800, "weights_ms": 0, "kv_ms": 0, "warmup_ms": 0}),
        # It has begun to load its weights, and no further mark was written.
        ({"loading": 10.6}, WITH_MARKS | {"weights_ms": 0, "kv_ms": 0, "warmup_ms": 1400}),
    ],
)
def test_the_phases_add_up(marks: dict[str, float], expected: dict[str, int]) -> None:
    record = start_record("zygote", TIMES, marks)
    assert record == {"by": "zygote", **expected}
    assert tuple(record) == ("by", *START_PHASES)
    beside = ("adapter_ms", "total_ms", "by")
    assert sum(int(value) for name, value in record.items() if name not in beside) == pytest.approx(2100)


def test_a_process_knows_when_it_began() -> None:
    assert 0 < time.monotonic() - process_began() < 3600 * 24
