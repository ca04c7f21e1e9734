"""Prometheus accepts the configuration of compose, and each alert fires when it should."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.debian import program

ROOT = next(parent for parent in Path(__file__).parents if (parent / "pyproject.toml").exists())
CASES = Path(__file__).with_name("alerts.test.yml")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as Prometheus has it in its container, with the cases."""
    for path in (ROOT / "docker/prometheus.yml", ROOT / "docker/alerts.yml", CASES):
        shutil.copy(path, tmp_path)
    return tmp_path


def promtool(folder: Path, *arguments: str) -> str:
    """Run a command of promtool, which must succeed."""
    done = subprocess.run(
        [program("promtool", ("prometheus",), "the alert rules"), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_configuration_of_compose(folder: Path) -> None:
    assert "1 rule files found" in promtool(folder, "check", "config", "prometheus.yml")


def test_each_alert_fires_when_it_should(folder: Path) -> None:
    promtool(folder, "test", "rules", CASES.name)


def test_each_alert_has_cases() -> None:
    rules = yaml.safe_load((ROOT / "docker/alerts.yml").read_text())["groups"][0]["rules"]
    well, ill, _ = yaml.safe_load(CASES.read_text())["tests"]
    names = [rule["alert"] for rule in rules]
    assert [case["alertname"] for case in well["alert_rule_test"]] == names
    assert [case["alertname"] for case in ill["alert_rule_test"] if case["exp_alerts"]] == names
