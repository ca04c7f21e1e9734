"""`make test`: the suite; then what failed once more, by itself, if that is little.

These tests are about processes that are killed, stalled and timed out, and a machine that is shared stands still for seconds now and then,
which looks the same. A failure that comes back counts; one that does not is in the output in full, and named at the end.
"""

import subprocess
import sys

import pytest

#: So many failures may be the machine's. More are ours.
AT_MOST = 5


class Failed:
    """A pytest plugin that remembers which tests failed."""

    def __init__(self) -> None:
        self.tests: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test's setup, call or teardown has ended."""
        if report.failed and report.nodeid not in self.tests:
            self.tests.append(report.nodeid)


def main(arguments: list[str]) -> int:
    """Run pytest, and again with what failed; answers its exit code. An option's value comes after a `=`."""
    failed = Failed()
    code = int(pytest.main(arguments, plugins=[failed]))
    if code != pytest.ExitCode.TESTS_FAILED or not 0 < len(failed.tests) <= AT_MOST:
        return code
    print(f"\n{len(failed.tests)} failed. Once more, by themselves:\n", flush=True)  # noqa: T201
    options = [argument for argument in arguments if argument.startswith("-")]
    code = subprocess.run([sys.executable, "-m", "pytest", *options, *failed.tests], check=False).returncode
    if code == 0:
        print("\nFailed once, above, and not again:", *failed.tests, sep="\n  ")  # noqa: T201
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
