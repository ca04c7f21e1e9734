"""Locust as `make loadtest` runs it, against a stack with the fake engine. A process of its own: Locust patches what it runs in."""

import csv
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import ROOT, Stack, free_port, start, stop

TOKEN_MS = 20
#: For a machine that is busy; a run ends by itself long before.
PATIENCE_S = 200


@dataclass(frozen=True)
class Run:
    """What a run left: its exit code, what it said, Locust's rows by (name, type), and the HTML report."""

    code: int
    said: str
    rows: dict[tuple[str, str], dict[str, str]]
    page: str

    def count(self, name: str, kind: str) -> int:
        """How many requests, or figures, a row is of."""
        return int(self.rows[name, kind]["Request Count"])

    def median(self, name: str, kind: str) -> float:
        """A row's median: ms, or tokens per second."""
        return float(self.rows[name, kind]["Median Response Time"])

    def total(self) -> dict[str, str]:
        """Locust's row for all requests."""
        return self.rows["Aggregated", ""]


@pytest.fixture(scope="module")
def fake_stack(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Iterator[Stack]:
    """A stack whose engine makes a token for each of its requests every 20 ms."""
    assert model_folder.exists()
    folder = tmp_path_factory.mktemp("loadtest")
    settings = {"LMAAS_ENGINE_MODULE": "lmaas.testing.fake_engine", "LMAAS_ENGINE_ARGS": f"--fake-token-ms {TOKEN_MS}"}
    running = start(folder / "home", folder / "up.log", **settings)
    yield running
    stop(running)


def loadtest(environment: dict[str, str], folder: Path, scenario: str, seconds: int, users: int, *options: str) -> Run:
    """Run a scenario."""
    page = folder / "report.html"
    command = [
        sys.executable,
        "-m",
        "locust",
        "-f",
        f"loadtest/{scenario}.py",
        "--headless",
        "--only-summary",
        "--csv",
        str(folder / "run"),
    ]
    command += ["--users", str(users), "--spawn-rate", str(users), "--run-time", f"{seconds}s", "--stop-timeout", "60", "--html", str(page)]
    done = subprocess.run(
        [*command, *options], env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds + PATIENCE_S
    )
    rows = {}
    if (folder / "run_stats.csv").exists():
        with (folder / "run_stats.csv").open() as file:
            rows = {(row["Name"], row["Type"]): row for row in csv.DictReader(file)}
    return Run(done.returncode, done.stdout + done.stderr, rows, page.read_text() if page.exists() else "")


def tenants(stack: Stack) -> set[str]:
    """The tenants that there are."""
    return {row["name"] for row in stack.cli("tenant", "list")}


def test_thirty_seconds_of_a_steady_mix(fake_stack: Stack, tmp_path: Path) -> None:
    before = tenants(fake_stack)
    run = loadtest(fake_stack.environment, tmp_path, "steady", 30, 16, "--tenants", "6", "--adapters", "2")
    assert run.code == 0, run.said
    assert run.total()["Failure Count"] == "0"
    answered = 0
    for name in ("steady adapter", "steady base"):
        requests = run.count(name, "E2E")
        answered += requests
        assert requests > 10
        assert run.count(name, "TTFT") == run.count(name, "tok/s") == requests
        assert run.count(name, "ITL") > 10 * requests
        # The fake engine's own pace, as far as a busy machine lets it be seen: early by no means, late perhaps.
        assert TOKEN_MS - 2 <= run.median(name, "ITL") < 5 * TOKEN_MS
        assert 1000 / (5 * TOKEN_MS) < run.median(name, "tok/s") <= 1000 / TOKEN_MS + 2
        assert run.median(name, "TTFT") < run.median(name, "E2E")
        # 8 tokens are the least that is asked for.
        assert float(run.rows[name, "E2E"]["Min Response Time"]) > 5 * TOKEN_MS
    assert int(run.total()["Request Count"]) == answered, "figures are no requests"

    # Locust's own table is drawn from data in the page; ours follows it.
    for kind in ("E2E", "TTFT", "ITL", "tok/s"):
        assert re.search(rf'"method": ?"{kind}"', run.page), kind
    ours = run.page.partition('<section id="lmaas">')[2]
    assert f"<td>steady adapter</td><td>{run.count('steady adapter', 'E2E')}</td><td>0</td>" in ours
    assert "TTFT p50" in ours
    assert "tok/s all" in run.said

    # Every answer is in the ledger, with the tokens that its client saw.
    tokens = sum(
        float(run.rows[name, "tok/s"]["Average Content Size"]) * run.count(name, "E2E") for name in ("steady adapter", "steady base")
    )
    with fake_stack.operator() as client:
        usage = client.get("/admin/v1/usage").json()["data"]
    used = [row for row in usage if (row["tenant"] or "").startswith("load-")]
    assert {row["model"] for row in used} > {"adapter-0", "adapter-1"}
    assert sum(row["requests"] for row in used) == answered + 1, "and one to see that an engine runs"
    assert 0 <= sum(row["completion_tokens"] for row in used) - tokens <= 96 + 1
    # Nothing of it stays.
    assert tenants(fake_stack) == before


def test_a_burst_finds_no_engine_and_waits_for_one(fake_stack: Stack, tmp_path: Path) -> None:
    run = loadtest(fake_stack.environment, tmp_path, "burst", 6, 10, "--tenants", "2", "--adapters", "1")
    assert run.code == 0, run.said
    assert run.count("burst cold", "E2E") >= 10
    assert run.count("burst cold", "E2E") % 10 == 0, "all users, in every burst"
    # An engine starts in none of these: each of them was there before it.
    with fake_stack.operator() as client:
        ended = client.get("/admin/v1/replicas?ended=true").json()["data"]
    assert len(ended) >= run.count("burst cold", "E2E") / 10
    assert float(run.rows["burst cold", "TTFT"]["Min Response Time"]) > 300


def test_a_noisy_neighbour_is_refused_and_the_polite_ones_are_not(fake_stack: Stack, tmp_path: Path) -> None:
    run = loadtest(fake_stack.environment, tmp_path, "noisy", 12, 32, "--tenants", "4", "--adapters", "1")
    assert run.code == 0, run.said
    assert run.count("noisy flood", "429") > 50
    assert ("noisy polite, flooded", "429") not in run.rows
    for name in ("noisy flood", "noisy polite, alone", "noisy polite, flooded"):
        assert run.count(name, "TTFT") == run.count(name, "E2E") > 3
    assert int(run.total()["Request Count"]) == sum(run.count(name, kind) for name, kind in run.rows if kind == "E2E")


def test_a_soak_leaves_nothing_behind(fake_stack: Stack, tmp_path: Path) -> None:
    run = loadtest(fake_stack.environment, tmp_path, "soak", 8, 24, "--tenants", "2", "--adapters", "1")
    assert run.code == 0, run.said
    assert run.count("soak adapter", "cut") > 10
    assert run.count("soak adapter", "E2E") > 10
    assert run.count("nothing left in flight", "check") == 1
    assert float(run.rows["in flight", "count"]["Max Response Time"]) > 5


def test_failures_are_told(fake_stack: Stack, tmp_path: Path) -> None:
    """With the tenants of the credentials file, of which one has no valid key."""
    credentials = fake_stack.credentials | {"tenants": json.loads(json.dumps(fake_stack.credentials["tenants"]))}
    credentials["tenants"]["acme"]["api_key"] = "wrong"
    (tmp_path / "credentials.json").write_text(json.dumps(credentials))
    run = loadtest(fake_stack.environment | {"LMAAS_HOME": str(tmp_path)}, tmp_path, "steady", 4, 8, "--tenants", "0")
    assert run.code == 1, run.said
    failures = sum(int(row["Failure Count"]) for (_, kind), row in run.rows.items() if kind == "E2E")
    assert failures > 0
    assert "HTTP 401 invalid_api_key" in run.said
    assert run.count("steady adapter", "TTFT") == run.count("steady adapter", "E2E") - int(
        run.rows["steady adapter", "E2E"]["Failure Count"]
    )


def test_no_service_no_run(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    run = loadtest({"LMAAS_URL": url, "LMAAS_API_KEY": "key"}, tmp_path, "steady", 4, 2)
    assert run.code == 1
    assert f"The service at {url} does not answer" in run.said
    assert "Traceback" not in run.said
    with pytest.raises(httpx.TransportError):
        httpx.get(url)
