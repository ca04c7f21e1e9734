"""Runners, the database and the queue fail while lines run: no result is lost, and none is stored twice."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, LiteralString

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from lmaas.errors import Unavailable
from lmaas.files.service import Purpose
from lmaas.process import bound_command
from lmaas.states import UsageStatus
from lmaas.store.conversations import create_conversation, find_context
from lmaas.store.database import Database
from lmaas.store.models import BaseModel
from lmaas.store.rights import DatabaseRole
from lmaas.store.scopes import SYSTEM, AnyScope
from tests.integration.gateway.stack import Replica, Stack, Tenant, running
from tests.integration.jobs.service import Mortal, Texts, batch_of, chat, has_status, runner
from tests.support.batches import batch_row, line_rows, pending
from tests.support.conditions import until
from tests.support.databases import login_url


@pytest.fixture(scope="module")
async def stack(postgres_url: str, valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """A stack for all tests of this module, each of which has models and tenants of its own."""
    async with running(postgres_url, valkey_url, tmp_path_factory.mktemp("deaths")) as stack:
        yield stack


async def exactly_once(stack: Stack, model: BaseModel, tenant: Tenant, batch_id: str, replica: Replica) -> None:
    """Assert that each line has one result and one charge, and that the ledger with the wasted attempts equals the engine's count."""
    await stack.idle(model)
    row, rows = await batch_row(stack.db, batch_id), await line_rows(stack.db, batch_id)
    assert [line.state for line in rows] == ["done"] * row.total
    assert (row.completed, row.failed, await pending(stack.db, batch_id)) == (row.total, 0, {model.id: (0, 0)})
    used = {line.request_id: json.loads(line.answer)["usage"]["completion_tokens"] for line in rows}
    events = await stack.ledger(model, tenant)
    assert {event.request_id: event.completion_tokens for event in events if event.status == UsageStatus.COMPLETED} == used
    assert {event.status for event in events} <= {UsageStatus.COMPLETED, UsageStatus.WASTED}
    assert row.completion_tokens == sum(used.values())
    assert sum(event.completion_tokens for event in events) <= (await replica.counters())[1] - 1


async def lose(stack: Stack) -> None:
    """Make every runner look as if it had not sent a beat for long."""
    async with stack.db.begin(SYSTEM) as connection:
        await connection.execute(text("UPDATE job_runners SET seen_at = now() - interval '1 h'"))


async def test_a_runner_that_dies_at_any_step(stack: Stack) -> None:
    model, tenant = await stack.model("mortal"), await stack.tenant()
    replica = await stack.replica(model)
    texts = Texts()
    batch_id = await batch_of(stack, texts, tenant, model, [chat(f"l{number}", "mortal", max_tokens=20) for number in range(120)])
    url = login_url(str(stack.settings.database_url), DatabaseRole.JOBS)
    for step in (1, 2, 3, 4, 5, 6, 8, 10):
        for before in (True, False):
            db = Mortal(url, step, before=before)
            async with runner(stack, texts, db):
                async with asyncio.timeout(20):
                    await db.died.wait()
            await db.close()
            await lose(stack)
    async with runner(stack, texts):
        await until(partial(has_status, stack, batch_id, "finalizing"), timeout_s=40)
    await exactly_once(stack, model, tenant, batch_id, replica)
    assert max(line.attempt for line in await line_rows(stack.db, batch_id)) > 1


