"""One gateway with a fake engine for all tests, and for each test a tenant, its client, and a job runner on request."""

from collections.abc import AsyncIterator

import pytest
from openai import AsyncOpenAI

from tests.integration.background.runners import Runner, runner
from tests.integration.background.service import Service
from tests.integration.gateway.stack import Tenant, running


@pytest.fixture(scope="package")
async def service(postgres_url: str, valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    async with running(postgres_url, valkey_url, tmp_path_factory.mktemp("stack")) as stack:
        model = await stack.model("base")
        yield Service(stack, model, await stack.replica(model, "--fake-token-ms 5"))


@pytest.fixture
async def tenant(service: Service) -> Tenant:
    return await service.stack.tenant()


@pytest.fixture
async def client(service: Service, tenant: Tenant) -> AsyncIterator[AsyncOpenAI]:
    async with service.client(tenant) as client:
        yield client


@pytest.fixture
async def jobs(service: Service) -> AsyncIterator[Runner]:
    async with runner(service.stack) as jobs:
        yield jobs
