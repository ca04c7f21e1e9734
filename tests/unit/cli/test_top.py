"""`lmaas top`: pools and replicas in 80 columns and a few lines, once and as JSON."""

import io
import json
import subprocess
import sys
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from lmaas.api import table
from lmaas.api.operation import Operation
from lmaas.cli.commands import cli
from lmaas.cli.top import Snapshot, age, room, view
from lmaas.manifests.client import ApiClient
from tests.unit.cli.test_confirmation import NOWHERE

NOW = "2026-11-30T12:00:00+00:00"


def pool(name: str, **values: Any) -> dict[str, Any]:
    usual = {"queued": 0, "running": 0, "ready": 0, "starting": 0, "wanted": 0, "desired": 0, "reason": "idle"}
    more = {"background": {"lines": 0}, "failed_starts": None, "waits_for_machine": False}
    return {"name": name, "pool": usual | more | values}


def replica(number: int, model: str = "tiny") -> dict[str, Any]:
    named = {"id": f"rep_{number:020}", "base_model": model, "observed": "ready", "desired": "running"}
    return named | {"created_at": "2026-11-30T11:48:00+00:00"}


def text(snapshot: Snapshot, height: int | None = None, trouble: str = "") -> list[str]:
    console = Console(file=io.StringIO(), width=80)
    console.print(view(snapshot, height, trouble))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


BUSY = pool("tiny", queued=12_000, running=16, ready=1, wanted=2, desired=1, reason="60 requests at once, 16 slots a replica")


def test_busy_pools_come_first_with_the_reason_of_what_they_do() -> None:
    lines = text(Snapshot(NOW, [pool("idle-one"), BUSY], [replica(1)]))
    assert lines == [
        "12:00:00 UTC   2 pools   1 replica   12,000 queued   16 running",
        "",
        "pool      queued  running  ready  starting  wanted  lines",
        "tiny      12,000       16      1         0       2      0",
        "idle-one       0        0      0         0       0      0",
        "  tiny: 60 requests at once, 16 slots a replica",
        "",
        "replica                   state  wanted      age  pool",
        f"rep_{1:020}  ready  running  12 min  tiny",
    ]


def test_an_empty_service() -> None:
    assert text(Snapshot(NOW, [], []))[-1] == "No replica runs."


def test_long_names_fit_80_columns() -> None:
    lines = text(Snapshot(NOW, [pool("x" * 63, queued=10**6, desired=1, reason="y" * 200)], [replica(1, "x" * 63)]))
    assert all(len(line) <= 80 for line in lines)
    assert sum("…" in line for line in lines) == 3


@pytest.mark.parametrize("height", [10, 24, 50])
def test_it_fits_the_height_and_counts_what_is_left_out(height: int) -> None:
    lines = text(
        Snapshot(NOW, [pool(f"pool-{number}", desired=1) for number in range(100)], [replica(each) for each in range(200)]), height
    )
    assert len(lines) <= height
    assert sum(line.startswith("pool-") for line in lines) + sum(line.startswith("rep_") for line in lines) >= min(height - 8, 2)
    assert any(line.endswith("more pools") for line in lines)
    assert any(line.endswith("more replicas") for line in lines)


@pytest.mark.parametrize(
    ("pools", "replicas", "height", "shown"),
    [(3, 4, None, (3, 4)), (3, 4, 10, (3, 4)), (100, 4, 20, (16, 4)), (3, 100, 20, (3, 17)), (100, 100, 20, (10, 10)), (9, 9, 0, (1, 1))],
)
def test_room(pools: int, replicas: int, height: int | None, shown: tuple[int, int]) -> None:
    assert room(pools, replicas, height) == shown


@pytest.mark.parametrize(
    ("since", "words"),
    [
        ("2026-11-30T11:59:15+00:00", "45 s"), ("2026-11-30T11:58:01+00:00", "119 s"), ("2026-11-30T11:58:00+00:00", "2 min"),
        ("2026-11-30T09:00:00+00:00", "3 h"), ("2026-11-21T12:00:00+00:00", "9 d"), ("2026-11-30T12:00:01+00:00", "0 s"),
    ],
)  # fmt: skip
def test_age(since: str, words: str) -> None:
    assert age(since, NOW) == words


def test_trouble_is_shown_below() -> None:
    failed = {"count": 2, "reason": "no memory", "next_try_s": 10.0}
    lines = text(Snapshot(NOW, [pool("tiny", failed_starts=failed)], []), 24, "This is the state of 12:00:00. It cannot be reached.")
    assert lines[-2] == "This is the state of 12:00:00. It cannot be reached."
    assert lines[-1].startswith("tiny: The last 2 starts failed")


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> None:
    def items(_: ApiClient, operation: Operation, **__: Any) -> list[dict[str, Any]]:
        return [BUSY] if operation is table.LIST_MODELS else [replica(1)]

    monkeypatch.setattr(ApiClient, "items", items)


@pytest.mark.usefixtures("service")
@pytest.mark.parametrize("options", [[], ["--once"]])
def test_a_pipe_gets_the_state_once(options: list[str]) -> None:
    done = CliRunner().invoke(cli, ["top", *options], env=NOWHERE)
    assert done.exit_code == 0
    assert "12,000 queued" in done.output
    assert f"rep_{1:020}" in done.output


@pytest.mark.usefixtures("service")
def test_json() -> None:
    found = json.loads(CliRunner().invoke(cli, ["top", "--once", "--json"], env=NOWHERE).output)
    assert (found["pools"], found["replicas"]) == ([BUSY], [replica(1)])


def test_a_service_that_is_away_is_an_error() -> None:
    done = subprocess.run([sys.executable, "-m", "lmaas", "top"], env=NOWHERE | {"PATH": ""}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("lmaas: The service at http://127.0.0.1:1 cannot be reached")
