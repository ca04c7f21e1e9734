"""`lmaas up` itself: two side by side, killed, started again. The engine is the fake one; everything else is as users have it."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.system.e2e.conftest import MODEL, Stack, started, wait_for

FAKE = {"LMAAS_ENGINE_MODULE": "lmaas.testing.fake_engine", "LMAAS_ORPHAN_TIMEOUT_S": "3"}


@pytest.fixture
def fake_stack(tmp_path: Path, model_folder: Path) -> Iterator[Stack]:
    """A stack with fake engines, for this test alone."""
    assert model_folder.exists()
    with started(tmp_path / "home", tmp_path / "up.log", **FAKE) as stack:
        yield stack


def answer(stack: Stack) -> str:
    """Return a completion of the stack's base model."""
    with stack.openai("acme") as client:
        done = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hi"}], max_tokens=3)
        return str(done.choices[0].message.content)


def test_two_stacks_side_by_side_know_nothing_of_each_other(fake_stack: Stack, tmp_path: Path) -> None:
    with started(tmp_path / "second", tmp_path / "second.log", **FAKE) as second:
        assert answer(fake_stack) == answer(second)
        assert second.key("acme") != fake_stack.key("acme")
        with second.http(fake_stack.key("acme")) as client:
            assert client.get("/v1/models").status_code == 401
        # A second start in the same home, or on the same port, reports this and fails.
        for settings, complaint in (
            ({"LMAAS_PORT": "1"}, "Another `lmaas up` runs"),
            ({"LMAAS_HOME": str(tmp_path / "third")}, "cannot be used"),
        ):
            refused = subprocess.run(
                [sys.executable, "-m", "lmaas", "up"],
                env=second.environment | settings,
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
            )
            assert refused.returncode == 1
            assert complaint in refused.stderr
    assert answer(fake_stack)


def test_killed_and_started_again(fake_stack: Stack, tmp_path: Path) -> None:
    assert answer(fake_stack)
    fake_stack.process.send_signal(signal.SIGKILL)
    fake_stack.process.wait()
    wait_for(lambda: not fake_stack.processes("lmaas gateway"), 60, "the gateway is gone with its parent")
    wait_for(lambda: not fake_stack.processes("lmaas controller"), 60, "the controller too")
    wait_for(lambda: not fake_stack.processes("lmaas jobs"), 60, "the job runner too")
    wait_for(lambda: not fake_stack.processes("fake_engine"), 60, "a replica that nobody looks after stops itself")
    with started(fake_stack.home, tmp_path / "again.log", **FAKE) as again:
        assert again.credentials["tenants"] == fake_stack.credentials["tenants"]
        assert answer(again)
        assert [row["outcome"] for row in again.cli("apply", "tenants/")] == ["unchanged"] * 4


def test_the_gateway_may_be_killed_mid_stream(fake_stack: Stack) -> None:
    answer(fake_stack)
    (gateway,) = fake_stack.processes("lmaas gateway")
    body = {"model": MODEL, "prompt": "Once", "max_tokens": 1900, "stream": True, "ignore_eos": True}
    seen = 0
    cut = False
    with fake_stack.http(fake_stack.key("acme")) as client, client.stream("POST", "/v1/completions", json=body) as response:
        request_id = response.headers["x-request-id"]
        try:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    seen += 1
                    if seen == 400:  # tokens of two seconds: past a checkpoint
                        gateway.kill()
        except httpx.TransportError:
            cut = True
    assert cut

    def charged() -> dict[str, object] | None:
        with fake_stack.operator() as client:
            events = client.get("/admin/v1/usage/events").json()["data"]
        return next((event for event in events if event["request_id"] == request_id), None)

    def there_again() -> bool:
        try:
            return charged() is not None
        except (httpx.TransportError, KeyError):
            return False  # the gateway restarts

    wait_for(there_again, 60, "the request is in the ledger")
    event = charged()
    assert event is not None
    assert event["status"] == "lost"
    assert 0 < int(str(event["completion_tokens"])) <= seen + 400
    assert answer(fake_stack)
