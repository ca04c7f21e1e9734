"""One gateway, a job runner and fake engines for all clients, a tenant, and a recording of each test's requests and responses."""

import asyncio
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from lmaas.app import build_jobs
from lmaas.states import PoolKind
from lmaas.store.rights import DatabaseRole
from tests.integration.clients.checks import check_exchange
from tests.integration.clients.tap import Exchange, Tap, tapped
from tests.integration.gateway.stack import Stack, Tenant, running

NODE = Path(__file__).with_name("node")
#: The newest releases of libraries for Node require Node 22, but also run on 20.
OLDEST = 20


@dataclass(frozen=True)
class Service:
    """The service: `url` and `key` for clients, and its parts for tests. The models are `base`, its adapter `pirate`, and `embedder`."""

    stack: Stack
    tenant: Tenant
    tap: Tap
    url: str
    key: str

    @property
    def openai_url(self) -> str:
        """The base URL in the form that OpenAI's libraries expect."""
        return f"{self.url}/v1"

    def exchanges(self, path: str) -> list[Exchange]:
        """Return this test's exchanges at a path."""
        return self.tap.to(path)


@pytest.fixture(scope="package")
async def _service(postgres_url: str, valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    async with running(postgres_url, valkey_url, tmp_path_factory.mktemp("stack")) as stack:
        base, tenant = await stack.model("base"), await stack.tenant()
        await stack.adapter(tenant, "pirate", base)
        await stack.replica(base, "--fake-token-ms 1")
        await stack.replica(await stack.model("embedder", context=256, kind=PoolKind.EMBED), "--fake-token-ms 1")
        stopping = asyncio.Event()
        jobs = build_jobs(stack.settings, replace(stack.services, db=stack.database(DatabaseRole.JOBS)))
        running_jobs = asyncio.create_task(jobs.run(stopping), name="jobs")
        async with tapped("127.0.0.1", int(stack.url.rpartition(":")[2])) as tap:
            yield Service(stack, tenant, tap, tap.url, tenant.key)
        stopping.set()
        await running_jobs


@pytest.fixture
def service(_service: Service) -> Iterator[Service]:
    """The service. The exchanges of each test are checked at its end."""
    _service.tap.exchanges.clear()
    yield _service
    assert not _service.tap.broken
    for exchange in _service.tap.exchanges:
        check_exchange(exchange)


@pytest.fixture
def environment(service: Service, monkeypatch: pytest.MonkeyPatch) -> Service:
    """The service, which clients find through the environment variables that their documentation names."""
    for name, value in {
        "OPENAI_BASE_URL": service.openai_url,
        "OPENAI_API_KEY": service.key,
        "ANTHROPIC_BASE_URL": service.url,
        "ANTHROPIC_API_KEY": service.key,
    }.items():
        monkeypatch.setenv(name, value)
    return service


@pytest.fixture(scope="session")
def packages() -> Path:
    """The folder with the packages of `package-lock.json`, which npm fills once for each machine."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("Node is not installed.")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.lstrip("v").partition(".")[0]) < OLDEST:
        pytest.skip(f"Node {version} is older than {OLDEST}.")
    lock = hashlib.sha256((NODE / "package-lock.json").read_bytes()).hexdigest()[:16]
    cache = Path.home() / ".cache" / "lmaas" / "node-clients" / lock
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent) as name:
            folder = Path(name) / "packages"
            folder.mkdir()
            for file in ("package.json", "package-lock.json"):
                shutil.copy(NODE / file, folder)
            command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
            if done.returncode != 0:
                # A lock file that does not fit package.json is an error of the repository, not an unreachable registry.
                assert "EUSAGE" not in done.stderr, done.stderr
                pytest.skip(f"npm cannot install the packages: {done.stderr[-500:]}")
            if not cache.exists():
                folder.rename(cache)
    return cache / "node_modules"
