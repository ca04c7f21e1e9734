"""Programs of Debian's packages that some tests need."""

import os
import shutil
import subprocess
import warnings

import pytest

INSTALL_S = 300


def program(name: str, packages: tuple[str, ...], what: str) -> str:
    """Return the path of a program. As root on Debian it is installed if it is missing.

    Where that is not possible, the test is skipped, with a warning that `what` is not tested.
    """
    found = shutil.which(name)
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for arguments in (["update", "-q"], ["install", "-y", "-q", "--no-install-recommends", *packages]):
            subprocess.run(["apt-get", *arguments], env=environment, capture_output=True, check=False, timeout=INSTALL_S)
        found = shutil.which(name)
    if found is None:
        reason = f"NOT TESTED: {what}, since {name} is missing. As root on Debian: apt-get install {' '.join(packages)}"
        with warnings.catch_warnings():
            # The summary of the run shows it. Elsewhere a warning is an error.
            warnings.simplefilter("always")
            warnings.warn(pytest.PytestWarning(reason), stacklevel=2)
        pytest.skip(reason)
    return found
