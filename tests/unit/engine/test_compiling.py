"""Detecting from outside its process that a compilation never ends."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lmaas.engine import compiling
from lmaas.engine.compiling import Compilation, Notes, running
from tests.support.conditions import until


@pytest.mark.parametrize(
    ("wall_s", "cpu_s", "stands_still"),
    [
        *((0.1, 0.1, False), (9.0, 9.0, False), (11.0, 10.5, True)),
        # The process gets no CPU time, or the thread waits for another one.
        *((59.0, 2.0, False), (61.0, 2.0, True), (61.0, 0.0, True)),
    ],
)
def test_standing_still_is_a_matter_of_processor_time_first(wall_s: float, cpu_s: float, stands_still: bool) -> None:
    assert Compilation(wall_s, cpu_s).stands_still is stands_still


def test_compilations_are_noted_while_they_run(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "notes")
    assert running(tmp_path / "notes", time.monotonic()) == []
    with notes.compiling(), notes.compiling():
        now = time.monotonic()
        assert [0 <= each.wall_s < 5 for each in running(tmp_path / "notes", now)] == [True, True]
        assert [round(each.wall_s) for each in running(tmp_path / "notes", now + 70)] == [70, 70]
    assert running(tmp_path / "notes", time.monotonic()) == []


def test_one_that_fails_has_ended(tmp_path: Path) -> None:
    notes = Notes(tmp_path)
    with pytest.raises(ValueError, match="bad"), notes.compiling():
        raise ValueError("bad")
    assert running(tmp_path, time.monotonic()) == []


def test_more_than_can_be_noted_run_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "SLOTS", 1)
    notes = Notes(tmp_path)
    for _ in range(2):
        with notes.compiling(), notes.compiling():
            assert len(running(tmp_path, time.monotonic())) == 1


def test_without_notes_nothing_runs(tmp_path: Path) -> None:
    assert running(tmp_path / "none", 0.0) == []


@contextmanager
def other_process(folder: Path, work: str) -> Iterator[subprocess.Popen[bytes]]:
    script = (
        "import sys, threading, time; from pathlib import Path; from lmaas.engine.compiling import Notes\n"
        "notes = Notes(Path(sys.argv[1]))\n"
        "def compile():\n"
        f"    with notes.compiling(): {work}\n"
        "threading.Thread(target=compile).start()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(folder)])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def test_the_processor_time_of_a_thread_elsewhere_is_seen(tmp_path: Path) -> None:
    with other_process(tmp_path, "sum(1 for _ in iter(int, 1))") as process:
        await until(lambda: any(each.cpu_s > 0.5 for each in running(tmp_path, time.monotonic())))
        (found,) = running(tmp_path, time.monotonic())
        assert found.wall_s > 0.4
        process.kill()
        process.wait()
        assert running(tmp_path, time.monotonic()) == []


async def test_one_that_waits_uses_no_processor_time(tmp_path: Path) -> None:
    with other_process(tmp_path, "time.sleep(600)"):
        await until(lambda: any(each.wall_s > 1 for each in running(tmp_path, time.monotonic())))
        (found,) = running(tmp_path, time.monotonic())
        assert found.cpu_s < 0.5
