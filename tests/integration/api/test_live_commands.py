"""`lmaas doctor`, `top` and `chat` with a real service."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from lmaas.cli.doctor import service
from lmaas.cli.doctor.findings import Level
from lmaas.store.pools import save_pool_state
from tests.integration.api.test_base_models import lmaas
from tests.integration.gateway.stack import Stack, running


@pytest.fixture
async def stack(postgres_url: str, valkey_url: str, tmp_path: Path) -> AsyncIterator[Stack]:
    async with running(postgres_url, valkey_url, tmp_path) as stack:
        yield stack


async def test_the_doctor_of_a_service_that_is_well(stack: Stack, operator_key: str) -> None:
    for key, role in ((operator_key, "an operator's"), ((await stack.tenant()).key, "a tenant's")):
        code, out, err = await lmaas(stack, key, "doctor", "--json")
        assert code == 0, out + err
        found = {each["check"]: each for each in json.loads(out)}
        assert found["service"]["says"] == f"{stack.url} is ready, and knows the key, which is {role}."
        assert found["clock"]["level"] == "ok"
    code, out, err = await lmaas(stack, "sk-lmaas-unknown", "doctor")
    assert (code, err) == (1, "")
    assert f"wrong service {stack.url} refuses the key." in " ".join(out.split())


async def test_the_doctor_of_servers(stack: Stack, postgres_url: str) -> None:
    database = await asyncio.to_thread(lambda: list(service.check_database(stack.settings)))
    assert [(finding.check, finding.level) for finding in database] == [("database", Level.OK), ("clock", Level.OK)]
    queue = await asyncio.to_thread(service.check_queue, stack.settings)
    assert queue is not None
    assert queue.level is not Level.WRONG
    empty = replace(stack.settings, database_url=postgres_url)
    [schema, _] = await asyncio.to_thread(lambda: list(service.check_database(empty)))
    assert (schema.level, schema.do) == (Level.WRONG, "Run `lmaas migrate`.")


async def test_top_shows_the_queue_of_a_pool(stack: Stack, operator_key: str) -> None:
    model = await stack.model("tiny")
    await save_pool_state(stack.db, model.id, {"wanted": 1, "queued": 7, "running": 3, "reason": "because"}, [])
    code, out, err = await lmaas(stack, operator_key, "top", "--once", "--json")
    assert code == 0, err
    [shown] = json.loads(out)["pools"]
    assert (shown["pool"]["queued"], shown["pool"]["running"]) == (7, 3)
    code, out, err = await lmaas(stack, (await stack.tenant()).key, "top")
    assert (code, out) == (1, "")
    assert "This needs an operator's key." in err


async def test_chat_with_a_model(stack: Stack) -> None:
    await stack.replica(await stack.model("tiny"))
    tenant = await stack.tenant()
    code, out, err = await lmaas(stack, tenant.key, "chat", "tiny", "Hi", "--max-tokens", "5", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["finish_reason"], found["tokens"]["completion"], len(found["answer"].split())) == ("length", 5, 5)
    code, out, err = await lmaas(stack, tenant.key, "chat", "tiny", "Hi", "--max-tokens", "5")
    assert (code, out, err) == (0, found["answer"] + "\n", "")
    code, out, err = await lmaas(stack, tenant.key, "chat", "none", "Hi")
    assert (code, out) == (1, "")
    assert "model_not_found" in err
