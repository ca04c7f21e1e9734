"""Debian's Prometheus, installed where it is missing and this may be done."""

import os
import shutil
import subprocess
import warnings

import pytest

INSTALL_S = 300


def program(name: str) -> str:
    """Return the path of `prometheus` or `promtool`. Skips the test, with a warning, where there is none and none can be installed."""
    found = shutil.which(name)
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for arguments in (["update", "-q"], ["install", "-y", "-q", "--no-install-recommends", "prometheus"]):
            subprocess.run(["apt-get", *arguments], env=environment, capture_output=True, check=False, timeout=INSTALL_S)
        found = shutil.which(name)
    if found is None:
        reason = (
            "NOT TESTED: alert rules and dashboards, since there is no Prometheus, and none could be installed. As root on Debian: "
            "apt-get install prometheus"
        )
        warnings.warn(pytest.PytestWarning(reason), stacklevel=1)
        pytest.skip(reason)
    return found
