"""Runs `make test`: all tests, a report of the time by folder, and a second run of the failed tests if they are few.

The first two tiers run in two processes, because their tests often wait. The tests of the third start engines and whole services, and run
by themselves.

Many tests kill, stall and time out processes. On a shared machine, processes can stall for seconds, which such a test cannot distinguish
from a fault. A failure that repeats counts. One that does not repeat is in the output in full, and named at the end.
"""

import subprocess
import sys
from collections import defaultdict

import pytest

#: With more failures than this, the machine is not the cause.
AT_MOST = 5
#: The maximum sum of the tests' times on two cores. Longer tests belong in `make test-long`.
BUDGET_S = 52 * 60
#: The tiers whose tests run in two processes, a file in one of them, and the tier whose tests do not.
QUICK = ("tests/unit", "tests/integration")
TWO_AT_ONCE = ("--numprocesses=2", "--dist=loadfile")
SYSTEM = "tests/system"


class Record:
    """A pytest plugin that collects the ids of failed tests, and the seconds of each folder."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record the result of a setup, a call or a teardown."""
        folder = "/".join(report.nodeid.split("::")[0].split("/")[1:-1][:2])
        self.seconds[folder] += report.duration
        if report.failed and report.nodeid not in self.failed:
            self.failed.append(report.nodeid)

    def table(self) -> str:
        """Return a table of the slowest folders."""
        total = sum(self.seconds.values())
        longest = sorted(self.seconds.items(), key=lambda item: item[1], reverse=True)[:12]
        rows = [f"{seconds:7.0f} s  {folder}" for folder, seconds in longest if seconds >= 1]
        more = f". The budget is {BUDGET_S} s: shorten what takes longest, or move it to make test-long" if total > BUDGET_S else ""
        return "\n".join([f"The tests took {total:.0f} s{more}.", *rows])


def run(arguments: list[str], record: Record) -> int:
    """Run pytest once. Return its exit code."""
    try:
        return int(pytest.main(arguments, plugins=[record]))
    except pytest.PytestUnraisableExceptionWarning:
        # The objects of a failed test are closed only at the end, because its traceback refers to them. That is no further error.
        if not record.failed:
            raise
        return int(pytest.ExitCode.TESTS_FAILED)


def main(arguments: list[str]) -> int:
    """Run all tests, or those of the arguments, and again those that failed. Return the exit code.

    Options take their values after a `=`.
    """
    record = Record()
    options = [argument for argument in arguments if argument.startswith("-")]
    if len(options) == len(arguments):
        codes = [run([*options, *TWO_AT_ONCE, *QUICK], record), run([*options, SYSTEM], record)]
    else:
        codes = [run(arguments, record)]
    print(f"\n{record.table()}")  # noqa: T201
    code = max(codes)
    if code != pytest.ExitCode.TESTS_FAILED or not 0 < len(record.failed) <= AT_MOST:
        return code
    print(f"\n{len(record.failed)} failed. They run a second time, by themselves:\n", flush=True)  # noqa: T201
    code = subprocess.run([sys.executable, "-m", "pytest", *options, *record.failed], check=False).returncode
    if code == 0:
        print("\nFailed the first time (see above) and passed the second time:", *record.failed, sep="\n  ")  # noqa: T201
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
