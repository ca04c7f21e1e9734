"""A command imports only what it needs, so that it starts quickly: `lmaas --help` once took 2 s of CPU, since it imported the server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lmaas

SERVER = {"sqlalchemy", "starlette", "uvicorn", "redis", "alembic", "numpy", "torch", "vllm", "obstore", "psutil", "prometheus_client"}
TENANTS = str(Path(lmaas.__file__).parents[1] / "tenants")
CLIENT = {"httpx", "rich", "yaml", "asyncio"}


def imported(*arguments: str, code: int = 0) -> set[str]:
    """Return the top-level modules that `lmaas` imports for these arguments, which end with this exit code."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LMAAS_")}
    environment |= {"LMAAS_URL": "http://127.0.0.1:1", "LMAAS_API_KEY": "sk-lmaas-none"}
    command = [sys.executable, "-X", "importtime", "-m", "lmaas", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


@pytest.mark.parametrize("arguments", [["--help"], ["up", "--help"], ["adapter", "upload", "--help"], ["simulate", "--help"]])
def test_help_imports_neither_the_server_nor_the_client(arguments: list[str]) -> None:
    modules = imported(*arguments)
    assert "click" in modules
    assert not modules & (SERVER | CLIENT)


@pytest.mark.parametrize(
    "arguments", [*([noun, "list"] for noun in ("tenant", "key", "model", "replica", "files", "batches")), ["usage"], ["apply", TENANTS]]
)
def test_a_command_for_the_api_imports_no_server(arguments: list[str]) -> None:
    modules = imported(*arguments, code=1)  # nothing listens at that address
    assert "httpx" in modules
    assert not modules & SERVER
