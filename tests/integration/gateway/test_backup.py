"""A backup of a running stack by deploy/backup, restored on another Postgres and in another object store, is complete and serves."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import httpx
import pytest
from sqlalchemy import MetaData, create_engine, select

from lmaas.store.database import driver_url
from lmaas.store.models import list_base_models
from lmaas.store.rights import LOGINS, DatabaseRole
from lmaas.up import embedded
from lmaas.up.postgres import PROGRAMS, WHEEL
from tests.integration.gateway.stack import CHAT, Stack, Tenant, running, running_on
from tests.support.databases import ROLE_PASSWORD, login_url

SCRIPTS = next(parent for parent in Path(__file__).parents if (parent / "pyproject.toml").exists()) / "deploy" / "backup"
BIN = Path(str(distribution(WHEEL).locate_file(PROGRAMS))) / "bin"
#: Columns that supervisors write every few seconds.
MOVING = frozenset({"engine_time", "replicas"})


def script(name: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script of deploy/backup, with the embedded Postgres' programs."""
    environment = {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": os.environ.get("PYTHONPATH", ""), **variables}
    command = ["sh", str(SCRIPTS / name), str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def restore(folder: Path, url: str, objects: Path) -> subprocess.CompletedProcess[str]:
    passwords = ",".join(f"{role}={ROLE_PASSWORD}" for role in LOGINS)
    lmaas = str(Path(sys.executable).with_name("lmaas"))
    return script("restore.sh", folder, DATABASE_URL=url, OBJECTS=str(objects), LMAAS=lmaas, LMAAS_DATABASE_PASSWORDS=passwords)


def rows(url: str) -> dict[str, list[str]]:
    """Return all rows of all tables, as text in a fixed order."""
    engine, tables = create_engine(driver_url(url)), MetaData()
    with engine.connect() as connection:
        tables.reflect(connection)
        found = {name: sorted(str(row) for row in connection.execute(select(table))) for name, table in tables.tables.items()}
    engine.dispose()
    return found


@pytest.fixture
def other_url(tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database of another Postgres, which has none of lmaas's roles."""
    with embedded.postgres(tmp_path / "other" / "data") as url:
        yield url


async def uploaded(http: httpx.AsyncClient) -> str:
    answer = await http.post("/v1/files", files={"file": ("notes.txt", b"kept")}, data={"purpose": "user_data"})
    return str(answer.raise_for_status().json()["id"])


async def ask(http: httpx.AsyncClient, model: str) -> int:
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    return int((await http.post(CHAT, json=body)).raise_for_status().json()["usage"]["completion_tokens"])


async def test_what_is_restored_is_what_was_backed_up(postgres_url: str, valkey_url: str, other_url: str, tmp_path: Path) -> None:
    before, after, backup = tmp_path / "before", tmp_path / "after", tmp_path / "backup"
    before.mkdir()
    async with running(postgres_url, valkey_url, before) as stack:
        model = await stack.model("base")
        await stack.replica(model, "--fake-token-ms 1")
        tenant = await stack.tenant()
        await stack.adapter(tenant, "robot", model)
        async with stack.client(tenant) as http:
            tokens = await ask(http, "base") + await ask(http, "robot")
            file_id = await uploaded(http)
        ledger = await stack.ledger(model, tenant)
        # The login with the fewest rights that can read every row.
        url = login_url(str(stack.settings.database_url), DatabaseRole.MIGRATOR).replace("postgresql+psycopg://", "postgresql://")
        made = await asyncio.to_thread(script, "backup.sh", backup, DATABASE_URL=url, OBJECTS=str(before / "objects"))
        assert made.returncode == 0, made.stderr
        kept = await asyncio.to_thread(rows, str(stack.settings.database_url))

    assert sum(event.completion_tokens for event in ledger) == tokens
    restored = await asyncio.to_thread(restore, backup, other_url, after / "objects")
    assert restored.returncode == 0, restored.stdout + restored.stderr
    found = await asyncio.to_thread(rows, other_url)
    assert found.keys() == kept.keys()
    assert {name for name in found if found[name] != kept[name]} <= MOVING
    assert all(found[name] for name in ("usage_events", "adapters", "adapter_versions", "api_keys", "files"))
    async with running_on(other_url, valkey_url, after) as stack:
        await check_service(stack, Tenant(tenant.id, tenant.key, tenant.key_id), file_id, [event.request_id for event in ledger])


async def check_service(stack: Stack, tenant: Tenant, file_id: str, ledger: list[str]) -> None:
    """Serve with the old key, the old adapter and the old file, and continue the old ledger."""
    [model] = await list_base_models(stack.db)
    await stack.replica(model, "--fake-token-ms 1")
    async with stack.client(tenant) as http:
        assert [each["id"] for each in (await http.get("/v1/adapters")).json()["data"]]
        assert await ask(http, "robot") > 0
        assert (await http.get(f"/v1/files/{file_id}/content")).content == b"kept"
    assert [event.request_id for event in await stack.ledger(model, tenant)][1:] == ledger


def test_nothing_is_overwritten(database_url: str, tmp_path: Path) -> None:
    objects = tmp_path / "objects"
    objects.mkdir()
    backup = tmp_path / "backup"
    assert script("backup.sh", backup, DATABASE_URL=database_url).returncode == 0
    again = script("backup.sh", backup, DATABASE_URL=database_url)
    assert (again.returncode, "exists" in again.stderr) == (1, True)
    used = restore(backup, database_url, objects)
    assert (used.returncode, "Restore into an empty one." in used.stderr) == (1, True)
    (objects / "something").write_text("of another service")
    full = restore(backup, database_url, objects)
    assert (full.returncode, "is not empty" in full.stderr) == (1, True)
