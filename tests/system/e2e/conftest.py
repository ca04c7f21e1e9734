"""One stack for all end-to-end tests: `lmaas up` as a user starts it, with the real engine and the real model."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.support.processes import command_of, free_port

ROOT = Path(__file__).parents[3]
MODEL = "smollm2-135m-instruct"
EMBEDDING_MODEL = "all-minilm-l6-v2"
#: An engine starts in 20 s here; on a busy machine it may take minutes.
START_S = 300.0


def wait_for(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """Return the first true value of `condition()`; fail the test after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > deadline:
            pytest.fail(f"not so after {timeout_s:.0f} s: {what}")
        time.sleep(0.05)


@dataclass
class Stack:
    """A running stack."""

    home: Path
    environment: dict[str, str]
    process: "subprocess.Popen[bytes]"
    credentials: dict[str, Any] = field(default_factory=dict)

    @property
    def root(self) -> str:
        """The gateway's address, without `/v1`."""
        return str(self.credentials["base_url"]).removesuffix("/v1")

    def key(self, tenant: str, kind: str = "api_key") -> str:
        """Return a key of a sample tenant."""
        return str(self.credentials["tenants"][tenant][kind])

    def openai(self, tenant: str) -> OpenAI:
        """Return OpenAI's client for this tenant."""
        return OpenAI(base_url=self.credentials["base_url"], api_key=self.key(tenant), max_retries=0, timeout=START_S)

    def async_openai(self, tenant: str) -> AsyncOpenAI:
        """Return OpenAI's asynchronous client for this tenant."""
        return AsyncOpenAI(base_url=self.credentials["base_url"], api_key=self.key(tenant), max_retries=0, timeout=START_S)

    def http(self, key: str) -> httpx.Client:
        """Return a plain HTTP client with a key."""
        return httpx.Client(base_url=self.root, headers={"authorization": f"Bearer {key}"}, timeout=START_S)

    def operator(self) -> httpx.Client:
        """Return a plain HTTP client with the operator's key."""
        return self.http(self.credentials["operator_key"])

    def cli(self, *arguments: str) -> Any:
        """Return the JSON that `lmaas --json …` prints."""
        command = [sys.executable, "-m", "lmaas", "--json", *arguments]
        done = subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def replicas(self) -> list[dict[str, Any]]:
        """Return the replicas that have not ended."""
        with self.operator() as client:
            data: list[dict[str, Any]] = client.get("/admin/v1/replicas").json()["data"]
            return data

    def processes(self, part: str = "") -> list[psutil.Process]:
        """Return lmaas processes of this stack whose command line contains `part`: all of them have its home in their environment."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.environ().get("LMAAS_HOME") == str(self.home) and process.pid != os.getpid()
                if ours and process.status() != psutil.STATUS_ZOMBIE and part in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def engines(self) -> list[psutil.Process]:
        """Return the vLLM servers of this stack."""
        return self.processes("vllm.entrypoints")

    def warm(self) -> str:
        """Start an engine if none runs; return its URL."""
        with self.openai("acme") as client:
            client.completions.create(model=MODEL, prompt="Hi", max_tokens=1)
        return str(next(row["url"] for row in self.replicas() if row["observed"] == "ready"))

    def idle_timeout(self, seconds: float) -> None:
        """Set the pool's idle timeout."""
        with self.operator() as client:
            assert client.patch(f"/admin/v1/base-models/{MODEL}", json={"idle_timeout_s": seconds}).status_code == 200

    def cool(self) -> None:
        """Stop every replica and wait until no engine runs."""
        for row in self.replicas():
            self.cli("replica", "stop", row["id"])
        wait_for(lambda: not self.replicas() and not self.engines(), 60, "all engines stopped")


def start(home: Path, log: Path, **settings: str) -> Stack:
    """Start `lmaas up` in this home and wait until it is ready, with more settings than a home and a port of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LMAAS_")}
    environment |= {"LMAAS_HOME": str(home), "LMAAS_PORT": str(free_port()), "LMAAS_IDLE_TIMEOUT_S": "600"} | settings
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-m", "lmaas", "up"], env=environment, cwd=ROOT, stdout=output, stderr=output)

    def ready() -> bool:
        assert process.poll() is None, log.read_text()
        return b"Ctrl-C stops it" in log.read_bytes()

    wait_for(ready, 120, "lmaas up is ready")
    return Stack(home, environment, process, json.loads((home / "credentials.json").read_text()))


def stop(stack: Stack) -> None:
    """Press Ctrl-C; afterwards no process may be left."""
    stack.process.send_signal(signal.SIGINT)
    assert stack.process.wait(120) == 0
    assert stack.processes() == []
    assert not [one for one in psutil.process_iter() if str(stack.home) in " ".join(command_of(one))]


@contextmanager
def started(home: Path, log: Path, **settings: str) -> Iterator[Stack]:
    """Run `lmaas up` in this home for a block; a test may end it itself."""
    stack = start(home, log, **settings)
    try:
        yield stack
    finally:
        if stack.process.poll() is None:
            stop(stack)


@pytest.fixture(scope="package")
def stack(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Iterator[Stack]:
    """A stack with the real engine and the real model."""
    assert model_folder.exists()
    running = start(tmp_path_factory.mktemp("stack") / "home", tmp_path_factory.getbasetemp() / "up.log")
    yield running
    stop(running)
