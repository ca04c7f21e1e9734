"""`make test`: run all tests, then run the failed ones a second time if they are few.

Many tests kill, stall and time out processes. On a shared machine everything can stand still for seconds, which looks the same to such a
test. A failure that comes back counts. One that does not is in the output in full, and named at the end.
"""

import subprocess
import sys

import pytest

#: More failures than this are not the machine's.
AT_MOST = 5


class Failed:
    """A pytest plugin that collects the ids of the tests that failed."""

    def __init__(self) -> None:
        self.tests: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a failed setup, call or teardown."""
        if report.failed and report.nodeid not in self.tests:
            self.tests.append(report.nodeid)


def main(arguments: list[str]) -> int:
    """Run pytest, and again with what failed; return the exit code. An option takes its value after a `=`."""
    failed = Failed()
    try:
        code = int(pytest.main(arguments, plugins=[failed]))
    except pytest.PytestUnraisableExceptionWarning:
        # What a failed test held is closed at the end only, since its traceback is kept. That is no error of its own.
        if not failed.tests:
            raise
        code = int(pytest.ExitCode.TESTS_FAILED)
    if code != pytest.ExitCode.TESTS_FAILED or not 0 < len(failed.tests) <= AT_MOST:
        return code
    print(f"\n{len(failed.tests)} failed. They run a second time, by themselves:\n", flush=True)  # noqa: T201
    options = [argument for argument in arguments if argument.startswith("-")]
    code = subprocess.run([sys.executable, "-m", "pytest", *options, *failed.tests], check=False).returncode
    if code == 0:
        print("\nFailed the first time (see above) and passed the second time:", *failed.tests, sep="\n  ")  # noqa: T201
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
