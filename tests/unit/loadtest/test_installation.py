"""Load tests run with the control plane alone: without an engine and without Ray."""

import re
import subprocess
import sys
from pathlib import Path

import loadtest

ROOT = Path(loadtest.__file__).parents[1]
#: Modules of distributions that come with an engine or with Ray.
FORBIDDEN = ("ray", "safetensors", "torch", "transformers", "vllm", "peft", "openai")


def test_no_scenario_imports_an_engine() -> None:
    scenarios = "steady, burst, noisy, soak"
    code = f"from loadtest import {scenarios}; import sys; print(sorted(set({FORBIDDEN!r}) & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_make_installs_no_more_than_they_need() -> None:
    [line] = re.findall(r"^loadtest:(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert line.split() == ["$(VENV)/.installed-base", "$(VENV)/.installed-loadtest"]
    pinned = {line.partition("==")[0] for line in (ROOT / "requirements" / "loadtest.txt").read_text().splitlines()}
    assert "locust" in pinned
    assert not pinned & set(FORBIDDEN)
