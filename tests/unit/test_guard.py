"""The guard of the unit tier (conftest.py)."""

import subprocess
import sys

import pytest

FAILED = pytest.fail.Exception


@pytest.mark.parametrize("fixture", ["postgres_url", "valkey_url", "database_url", "db", "redis", "settings", "scheduler", "model_folder"])
def test_a_fixture_of_a_server_is_refused(request: pytest.FixtureRequest, fixture: str) -> None:
    with pytest.raises(FAILED, match=r"Move the test to tests/integration\."):
        request.getfixturevalue(fixture)


@pytest.mark.parametrize(
    "command",
    [["/usr/lib/postgresql/bin/postgres", "-D", "x"], ["initdb"], [sys.executable, "-m", "lmaas.testing.fake_engine"], ["vllm", "serve"]],
)
def test_a_command_that_starts_a_server_is_refused(command: list[str]) -> None:
    with pytest.raises(FAILED, match=r"A unit test starts .*\. Move the test"):
        subprocess.run(command, check=False)


def test_importing_the_engine_is_refused() -> None:
    if "vllm" in sys.modules:
        pytest.skip("the tests of another tier have imported vLLM")
    with pytest.raises(FAILED, match=r"A unit test imports vllm"):
        __import__("vllm")
