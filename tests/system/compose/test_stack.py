"""`docker compose up` itself: `make test-compose` builds the images and runs this file; `make test` skips it."""

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIError, BadRequestError, OpenAI

FOLDER = os.environ.get("LMAAS_TEST_COMPOSE_FOLDER")
MODEL = "smollm2-135m-instruct"
ADAPTER = Path(__file__).parents[3] / "tenants/adapters/acme-json"
QUESTION = "What is the capital of France?"
ONCE = {"migrate", "init", "tenants"}
WAIT_S = 240.0
CLIENTS = 3
#: Kills the gateway, which `init`, the container's first process, has started.
KILL = """
import os, signal
for process in filter(str.isdigit, os.listdir("/proc")):
    if int(process) not in (1, os.getpid()) and b"lmaas" in open(f"/proc/{process}/cmdline", "rb").read():
        os.kill(int(process), signal.SIGKILL)
"""

pytestmark = pytest.mark.skipif(FOLDER is None, reason="needs a Docker engine and images: `make test-compose` brings them, and runs this")


class Stack:
    """The stack of one folder, as a user would handle it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._values = dict(line.split("=", 1) for line in (folder / ".env").read_text().splitlines() if line and line[0] != "#")
        self._values |= {name: str(_free_port()) for name in ("LMAAS_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT")}
        self._values["LMAAS_IDLE_TIMEOUT_S"] = "20"
        (folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in self._values.items()))
        self.url = f"http://127.0.0.1:{self._values['LMAAS_PORT']}"
        self.prometheus = f"http://127.0.0.1:{self._values['PROMETHEUS_PORT']}"
        self.grafana = f"http://127.0.0.1:{self._values['GRAFANA_PORT']}"

    def compose(self, *arguments: str, any_end: bool = False) -> str:
        """Return the output of a Compose command. Fails with its output if the command fails."""
        command = [os.environ["LMAAS_TEST_COMPOSE"], "--ansi=never", "--progress=plain", *arguments]
        run = subprocess.run(command, cwd=self._folder, capture_output=True, text=True, check=False)
        assert any_end or run.returncode == 0, f"{arguments}: {run.stdout[-2000:]}\n{run.stderr[-4000:]}"
        return run.stdout

    def cli(self, *arguments: str) -> Any:
        """Return the JSON output of `lmaas` as the operator, in a container of its own."""
        return json.loads(self.compose("run", "--rm", "-T", "cli", "--json", *arguments))

    def up(self) -> None:
        """Start it, and wait until every service is healthy and every one-time container has succeeded."""
        try:
            self.compose("up", "--detach", "--no-build")
            _until(self.healthy)
        except (AssertionError, pytest.fail.Exception):
            print(self.compose("ps", "--all"), self.compose("logs", "--tail=15"))  # noqa: T201 (shows the cause in the test's log)
            raise

    def containers(self, service: str | None = None) -> list[dict[str, Any]]:
        """Return the containers of one service or of all."""
        found = [json.loads(line) for line in self.compose("ps", "--all", "--format=json").splitlines()]
        return [one for one in found if service in (None, one["Service"])]

    def healthy(self) -> bool:
        """Return whether every container is healthy, or has succeeded if it runs once."""
        return all(
            (one["State"] == "exited" and one["ExitCode"] == 0) if one["Service"] in ONCE else one["Health"] == "healthy"
            for one in self.containers()
        )

    def key(self, tenant: str, role: str) -> str:
        """Create a key of a tenant and return it."""
        return str(self.cli("--tenant", tenant, "key", "create", "--role", role)["key"])

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return Prometheus' result. Fails if Prometheus rejects the query."""
        answer = httpx.get(f"{self.prometheus}/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", answer
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _until(condition: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not so after {timeout_s:.0f} s: {getattr(condition, '__name__', condition)}")
        time.sleep(0.5)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """A running stack in an empty project."""
    stack = Stack(Path(str(FOLDER)))
    stack.up()
    yield stack
    stack.compose("down", "--volumes", "--remove-orphans", "--timeout=5")


@pytest.fixture(scope="module")
def key(stack: Stack) -> str:
    """An inference key of the sample tenant `acme`, which `up` has created from tenants/."""
    return stack.key("acme", "inference")


@pytest.fixture(scope="module")
def client(stack: Stack, key: str) -> OpenAI:
    """OpenAI's own client, on the published port, with its own retries."""
    return OpenAI(base_url=f"{stack.url}/v1", api_key=key, timeout=WAIT_S)


def _ask(client: OpenAI, model: str) -> str:
    messages: Any = [{"role": "user", "content": QUESTION}]
    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=24, temperature=0)
    return str(answer.choices[0].message.content)


def test_a_cold_stream(stack: Stack, key: str) -> None:
    """The first request starts the engine. Comments of the queue come first, then tokens through the proxy, as they are generated."""
    body = {
        "model": MODEL,
        "stream": True,
        "max_tokens": 64,
        "messages": [{"role": "user", "content": "Tell me a long story about the sea."}],
    }
    headers = {"authorization": f"Bearer {key}"}
    waited, tokens = [], []
    with httpx.stream("POST", f"{stack.url}/v1/chat/completions", json=body, headers=headers, timeout=WAIT_S) as answer:
        for line in answer.iter_lines():
            if line.startswith(": queued"):
                waited.append(time.monotonic())
            elif line.startswith("data: {"):
                tokens.append(time.monotonic())
    assert answer.status_code == 200
    assert line in {"", "data: [DONE]"}
    assert waited, "no comment came while the engine started"
    assert len(tokens) > 32
    assert tokens[-1] - tokens[0] > 0.1, "the tokens came in one piece"


def test_a_schema_is_checked_where_the_engine_is(client: OpenAI) -> None:
    """Gateways have no engine installed: the controller's host checks schemas for them."""

    def ask(schema: dict[str, Any]) -> Any:
        form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        messages: Any = [{"role": "user", "content": QUESTION}]
        return client.chat.completions.create(model=MODEL, messages=messages, max_tokens=8, temperature=0, response_format=form)

    assert ask({"enum": ["yes", "no"]}).choices[0].message.content in ('"yes"', '"no"')
    with pytest.raises(BadRequestError, match="'multipleOf'"):
        ask({"type": "integer", "multipleOf": 2147483648})


def test_tenants_as_code_and_an_upload(stack: Stack, client: OpenAI) -> None:
    assert _ask(client, "json-bot").lstrip().startswith("{")
    admin = {"authorization": f"Bearer {stack.key('acme', 'tenant_admin')}"}
    files = {
        name: (ADAPTER / f"{name}{suffix}").read_bytes()
        for name, suffix in (("adapter_config", ".json"), ("adapter_model", ".safetensors"))
    }
    data = {"name": "uploaded", "base_model": MODEL}
    answer = httpx.post(f"{stack.url}/v1/adapters", headers=admin, data=data, files=files, timeout=60)
    assert answer.status_code in (200, 201), answer.text
    assert _ask(client, "uploaded").lstrip().startswith("{")


def test_what_is_published(stack: Stack, client: OpenAI) -> None:
    for path in ("/metrics", "/%6detrics", "/metrics/", "/metrics?x=1"):
        answer = httpx.get(stack.url + path, follow_redirects=True)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "not_found"
    published = {port["PublishedPort"] for one in stack.containers() for port in one["Publishers"] if port["PublishedPort"]}
    assert {f"http://127.0.0.1:{port}" for port in published} == {stack.url, stack.prometheus, stack.grafana}
    assert all(port["URL"] == "127.0.0.1" for one in stack.containers() for port in one["Publishers"] if port["PublishedPort"])
    whoami = stack.compose("exec", "-T", "gateway", "id", "-u").strip()
    assert whoami == "10001"
    written = subprocess.run(
        [os.environ["LMAAS_TEST_COMPOSE"], "exec", "-T", "controller", "touch", "/opt/lmaas/x"],
        cwd=FOLDER,
        capture_output=True,
        check=False,
    )
    assert b"Read-only" in written.stderr
    # The gateways' image has no torch.
    stack.compose("exec", "-T", "gateway", "python", "-c", "import importlib.util as u; assert u.find_spec('torch') is None")


#: Metrics that are absent until an event, such as a failure, a batch or a response in the background. The time of a replica's start is only
#: shown while it runs, and where its record is kept.
SHOWN_LATER = (
    "lmaas_replica_start_seconds",
    "lmaas_replicas_failed",
    "lmaas_refusals_total",
    "lmaas_wasted_tokens",
    "lmaas_background_due_seconds",
    "lmaas_batch_lines_total",
    "lmaas_background_runs_total",
)


def test_prometheus_sees_everything(stack: Stack, client: OpenAI) -> None:
    def all_up() -> bool:
        found = httpx.get(f"{stack.prometheus}/api/v1/targets").json()["data"]["activeTargets"]
        return sorted((one["labels"]["job"], one["health"]) for one in found) == [
            ("console", "up"),
            ("controller", "up"),
            ("gateway", "up"),
            ("gateway", "up"),
            ("jobs", "up"),
        ]

    _until(all_up)
    dashboard = json.loads((Path(str(FOLDER)) / "docker/grafana/dashboards/lmaas.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]

    def all_answered() -> bool:
        return all(stack.query(expression) or any(name in expression for name in SHOWN_LATER) for expression in expressions)

    _until(all_answered)
    alerts = httpx.get(f"{stack.prometheus}/api/v1/rules").json()["data"]["groups"][0]["rules"]
    assert {rule["name"] for rule in alerts} > {"LmaasNoGateway", "LmaasNoLeader", "LmaasDiskFull"}
    # Prometheus drops the samples of an earlier container a little later.
    _until(lambda: float(stack.query("sum(lmaas_controller_leader)")[0]["value"][1]) == 1)
    assert httpx.get(f"{stack.grafana}/api/health").status_code == 200


def test_a_gateway_is_killed_while_requests_flow(stack: Stack, client: OpenAI) -> None:
    """Clients that retry, as OpenAI's does, see no error; the gateway restarts by itself."""
    stop, answers, failures = threading.Event(), [], []

    def keep_asking() -> None:
        while not stop.is_set():
            try:
                answers.append(_ask(client, MODEL))
            except APIError as error:
                failures.append(repr(error))

    threads = [threading.Thread(target=keep_asking) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        _until(lambda: len(answers) >= CLIENTS)
        before = len(answers)
        stack.compose("exec", "-T", "--index=1", "gateway", "python", "-c", KILL, any_end=True)  # its container ends with it
        _until(lambda: len(answers) >= before + 3 * CLIENTS)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert all("Paris" in answer for answer in answers)
    _until(stack.healthy)


def test_known_keys_are_served_without_postgres(stack: Stack, client: OpenAI) -> None:
    for _ in range(8):  # a gateway knows the keys that it has checked
        _ask(client, MODEL)
    stack.compose("stop", "postgres")
    try:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:  # otherwise the proxy would have removed the gateways
            assert "Paris" in _ask(client.with_options(max_retries=0), MODEL)
    finally:
        stack.compose("start", "postgres")
    _until(stack.healthy)


def test_down_and_up_again(stack: Stack, client: OpenAI, key: str) -> None:
    """Keys, adapters and the ledger are on volumes, so they survive."""

    def used() -> int:
        return sum(line["requests"] for line in stack.cli("--tenant", "acme", "usage"))

    answers = _ask(client, "uploaded"), _ask(client, "uploaded@1")
    before = used()
    assert before > CLIENTS
    stack.compose("down")
    assert not stack.containers()
    stack.up()
    assert used() >= before
    assert (_ask(client, "uploaded"), _ask(client, "uploaded@1")) == answers
    _until(lambda: used() >= before + 2)
    ended = [row for row in stack.cli("replica", "list", "--ended") if row["observed"] in ("failed", "lost")]
    assert not ended, "replicas did not drain before their container ended"
