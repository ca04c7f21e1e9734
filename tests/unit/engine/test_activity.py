"""The distinction between a slow process and one that stands still."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from lmaas.engine.activity import LEAST_S, MAX_GAP_S, Activity, Standstill, activity_of, age_s, family_of, session_of

NOTHING = Activity()


@pytest.mark.parametrize(
    ("later", "moves"),
    [
        (NOTHING, False),
        (Activity(wanted_s=LEAST_S / 2), False),  # it read a clock
        (Activity(wanted_s=LEAST_S), True),  # it waits for a CPU
        (Activity(used_s=LEAST_S, wanted_s=LEAST_S), True),
        (Activity(faults=100), True),
        (Activity(read_bytes=1 << 20), True),
    ],
)
def test_progress_is_work_or_the_wish_to_work(later: Activity, moves: bool) -> None:
    assert later.differs_from(NOTHING) is moves
    assert NOTHING.differs_from(later) is moves


def test_a_standstill_is_measured_from_the_last_progress() -> None:
    standstill = Standstill()
    looks = [
        # stage, CPU time, time; then the time for which it stands still, and the CPU time of the stage
        (1, 0.0, 100.0, 0.0, 0.0),
        (1, 0.0, 103.0, 3.0, 0.0),
        (1, 0.01, 106.0, 6.0, 0.01),
        (1, 0.01, 1006.0, 6.0 + MAX_GAP_S, 0.01),  # no observation in between
        (1, 0.2, 1007.0, 0.0, 0.2),
        (1, 0.2, 1008.0, 1.0, 0.2),
        (2, 0.2, 1009.0, 0.0, 0.0),
        (2, 0.2, 1011.0, 2.0, 0.0),
        (2, 5.2, 1012.0, 0.0, 5.0),
    ]
    for stage, used_s, now, still_s, stage_used_s in looks:
        standstill.look(stage, Activity(used_s=used_s, wanted_s=used_s), now)
        assert standstill.still_s == pytest.approx(still_s)
        assert standstill.stage_used_s == pytest.approx(stage_used_s)


@pytest.fixture
def busy() -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


def test_a_busy_process_makes_progress_until_it_is_stopped(busy: "subprocess.Popen[bytes]") -> None:
    before = activity_of([busy.pid])
    deadline = time.monotonic() + 60
    while not activity_of([busy.pid]).differs_from(before):
        assert time.monotonic() < deadline
    os.kill(busy.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, busy.pid, os.WSTOPPED | os.WNOWAIT)
    stopped = activity_of([busy.pid])
    os.sched_yield()
    assert not activity_of([busy.pid]).differs_from(stopped)


def test_processes_are_found_by_session_and_by_descent(busy: "subprocess.Popen[bytes]") -> None:
    assert session_of(busy.pid) == [busy.pid]
    assert busy.pid in family_of(os.getpid())
    assert 0 <= age_s(busy.pid) < 60
    busy.kill()
    busy.wait()
    assert family_of(busy.pid) == []
    assert activity_of([busy.pid]) == NOTHING
