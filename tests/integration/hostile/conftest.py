"""A service with a job runner as a process of its own, two tenants, and OpenAI's unmodified client."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI
from openai.types import Batch
from sqlalchemy import text

from lmaas.process import bound_command
from lmaas.states import PoolKind
from lmaas.store.models import BaseModel, change_base_model
from lmaas.store.scopes import SYSTEM
from tests.integration.gateway.stack import CHAT, Replica, Stack, Tenant, running
from tests.support.conditions import until

ENDED = ("completed", "failed", "expired", "cancelled")
#: The length of the completion of each of the tests' lines.
TOKENS = 5


@dataclass
class Runner:
    """A job runner as a process."""

    process: asyncio.subprocess.Process
    log: Path


@dataclass
class Service:
    """The service, and the engine of the base model."""

    stack: Stack
    base: BaseModel
    engine: Replica


class Batches:
    """The batches of a tenant, through OpenAI's client, and other things that a test may look at."""

    def __init__(self, service: Service, tenant: Tenant, client: AsyncOpenAI) -> None:
        self.service, self.tenant, self.client = service, tenant, client
        self.stack, self.base = service.stack, service.base
        #: The tokens that the engine had generated before.
        self.before = 0

    def of(self, key: str) -> "Batches":
        """Return the batches that another key can see."""
        return Batches(self.service, self.tenant, self.client.with_options(api_key=key))

    async def made(self) -> int:
        """Return the number of tokens that the engine of the base model has generated in this test."""
        return (await self.service.engine.counters())[1] - self.before

    async def upload(self, content: bytes, purpose: Any = "batch") -> str:
        """Upload a file. Returns its id."""
        return str((await self.client.files.create(file=("lines.jsonl", content), purpose=purpose)).id)

    async def create(self, content: bytes, endpoint: Any = CHAT, **facts: Any) -> Batch:
        """Upload a file and create its batch."""
        file = await self.upload(content)
        return await self.client.batches.create(input_file_id=file, endpoint=endpoint, completion_window="24h", **facts)

    async def end(self, batch: Batch) -> Batch:
        """Wait until a batch has ended."""
        found: list[Batch] = []

        async def ended() -> bool:
            found[:] = [await self.client.batches.retrieve(batch.id)]
            return found[0].status in ENDED

        await until(ended, every_s=0.1)
        return found[0]

    async def progressed(self, batch: Batch, lines: int = 1) -> None:
        """Wait until this many lines of a batch have a result."""

        async def some() -> bool:
            counts = (await self.client.batches.retrieve(batch.id)).request_counts
            return counts is not None and counts.completed + counts.failed >= lines

        await until(some)

    async def lines(self, file: str | None) -> dict[str, dict[str, Any]]:
        """Return the lines of an output or error file by their custom ids, each of which occurs once."""
        if file is None:
            return {}
        content = (await self.client.files.content(file)).content
        found = [json.loads(line) for line in content.splitlines()]
        assert len({line["custom_id"] for line in found}) == len(found)
        return {line["custom_id"]: line for line in found}

    async def results(self, batch: Batch) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Return the lines of the output file and the codes of the error file's lines; both agree with the counts."""
        output, errors = await self.lines(batch.output_file_id), await self.lines(batch.error_file_id)
        assert not set(output) & set(errors)
        counts = batch.request_counts
        assert counts is not None
        assert (counts.completed, counts.total) == (len(output), len(output) + len(errors)), (counts, len(output), len(errors))
        return output, {custom_id: code_of(line) for custom_id, line in errors.items()}

    async def nothing_is_left(self) -> None:
        """Wait until no line of a batch is left in Postgres, and no request in the queue."""

        async def nothing() -> bool:
            async with self.stack.db.begin(SYSTEM) as connection:
                query = "SELECT (SELECT count(*) FROM batch_lines) + (SELECT count(*) FROM batch_pools)"
                if (await connection.execute(text(query))).scalar_one():
                    return False
            return not list((self.stack.settings.home / "uploads").glob("*"))

        await until(nothing)


def code_of(line: Mapping[str, Any]) -> str:
    """Return the code of a line of an error file."""
    return str((line["error"] or line["response"]["body"]["error"])["code"])


def line(custom_id: Any, *, url: str = CHAT, method: str = "POST", words: str = "Hello.", **body: Any) -> dict[str, Any]:
    """Return a line of a batch. `body` has other fields of its body."""
    whole = {"model": "base", "messages": [{"role": "user", "content": words}], "max_tokens": TOKENS, "ignore_eos": True} | body
    return {"custom_id": custom_id, "method": method, "url": url, "body": whole}


def jsonl(lines: Iterable[Any]) -> bytes:
    """Return lines as a file."""
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


def many(count: int, **body: Any) -> bytes:
    """Return a file of this many lines."""
    return jsonl(line(f"line-{number}", words=f"Number {number}.", **body) for number in range(count))


@pytest.fixture(scope="package")
async def stack(postgres_url: str, valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """A gateway with a database and a queue."""
    async with running(postgres_url, valkey_url, tmp_path_factory.mktemp("stack")) as stack:
        yield stack


@pytest.fixture(scope="package")
async def engines(stack: Stack) -> Service:
    """A base model whose engine takes 20 ms for a token, and another one that embeds."""
    base = await stack.model("base", slots=8)
    await change_base_model(stack.db, "base", {"prompt_price": 1_000_000, "completion_price": 2_000_000})
    engine = await stack.replica(base, "--fake-token-ms 20")
    await stack.replica(await stack.model("embedder", context=256, kind=PoolKind.EMBED), "--fake-token-ms 1")
    return Service(stack, base, engine)


@pytest.fixture(scope="package")
async def runner(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Runner]:
    """A job runner. Its log may contain no unexpected error."""
    log = tmp_path_factory.mktemp("runner") / "jobs.log"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LMAAS_")}
    with log.open("wb") as output:
        command = bound_command([sys.executable, "-m", "lmaas", "jobs"])
        environment = inherited | stack.settings.environment()
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        )
    yield Runner(process, log)
    process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(20):
        assert await process.wait() == 0, log.read_text()[-3000:]
    assert "Traceback" not in log.read_text(), log.read_text()[-6000:]


@pytest.fixture
async def batches(stack: Stack, engines: Service, runner: Runner) -> AsyncIterator[Batches]:
    """The batches of a new tenant. At the end, none of them may be left, and the runner must still run."""
    tenant = await stack.tenant()
    async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key=tenant.key, max_retries=0) as client:
        batches = Batches(engines, tenant, client)
        batches.before = await batches.made()
        yield batches
        await batches.nothing_is_left()
    assert runner.process.returncode is None, runner.log.read_text()[-3000:]


@pytest.fixture
async def http(stack: Stack, batches: Batches) -> AsyncIterator[httpx.AsyncClient]:
    """A plain HTTP client with the tenant's key."""
    async with httpx.AsyncClient(base_url=stack.url, headers=batches.tenant.headers, timeout=60) as client:
        yield client
