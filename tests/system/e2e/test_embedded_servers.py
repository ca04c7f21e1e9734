"""The embedded servers of `lmaas up` are killed while it runs. The engine is the fake one; everything else is as users have it."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.processes import command_of, free_port
from tests.system.e2e.conftest import MODEL, Stack, started, wait_for

FAKE = {"LMAAS_ENGINE_MODULE": "lmaas.testing.fake_engine", "LMAAS_ORPHAN_TIMEOUT_S": "3"}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Iterator[Stack]:
    """A stack with fake engines, in a folder with a space in its name."""
    assert model_folder.exists()
    folder = tmp_path_factory.mktemp("a stack")
    with started(folder / "a home", folder / "up.log", **FAKE) as stack:
        yield stack


def servers(stack: Stack, name: str) -> list[psutil.Process]:
    """Return the processes of an embedded server, the one that started the others first."""
    first = [process for process in psutil.Process(stack.process.pid).children() if process.name() == name]
    return [*first, *(child for process in first for child in process.children())]


def status(stack: Stack, path: str = "/v1/completions") -> int:
    """Return the status of a small request, or 0 if there is no response."""
    with stack.http(stack.key("acme")) as client:
        try:
            if path == "/readyz":
                return client.get(path).status_code
            return client.post(path, json={"model": MODEL, "prompt": "Hi", "max_tokens": 2}).status_code
        except httpx.TransportError:
            return 0


@pytest.mark.parametrize(("name", "whole"), [("valkey-server", True), ("postgres", False), ("postgres", True)])
def test_a_server_that_is_killed_is_started_again(stack: Stack, name: str, whole: bool) -> None:
    log = stack.home.parent / "up.log"
    assert status(stack) == 200
    tenants = stack.cli("tenant", "list")
    before = log.read_text().count("works again after")

    def again(count: int) -> bool:
        return log.read_text().count("works again after") == count

    for times in (before + 1, before + 2):
        victims = servers(stack, name)
        assert victims
        for process in victims if whole else victims[:1]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        wait_for(partial(again, times), 20, f"{name} is said to work again")
        wait_for(lambda: status(stack, "/readyz") == 200, 20, "the gateway is ready again")
        wait_for(lambda: status(stack) == 200, 20, "requests are served again")
    assert stack.cli("tenant", "list") == tenants
    assert "was ended by SIGKILL. It is started again now." in log.read_text()


def test_nobody_else_can_read_anything_in_the_home(stack: Stack) -> None:
    assert status(stack) == 200
    modes = {path: path.lstat().st_mode for path in [stack.home, *stack.home.rglob("*")] if not path.is_symlink()}
    assert any(path.name == "supervisor.log" for path in modes)
    assert not [path for path, mode in modes.items() if mode & 0o077]


def test_a_manifest_that_cannot_be_applied_stops_everything(stack: Stack, tmp_path: Path) -> None:
    tenants = tmp_path / "tenants"
    tenants.mkdir()
    (tenants / "broken.yaml").write_text("name: broken\ntier: nonsense\n")
    settings = {"LMAAS_HOME": str(tmp_path / "home"), "LMAAS_PORT": str(free_port()), "LMAAS_TENANTS": str(tenants)}
    command = [sys.executable, "-m", "lmaas", "up"]
    done = subprocess.run(command, env=stack.environment | settings, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, "is up" in done.stdout) == (1, False)
    assert re.fullmatch(r"lmaas: .*broken\.yaml: 'tier' .*\n", done.stderr)
    assert not [one for one in psutil.process_iter() if str(tmp_path) in " ".join(command_of(one))]


@pytest.mark.parametrize("name", ["valkey-server", "postgres"])
def test_a_stream_goes_on_while_a_server_is_started_again(stack: Stack, name: str) -> None:
    body = {
        "model": MODEL,
        "prompt": "Once",
        "max_tokens": 600,
        "stream": True,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    last: dict[str, object] = {}
    with stack.http(stack.key("acme")) as client, client.stream("POST", "/v1/completions", json=body) as response:
        request_id = response.headers["x-request-id"]
        for number, line in enumerate(line for line in response.iter_lines() if line.startswith("data: {")):
            if number == 20:
                servers(stack, name)[0].kill()
            last = json.loads(line.removeprefix("data: "))
    assert last["usage"]["completion_tokens"] == 600  # type: ignore[index]

    def charged() -> int:
        with stack.operator() as client:
            answer = client.get("/admin/v1/usage/events")
            events = answer.json()["data"] if answer.status_code == 200 else []
        return next((event["completion_tokens"] for event in events if event["request_id"] == request_id), 0)

    wait_for(lambda: charged() == 600, 30, "the request is in the ledger, whole")
