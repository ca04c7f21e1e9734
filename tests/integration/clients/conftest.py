"""One gateway, a job runner and fake engines for all clients, a tenant, and a recording of what each test's clients send and receive."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace

import pytest

from lmaas.app import build_jobs
from lmaas.states import PoolKind
from lmaas.store.rights import DatabaseRole
from tests.integration.clients.checks import check_exchange
from tests.integration.clients.tap import Exchange, Tap, tapped
from tests.integration.gateway.stack import Stack, Tenant, running


@dataclass(frozen=True)
class Service:
    """What a client is told, `url` and `key`, and what a test may look at. The models are `base`, its adapter `pirate`, and `embedder`."""

    stack: Stack
    tenant: Tenant
    tap: Tap
    url: str
    key: str

    @property
    def openai_url(self) -> str:
        """The base URL as OpenAI's libraries want it."""
        return f"{self.url}/v1"

    def exchanges(self, path: str) -> list[Exchange]:
        """Return what this test's clients exchanged at a path."""
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
    """The service. What its clients have received in this test is checked at the end."""
    _service.tap.exchanges.clear()
    yield _service
    assert not _service.tap.broken
    for exchange in _service.tap.exchanges:
        check_exchange(exchange)


@pytest.fixture
def environment(service: Service, monkeypatch: pytest.MonkeyPatch) -> Service:
    """The service, of which clients learn from the variables that their documentation names."""
    for name, value in {
        "OPENAI_BASE_URL": service.openai_url,
        "OPENAI_API_KEY": service.key,
        "ANTHROPIC_BASE_URL": service.url,
        "ANTHROPIC_API_KEY": service.key,
    }.items():
        monkeypatch.setenv(name, value)
    return service
