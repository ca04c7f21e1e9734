"""A service without a job runner: tests run its steps one by one, with its rights."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from openai import AsyncOpenAI
from openai.types import Batch
from sqlalchemy import delete

from lmaas.app import Services, build_jobs
from lmaas.batches.work import BatchWork
from lmaas.files.service import Files, Purpose, Written
from lmaas.inference.catalog import Catalog
from lmaas.protocols.messages.protocol import Messages
from lmaas.protocols.pooling.embeddings import Embeddings
from lmaas.protocols.text import ChatCompletions, Completions
from lmaas.states import PoolKind
from lmaas.store.batch_lines import EndedLine, end_lines
from lmaas.store.database import Database
from lmaas.store.files import File, list_files
from lmaas.store.line_leases import LeasedLine, backlog, claim_batch, claim_lines, give_back_batch, settle, unsettled
from lmaas.store.models import BaseModel
from lmaas.store.paging import Part
from lmaas.store.rights import DatabaseRole
from lmaas.store.runners import BatchLease, register
from lmaas.store.scopes import SYSTEM
from lmaas.store.tables import batches
from tests.integration.gateway.stack import CHAT, Stack, Tenant, running
from tests.support.batches import ended

BODY = {"model": "base", "messages": [{"role": "user", "content": "Hello"}]}


def line(custom_id: Any, url: str = CHAT, **body: Any) -> dict[str, Any]:
    """Return a line of a batch with these changes of its body."""
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": BODY | body}


def jsonl(lines: Iterable[Any]) -> bytes:
    """Return lines as a file."""
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


class Steps:
    """The steps of a job runner."""

    def __init__(self, db: Database, work: BatchWork, runner_id: str) -> None:
        self.db, self.work, self.runner_id = db, work, runner_id

    async def claim(self) -> BatchLease:
        """Lease the next batch."""
        claimed = await claim_batch(self.db, self.runner_id, [])
        assert claimed is not None
        return claimed[0]

    async def validate(self) -> None:
        """Validate the next batch."""
        lease = await self.claim()
        await self.work.validate(lease)
        await give_back_batch(self.db, lease)

    async def finalize(self) -> None:
        """Settle all batches that stop early, then finalize the next batch."""
        for tenant_id, batch_id in await unsettled(self.db):
            await settle(self.db, tenant_id, batch_id)
        lease = await self.claim()
        await self.work.finalize(lease)
        await give_back_batch(self.db, lease)

    async def lease(self, count: int) -> Sequence[LeasedLine]:
        """Lease this many lines of the only batch that has any."""
        [offer] = await backlog(self.db)
        return await claim_lines(self.db, self.runner_id, offer.pool_id, {(offer.tenant_id, offer.batch_id): count})

    async def end(self, leases: Iterable[LeasedLine], **changes: Any) -> None:
        """End leased lines with these values."""
        await self.end_all([ended(lease, **changes) for lease in leases])

    async def end_all(self, lines: Sequence[EndedLine]) -> None:
        """End leased lines."""
        await end_lines(self.db, self.runner_id, lines)


class Account:
    """A tenant's batches, through OpenAI's client."""

    def __init__(self, stack: Stack, tenant: Tenant, client: AsyncOpenAI) -> None:
        self.stack, self.tenant, self.client = stack, tenant, client

    async def create(self, content: bytes, endpoint: Any = CHAT, **facts: Any) -> Batch:
        """Upload a file and create its batch."""
        file = await self.upload(content)
        return await self.client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **facts)

    @property
    def files(self) -> Files:
        """The files of all tenants."""
        return self.stack.services.files(self.stack.settings)

    async def upload(self, content: bytes, purpose: Purpose = Purpose.BATCH) -> File:
        """Add a file of the tenant."""
        async with self.files.draft() as draft:
            await draft.write(content)
            return await self.files.upload(self.tenant.id, Written(purpose, "lines.jsonl", draft))

    async def kept(self) -> list[str]:
        """Return the names of the tenant's files in order."""
        return sorted(file.filename for file in await list_files(self.stack.db, self.tenant.id, Part(100)))

    async def show(self, batch: Batch) -> Batch:
        """Return the current state of the batch."""
        return await self.client.batches.retrieve(batch.id)

    async def lines(self, file_id: str | None) -> list[dict[str, Any]]:
        """Return the lines of a result file."""
        assert file_id is not None
        file = await self.files.get(self.tenant.id, file_id)
        assert file.purpose == Purpose.BATCH_OUTPUT
        content = b"".join([piece async for piece in self.files.stream(file)])
        assert content.endswith(b"\n")
        return [json.loads(each) for each in content.splitlines()]


@pytest.fixture(scope="package")
async def stack(postgres_url: str, valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """A gateway with a database and a queue."""
    async with running(postgres_url, valkey_url, tmp_path_factory.mktemp("batches")) as stack:
        yield stack


@pytest.fixture(scope="package")
async def base(stack: Stack) -> BaseModel:
    """A base model."""
    return await stack.model("base")


@pytest.fixture(scope="package")
def services(stack: Stack) -> Services:
    """The services with the rights of a job runner."""
    return replace(stack.services, db=stack.database(DatabaseRole.JOBS))


@pytest.fixture
async def steps(stack: Stack, services: Services) -> Steps:
    """The steps of a job runner."""
    protocols = {protocol.path: protocol for protocol in (ChatCompletions(), Completions(), Embeddings(), Messages())}
    work = BatchWork(services.db, services.files(stack.settings), Catalog(services.db), protocols, stack.settings.max_body_bytes)
    return Steps(services.db, work, await register(services.db))


@pytest.fixture
async def account(stack: Stack) -> AsyncIterator[Account]:
    """A tenant with OpenAI's client. There are no batches of others."""
    async with stack.db.begin(SYSTEM) as connection:
        await connection.execute(delete(batches))
    tenant = await stack.tenant()
    async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key=tenant.key, max_retries=0) as client:
        yield Account(stack, tenant, client)


@pytest.fixture(scope="package")
async def engines(stack: Stack, base: BaseModel) -> None:
    """Engines for a base model, and for one that embeds."""
    await stack.replica(base, "--fake-token-ms 1")
    await stack.replica(await stack.model("embedder", context=256, kind=PoolKind.EMBED))


@pytest.fixture
async def runner(stack: Stack, services: Services, engines: None, account: Account) -> AsyncIterator[None]:
    """A job runner."""
    stopping = asyncio.Event()
    task = asyncio.create_task(build_jobs(stack.settings, services).run(stopping), name="jobs")
    yield
    stopping.set()
    await task
