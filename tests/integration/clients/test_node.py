"""Libraries for Node: those of OpenAI and Anthropic, and Vercel's AI SDK. Each file in `node` is a test for Node's own test runner."""

import asyncio
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.integration.clients.conftest import Service

FILES = Path(__file__).with_name("node")
#: The newest releases ask for Node 22 and run on 20 too.
OLDEST = 20


@pytest.fixture(scope="session")
def packages() -> Path:
    """The folder with the packages of `package-lock.json`, which npm fills once for each machine."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("Node is not installed.")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.lstrip("v").partition(".")[0]) < OLDEST:
        pytest.skip(f"Node {version} is older than {OLDEST}.")
    lock = hashlib.sha256((FILES / "package-lock.json").read_bytes()).hexdigest()[:16]
    cache = Path.home() / ".cache" / "lmaas" / "node-clients" / lock
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent) as name:
            folder = Path(name) / "packages"
            folder.mkdir()
            for file in ("package.json", "package-lock.json"):
                shutil.copy(FILES / file, folder)
            command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
            if done.returncode != 0:
                # A lock file that does not fit package.json is a mistake of ours, not an unreachable registry.
                assert "EUSAGE" not in done.stderr, done.stderr
                pytest.skip(f"npm cannot install the packages: {done.stderr[-500:]}")
            if not cache.exists():
                folder.rename(cache)
    return cache / "node_modules"


@pytest.mark.parametrize("name", sorted(file.name for file in FILES.glob("*.mjs")))
async def test_a_library(packages: Path, service: Service, tmp_path: Path, name: str) -> None:
    # Node looks for packages beside the file.
    (tmp_path / "node_modules").symlink_to(packages)
    shutil.copy(FILES / name, tmp_path)
    variables = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "OPENAI_BASE_URL": service.openai_url,
        "OPENAI_API_KEY": service.key,
        "ANTHROPIC_BASE_URL": service.url,
        "ANTHROPIC_API_KEY": service.key,
    }
    command = ["node", "--test-reporter=tap", name]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=tmp_path, env=variables, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0, output.decode()
    assert b"\n# fail 0\n" in output
    assert b"\n# pass 0\n" not in output