async def test_a_line_that_runs_twice_has_one_response(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tenant = await stack.model("responses"), await stack.tenant()
    await stack.replica(model)
    await create_conversation(stack.db, tenant.id, "conv_lines", b"{}", [], timedelta(days=1))
    texts = Texts()

    def line(number: int, **more: Any) -> bytes:
        body = {"model": "responses", "input": f"say {number}", "max_output_tokens": 4} | more
        return json.dumps({"custom_id": f"l{number}", "method": "POST", "url": "/v1/responses", "body": body}).encode()

    lines = [line(0, conversation="conv_lines"), line(1, store=False), *(line(number) for number in range(2, 6))]
    batch_id = await batch_of(stack, texts, tenant, model, lines, endpoint="/v1/responses")
    url = login_url(str(stack.settings.database_url), DatabaseRole.JOBS)
    # It dies when engines have responded, before anything is stored.
    db, died = Database(url, DatabaseRole.JOBS), asyncio.Event()

    async def die(*_: object) -> None:
        died.set()
        await asyncio.Event().wait()

    with monkeypatch.context() as dying:
        dying.setattr("lmaas.jobs.commits.end_lines", die)
        async with runner(stack, texts, db):
            async with asyncio.timeout(20):
                await died.wait()
    await db.close()
    await lose(stack)
    async with runner(stack, texts):
        await until(partial(has_status, stack, batch_id, "finalizing"), timeout_s=40)
    rows = await line_rows(stack.db, batch_id)
    assert [(row.state, row.attempt) for row in rows] == [("done", 2)] * 6
    answers = [json.loads(row.answer) for row in rows]
    async with stack.db.begin(SYSTEM) as connection:
        query = text("SELECT id, body FROM responses WHERE tenant_id = :tenant")
        found = {row.id: json.loads(row.body) for row in await connection.execute(query, {"tenant": tenant.id})}
    assert found == {answer["id"]: answer for answer in [answers[0], *answers[2:]]}
    items = [json.loads(item) for item in await find_context(stack.db, tenant.id, "conv_lines")]
    assert [item["role"] for item in items] == ["user", "assistant"]
    assert items[1]["id"] == answers[0]["output"][0]["id"]


async def test_a_process_that_is_killed_and_one_that_is_suspended(stack: Stack, tmp_path: Path) -> None:
    model, tenant = await stack.model("process"), await stack.tenant()
    replica = await stack.replica(model, "--fake-token-ms 10")
    content = b"\n".join(chat(f"l{number}", "process", max_tokens=30) for number in range(100))
    files = stack.services.files(stack.settings)

    async def chunks() -> AsyncIterator[bytes]:
        yield content

    file = await files.add(tenant.id, Purpose.BATCH, "lines.jsonl", chunks())
    async with stack.client(tenant) as http:
        about = {"input_file_id": file.id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        batch_id = (await http.post("/v1/batches", json=about)).json()["id"]
    settings = {**stack.settings.environment(), "LMAAS_DATABASE_URL": login_url(str(stack.settings.database_url), DatabaseRole.JOBS)}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LMAAS_")} | settings

    def start(name: str) -> "subprocess.Popen[bytes]":
        with (tmp_path / name).open("ab") as log:
            command = bound_command([sys.executable, "-m", "lmaas", "jobs"])
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)

    async def some_done(count: int) -> bool:
        return bool((await batch_row(stack.db, batch_id)).completed >= count)

    processes = [start("killed"), start("suspended")]
    try:
        await until(partial(some_done, 10), timeout_s=40)
        os.kill(processes[1].pid, signal.SIGSTOP)
        processes[0].kill()
        await lose(stack)
        processes.append(start("third"))
        await until(partial(some_done, 60), timeout_s=40)
        os.kill(processes[1].pid, signal.SIGCONT)

        async def is_finalized() -> bool:
            return bool((await batch_row(stack.db, batch_id)).status == "completed")

        await until(is_finalized, timeout_s=40)
        for process in processes[1:]:
            process.terminate()
        assert [await asyncio.to_thread(process.wait, 20) for process in processes[1:]] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    row = await batch_row(stack.db, batch_id)
    assert (row.completed, row.failed, row.error_file_id) == (100, 0, None)
    output = b"".join([piece async for piece in files.stream(await files.get(tenant.id, row.output_file_id))])
    assert {json.loads(line)["custom_id"] for line in output.splitlines()} == {f"l{number}" for number in range(100)}
    assert len(output.splitlines()) == 100
    await stack.idle(model)
    events = await stack.ledger(model, tenant)
    assert sum(event.status == UsageStatus.COMPLETED for event in events) == 100
    assert {event.status for event in events} <= {UsageStatus.COMPLETED, UsageStatus.WASTED}
    assert sum(event.completion_tokens for event in events) <= (await replica.counters())[1] - 1
    log = "".join((tmp_path / name).read_text() for name in ("suspended", "third"))
    assert "runner lost its leases" in log
    assert "say l" not in log
    assert not [line for line in log.splitlines() if '"level": "ERROR"' in line or "Traceback" in line]


class Away(Database):
    """A database that can be away."""

    is_away = False

    @asynccontextmanager
    async def begin(self, scope: AnyScope) -> AsyncIterator[AsyncConnection]:
        """Provide a transaction. Raises Unavailable while the database is away, also at the end of the block."""
        self._check()
        async with super().begin(scope) as connection:
            yield connection
        self._check()

    async def execute_for_each(self, statement: LiteralString, values: Sequence[tuple[str, Sequence[Any]]]) -> None:
        """Execute a statement. Raises Unavailable while the database is away."""
        self._check()
        await super().execute_for_each(statement, values)

    def _check(self) -> None:
        if self.is_away:
            raise Unavailable("The database is not available. Retry after 2 s.", code="database_unavailable")


async def test_postgres_is_away_while_lines_run(stack: Stack) -> None:
    model, tenant = await stack.model("pg"), await stack.tenant()
    replica = await stack.replica(model, "--fake-token-ms 10")
    texts = Texts()
    batch_id = await batch_of(stack, texts, tenant, model, [chat(f"l{number}", "pg", max_tokens=30) for number in range(60)])
    db = Away(login_url(str(stack.settings.database_url), DatabaseRole.JOBS), DatabaseRole.JOBS)
    async with runner(stack, texts, db) as job:

        async def has_begun() -> bool:
            return bool((await batch_row(stack.db, batch_id)).completed)

        await until(has_begun)
        first, db.is_away = job.runner.id, True

        async def engine_is_idle() -> bool:
            return await replica.running() == 0

        await until(engine_is_idle, timeout_s=20)
        assert (await batch_row(stack.db, batch_id)).completed < 60
        db.is_away = False
        await until(partial(has_status, stack, batch_id, "finalizing"), timeout_s=40)
        assert job.runner.id == first
    await db.close()
    await exactly_once(stack, model, tenant, batch_id, replica)
    assert max(line.attempt for line in await line_rows(stack.db, batch_id)) == 1, "lines that had ended were stored later"


async def test_the_queue_is_away_while_lines_run(stack: Stack) -> None:
    model, tenant = await stack.model("queue"), await stack.tenant()
    replica = await stack.replica(model, "--fake-token-ms 10")
    texts = Texts()
    batch_id = await batch_of(stack, texts, tenant, model, [chat(f"l{number}", "queue", max_tokens=20) for number in range(100)])
    async with runner(stack, texts):

        async def has_begun() -> bool:
            return bool((await batch_row(stack.db, batch_id)).completed)

        await until(has_begun)
        # Valkey refuses every write, as a full server does.
        await stack.redis.config_set("maxmemory", 1)
        try:

            async def engine_is_idle() -> bool:
                return await replica.running() == 0

            await until(engine_is_idle, timeout_s=20)
        finally:
            await stack.redis.config_set("maxmemory", 0)
        await until(partial(has_status, stack, batch_id, "finalizing"), timeout_s=40)
    await exactly_once(stack, model, tenant, batch_id, replica)
