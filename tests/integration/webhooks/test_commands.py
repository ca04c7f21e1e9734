"""`lmaas webhooks`, with a service and a job runner."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lmaas.keys import hash_key, new_key, shown_prefix
from lmaas.store.rights import DatabaseRole
from lmaas.store.tenants import create_key
from lmaas.types import Role
from tests.integration.api.test_base_models import lmaas
from tests.integration.gateway.stack import Stack, running
from tests.integration.webhooks.conftest import Events
from tests.integration.webhooks.target import status, target


@pytest.fixture
async def stack(postgres_url: str, valkey_url: str, tmp_path: Path) -> AsyncIterator[Stack]:
    async with running(postgres_url, valkey_url, tmp_path, webhook_private_targets="127.0.0.0/8") as stack:
        yield stack


async def test_a_webhook_by_commands(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmaas.jobs.webhooks.LOOK_S", 0.05)
    tenant, key = await stack.tenant(), new_key()
    await create_key(stack.db, tenant.id, Role.TENANT_ADMIN, "admin", hash_key(key), shown_prefix(key))

    async def run(*arguments: str, code: int = 0) -> str:
        ended, out, err = await lmaas(stack, key, "webhooks", *arguments)
        assert ended == code, (arguments, out, err)
        return out + err if code else out

    assert "must begin with https" in await run("create", "ftp://example.com/", code=1)
    async with target() as found:
        events = Events(stack.db, stack.database(DatabaseRole.JOBS), tenant.id, found)
        made = json.loads(await run("create", found.url, "--event", "batch.failed", "--name", "mine", "--json"))
        assert made["signing_secret"].startswith("whsec_")
        listed = await run("list")
        assert made["id"] in listed
        assert made["signing_secret"] not in listed
        async with events.runner():
            assert "delivered" in await run("test", made["id"])
            found.answer = status(500)
            assert "HTTP 500" in await run("test", made["id"], code=1)
            assert "failing" in await run("show", made["id"])
        [failed, _] = json.loads(await run("deliveries", made["id"], "--json"))
        assert (failed["status_code"], failed["state"], failed["attempts"]) == (500, "pending", 1)
        assert "whsec_" in await run("rotate-secret", made["id"], "--overlap", "60")
        assert "batch.completed" in await run("change", made["id"], "--event", "batch.completed")
        assert "not both" in await run("change", made["id"], "--event", "batch.failed", "--all-events", code=2)
        off = await run("change", made["id"], "--all-events", "--off")
        assert "switched off by request" in off
        assert "switched off" in await run("redeliver", made["id"], failed["id"], code=1)
        assert "is deleted" in await run("delete", made["id"], "--yes")
        assert "does not exist" in await run("show", made["id"], code=1)
