"""`make test` reports the time of each folder, and runs a few failed tests a second time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.__main__ import AT_MOST, BUDGET_S, Record

ONCE = """
import pathlib, pytest
@pytest.mark.parametrize("number", range({count}))
def test_once(number, request):
    seen = pathlib.Path(request.fspath).with_name(f"seen-{{number}}")
    if not seen.exists():
        seen.touch()
        pytest.fail("the machine stood still")
def test_fine():
    pass
"""
HOLDS = """
import pathlib, pytest, socket
def test_holds(request):
    seen = pathlib.Path(request.fspath).with_name("seen")
    held = socket.create_server(("127.0.0.1", 0))
    if not seen.exists():
        seen.touch()
        pytest.fail("the machine stood still")
    held.close()
"""
ALWAYS = "def test_always():\n    assert 1 == 2\n"


def run(folder: Path, **files: str) -> tuple[int, str]:
    """Return the exit code and the output of `make test` for these tests."""
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    for name, text in files.items():
        (folder / f"test_{name}.py").write_text(text)
    command = [sys.executable, "-m", "tests", "--basetemp=base", "."]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def test_what_fails_once_is_told_and_counts_as_passed(tmp_path: Path) -> None:
    code, said = run(tmp_path, once=ONCE.format(count=2))
    assert code == 0, said
    assert "2 failed, 1 passed" in said
    assert "2 passed" in said
    assert said.index("the machine stood still") < said.index("Failed the first time (see above)")
    assert said.rstrip().endswith("test_once.py::test_once[1]")


def test_what_a_failed_test_leaves_open_is_no_error_of_its_own(tmp_path: Path) -> None:
    code, said = run(tmp_path, holds=HOLDS)
    assert code == 0, said
    assert said.rstrip().endswith("test_holds.py::test_holds")


@pytest.mark.parametrize("once", [0, 2])
def test_what_fails_twice_fails(tmp_path: Path, once: int) -> None:
    code, said = run(tmp_path, once=ONCE.format(count=once), always=ALWAYS)
    assert code == 1
    assert said.count("assert 1 == 2") >= 2
    assert "passed the second time" not in said


def test_many_failures_are_not_the_machines(tmp_path: Path) -> None:
    code, said = run(tmp_path, once=ONCE.format(count=AT_MOST + 1))
    assert code == 1
    assert "a second time" not in said


def test_what_cannot_be_collected_is_not_run_again(tmp_path: Path) -> None:
    assert run(tmp_path, broken="import nonsense_that_is_not_there")[0] == pytest.ExitCode.INTERRUPTED


def report_of(test: str, seconds: float) -> pytest.TestReport:
    return pytest.TestReport(test, ("", None, ""), {}, "passed", None, "call", duration=seconds)


def test_the_folders_that_took_longest_are_listed() -> None:
    record = Record()
    for test, seconds in (
        ("tests/unit/api/test_x.py::test_a", 2),
        ("tests/system/e2e/test_y.py::test_b", 90),
        ("tests/unit/test_z.py::c", 0.1),
    ):
        record.pytest_runtest_logreport(report_of(test, seconds))
    assert record.table().splitlines() == ["The tests took 92 s.", "     90 s  system/e2e", "      2 s  unit/api"]
    record.pytest_runtest_logreport(report_of("tests/system/engine/log/test_x.py::test_d", BUDGET_S))
    assert f"The budget is {BUDGET_S} s: shorten what takes longest" in record.table()
    assert f"{BUDGET_S} s  system/engine\n" in record.table()
