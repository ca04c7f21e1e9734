"""Debian's Chromium, installed where it is missing and this may be done."""

import os
import shutil
import subprocess
import warnings

import pytest

PACKAGE = "chromium"
INSTALL_S = 300


def executable() -> str:
    """Return the path of Chromium. Skips the test, with a warning, where there is none and none can be installed."""
    found = shutil.which(PACKAGE)
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        found = _install()
    if found is None:
        reason = (
            "NOT TESTED: the console's pages, since there is no Chromium, and none could be installed. As root on Debian: "
            "apt-get install chromium"
        )
        warnings.warn(pytest.PytestWarning(reason), stacklevel=1)
        pytest.skip(reason)
    return found


def _install() -> str | None:
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update", "-q"], ["install", "-y", "-q", "--no-install-recommends", PACKAGE, "fonts-dejavu-core"]):
        subprocess.run(["apt-get", *arguments], env=environment, capture_output=True, check=False, timeout=INSTALL_S)
    return shutil.which(PACKAGE)
