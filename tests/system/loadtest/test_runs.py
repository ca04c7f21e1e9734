"""Locust as `make loadtest` runs it, against a stack with the fake engine. It runs in a process of its own, because Locust patches its
interpreter."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.processes import free_port
from tests.system.e2e.conftest import ROOT, Stack, start, stop, wait_for

TOKEN_MS = 20
#: For a busy machine; a run ends by itself long before.
MARGIN_S = 200


@dataclass(frozen=True)
class Run:
    """The results of a run: its exit code, its output, and the HTML report with Locust's data by (name, type) and lmaas's section."""

    code: int
    said: str
    rows: dict[tuple[str, str], dict[str, Any]]
    ours: str

    def count(self, name: str, kind: str) -> int:
        """Return the number of requests, or figures, of a row."""
        return int(self.rows[name, kind]["num_requests"])

    def median(self, name: str, kind: str) -> float:
        """Return a row's median: ms, or tokens per second."""
        return float(self.rows[name, kind]["median_response_time"])

    def total(self) -> dict[str, Any]:
        """Return Locust's row for all requests."""
        return self.rows["Aggregated", ""]


@pytest.fixture(scope="module")
def fake_stack(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Iterator[Stack]:
    """A stack whose engine generates a token for each of its requests every 20 ms."""
    assert model_folder.exists()
    folder = tmp_path_factory.mktemp("loadtest")
    settings = {"LMAAS_ENGINE_MODULE": "lmaas.testing.fake_engine", "LMAAS_ENGINE_ARGS": f"--fake-token-ms {TOKEN_MS}"}
    running = start(folder / "home", folder / "up.log", **settings)
    yield running
    stop(running)


def loadtest(environment: dict[str, str], folder: Path, scenario: str, seconds: int, users: int, *options: str) -> Run:
    """Run a scenario."""
    report = folder / "report.html"
    command = [sys.executable, "-m", "locust", "-f", f"loadtest/{scenario}.py", "--headless", "--only-summary", "--html", str(report)]
    command += ["--users", str(users), "--spawn-rate", str(users), "--run-time", f"{seconds}s", "--stop-timeout", "60", *options]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds + MARGIN_S)
    said = done.stdout + done.stderr
    if not report.exists():
        return Run(done.returncode, said, {}, "")
    head, _, rest = report.read_text().partition('<section id="lmaas">')
    assert "window.templateArgs" not in head.partition("<body")[2], "lmaas's section is the first of the page"
    ours, _, page = rest.partition("</section>")
    # Locust's page draws its tables from this data.
    data, _ = json.JSONDecoder().raw_decode(page.partition("window.templateArgs = ")[2])
    rows = {(row["name"], row["method"] or ""): row for row in data["requests_statistics"]}
    return Run(done.returncode, said, rows, ours)


def tenants(stack: Stack) -> set[str]:
    """The tenants that exist."""
    return {row["name"] for row in stack.cli("tenant", "list")}


def test_a_steady_mix(fake_stack: Stack, tmp_path: Path) -> None:
    before = tenants(fake_stack)
    run = loadtest(fake_stack.environment, tmp_path, "steady", 12, 16, "--tenants", "6", "--adapters", "2")
    assert run.code == 0, run.said
    assert run.total()["num_failures"] == 0
    answered = 0
    for name in ("steady adapter", "steady base"):
        requests = run.count(name, "E2E")
        answered += requests
        assert requests > 10
        assert run.count(name, "TTFT") == run.count(name, "tok/s") == requests
        assert run.count(name, "ITL") > 10 * requests
        # The fake engine's own pace, as far as a busy machine shows it: never early, perhaps late.
        assert TOKEN_MS - 2 <= run.median(name, "ITL") < 5 * TOKEN_MS
        assert 1000 / (5 * TOKEN_MS) < run.median(name, "tok/s") <= 1000 / TOKEN_MS + 2
        assert run.median(name, "TTFT") < run.median(name, "E2E")
        # Every request wants at least 8 tokens.
        assert run.rows[name, "E2E"]["min_response_time"] > 5 * TOKEN_MS
    assert run.total()["num_requests"] == answered, "figures are not requests"

    # lmaas's own table.
    assert f"<td>steady adapter</td><td>{run.count('steady adapter', 'E2E')}</td><td>0</td>" in run.ours
    assert "TTFT p50" in run.ours
    assert "No request failed" in run.ours
    # The service's own queue times.
    assert "<td>-</td>" not in run.ours
    assert "tok/s all" in run.said

    # Every response is in the ledger, with the tokens that its client received.
    speeds = [run.rows[name, "tok/s"] for name in ("steady adapter", "steady base")]
    tokens = round(sum(row["avg_content_length"] * row["num_requests"] for row in speeds))

    def used() -> list[dict[str, Any]]:
        with fake_stack.operator() as client:
            usage = client.get("/admin/v1/usage?limit=1000").json()["data"]
        return [row for row in usage if (row["tenant"] or "").startswith("load-")]

    # One more request checks that an engine runs.
    wait_for(lambda: sum(row["requests"] for row in used()) == answered + 1, 60, "every answer is in the ledger, once")
    assert {row["adapter"] for row in used()} > {"adapter-0", "adapter-1"}
    assert 0 < sum(row["completion_tokens"] for row in used()) - tokens <= 96, "the tokens of that request"
    # No tenant of the run is left.
    assert tenants(fake_stack) == before


