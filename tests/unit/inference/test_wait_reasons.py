"""The comments in a waiting stream: its position, and its estimated wait."""

import pytest

from lmaas.inference.wait_reasons import LOADING, NO_MACHINE, SILENT, WaitReasons, comments
from lmaas.scheduling.leases import Standing
from lmaas.scheduling.states import WaitPhase
from lmaas.store.database import Database

COLD = " cold_start=yes"
BUSY, STARTING, ASKED = WaitPhase.BUSY, WaitPhase.STARTING, WaitPhase.ASKED


@pytest.mark.parametrize(
    ("standing", "reason", "age_s", "expected"),
    [
        (Standing(STARTING, 0, 1, 12_000), "", 0, ["queued position=1 estimated_wait_s=12 cold_start=yes"]),
        (Standing(STARTING, 0, 3, 12_400), "", 0, ["queued position=3 estimated_wait_s=13 cold_start=yes"]),
        pytest.param(Standing(STARTING, 0, 1, 12_000), "", 2, ["queued position=1 estimated_wait_s=10" + COLD], id="since the last report"),
        pytest.param(Standing(BUSY, 0, 1, 0), "", 0, ["queued position=1 estimated_wait_s=1"], id="never nothing"),
        pytest.param(Standing(BUSY, 0, 1, 500), "", 3, ["queued position=1 estimated_wait_s=1"], id="never less than nothing"),
        pytest.param(
            Standing(STARTING, 0, 1, 70_000, 70_000), "", 0, ["queued position=1 estimated_wait_s=70 late_s=70" + COLD], id="late"
        ),
        pytest.param(
            Standing(STARTING, 0, 1, 70_000, 70_000), "", 4, ["queued position=1 estimated_wait_s=74 late_s=74" + COLD], id="later"
        ),
        pytest.param(Standing(BUSY, 0, 1, 1000, 300), "", 0, ["queued position=1 estimated_wait_s=1"], id="hardly late"),
        (Standing(ASKED, 0, 2, 20_000, 0, True), "", 0, ["queued position=2 estimated_wait_s=20 start=unknown cold_start=yes"]),
        (
            Standing(ASKED, 0, 2, 40_000, 40_000, True),
            NO_MACHINE,
            0,
            ["queued position=2 estimated_wait_s=40 late_s=40 start=unknown cold_start=yes", NO_MACHINE],
        ),
        pytest.param(Standing(STARTING, 0, 1, 3000), NO_MACHINE, 6, [SILENT, NO_MACHINE], id="the scheduler is silent"),
        pytest.param(Standing(WaitPhase.LOADING, 0), "", 0, [LOADING], id="loading"),
        pytest.param(Standing(WaitPhase.LOADING, 0), "", 6, [SILENT], id="loading, and silent"),
    ],
)
def test_how_a_stream_stands(standing: Standing, reason: str, age_s: float, expected: list[str]) -> None:
    assert comments(standing, reason, age_s) == expected
    assert not any("\n" in line for line in comments(standing, reason, age_s))


async def test_without_a_database_there_is_no_explanation_and_no_wait(no_database: Database) -> None:
    assert await WaitReasons(no_database).why("mod_1") == ""