def test_a_burst_finds_no_engine_and_waits_for_one(fake_stack: Stack, tmp_path: Path) -> None:
    run = loadtest(fake_stack.environment, tmp_path, "burst", 6, 10, "--tenants", "2", "--adapters", "1")
    assert run.code == 0, run.said
    assert run.count("burst cold", "E2E") >= 10
    assert run.count("burst cold", "E2E") % 10 == 0, "all users, in every burst"
    # No engine starts in these bursts: each was there before.
    with fake_stack.operator() as client:
        ended = client.get("/admin/v1/replicas?ended=true").json()["data"]
    assert len(ended) >= run.count("burst cold", "E2E") / 10
    assert run.rows["burst cold", "TTFT"]["min_response_time"] > 300


def test_a_noisy_neighbour_is_refused_and_the_polite_ones_are_not(fake_stack: Stack, tmp_path: Path) -> None:
    run = loadtest(fake_stack.environment, tmp_path, "noisy", 12, 32, "--tenants", "4", "--adapters", "1")
    assert run.code == 0, run.said
    assert run.count("noisy flood", "429") > 50
    assert ("noisy polite, flooded", "429") not in run.rows
    for name in ("noisy flood", "noisy polite, alone", "noisy polite, flooded"):
        assert run.count(name, "TTFT") == run.count(name, "E2E") > 3
    assert run.total()["num_requests"] == sum(run.count(name, kind) for name, kind in run.rows if kind == "E2E")


def test_a_soak_leaves_nothing_behind(fake_stack: Stack, tmp_path: Path) -> None:
    run = loadtest(fake_stack.environment, tmp_path, "soak", 8, 24, "--tenants", "2", "--adapters", "1")
    assert run.code == 0, run.said
    assert run.count("soak adapter", "cut") > 10
    assert run.count("soak adapter", "E2E") > 10
    assert run.count("nothing left in flight", "check") == 1
    assert run.rows["in flight", "count"]["max_response_time"] > 5


def test_failures_are_told(fake_stack: Stack, tmp_path: Path) -> None:
    """The report names failures, here with a credentials file in which one tenant has no valid key."""
    credentials = fake_stack.credentials | {"tenants": json.loads(json.dumps(fake_stack.credentials["tenants"]))}
    credentials["tenants"]["acme"]["api_key"] = "wrong"
    (tmp_path / "credentials.json").write_text(json.dumps(credentials))
    run = loadtest(fake_stack.environment | {"LMAAS_HOME": str(tmp_path)}, tmp_path, "steady", 4, 8, "--tenants", "0")
    assert run.code == 1, run.said
    failed = run.rows["steady adapter", "E2E"]["num_failures"]
    assert failed > 0
    assert "HTTP 401 invalid_api_key" in run.said
    assert run.count("steady adapter", "TTFT") == run.count("steady adapter", "E2E") - failed
    assert f"<td>{run.count('steady adapter', 'TTFT')}</td><td>{failed}</td>" in run.ours
    assert f"<td>steady adapter</td><td>HTTP 401 invalid_api_key</td><td>{failed}</td>" in run.ours


def test_any_service_with_adapters(fake_stack: Stack, tmp_path: Path) -> None:
    """With an operator's key and no credentials file, tenants get keys for the run; with a tenant's key, its own models are called."""
    address = ("--url", str(fake_stack.credentials["base_url"]), "--tenants", "0", "--batch-lines", "20")
    environment = fake_stack.environment | {"LMAAS_HOME": str(tmp_path)}
    of_operator = loadtest(environment, tmp_path, "steady", 4, 8, *address, "--key", str(fake_stack.credentials["operator_key"]))
    assert of_operator.code == 0, of_operator.said
    assert of_operator.count("steady adapter", "E2E") > 3
    assert "of 20 lines completed" in of_operator.said
    keys = [key for key in fake_stack.cli("--tenant", "acme", "key", "list") if key["name"] == "load test"]
    assert keys
    assert all(key["revoked_at"] for key in keys)
    own = loadtest(environment, tmp_path, "steady", 4, 4, *address, "--key", fake_stack.credentials["tenants"]["acme"]["api_key"])
    assert own.code == 0, own.said
    assert own.count("steady adapter", "E2E") > 1
    refused = loadtest(environment, tmp_path, "burst", 4, 4, *address, "--key", fake_stack.credentials["tenants"]["acme"]["api_key"])
    assert refused.code != 0
    assert "needs an operator's key" in refused.said


def test_no_service_no_run(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    run = loadtest({"LMAAS_URL": url, "LMAAS_API_KEY": "key"}, tmp_path, "steady", 4, 2)
    assert run.code == 1
    assert f"The service at {url} cannot be reached" in run.said
    assert "Traceback" not in run.said
    with pytest.raises(httpx.TransportError):
        httpx.get(url)
