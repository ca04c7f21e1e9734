"""Measures the console on a full service: the time to the first byte of its slowest page, and the bytes that a browser loads at most.

The database has TENANTS tenants, ADAPTERS adapters and EVENTS requests of a month, which were in the ledger before the migration that
counts them. Gateway and console are processes of their own. Each page of the navigation is opened in turn, as an operator and as a tenant's
administrator, over the gateway, as a browser does.
"""

import asyncio
import os
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from statistics import median

import httpx
from sqlalchemy import make_url, text

from bench.frame import Bar, Say, attempted, summary
from bench.reports import PASSWORD
from lmaas.console.assets import FOLDER
from lmaas.console.registry import PAGES
from lmaas.keys import hash_key, new_key
from lmaas.process import bound_command
from lmaas.replica.address import free_port
from lmaas.store.database import Database, driver_url
from lmaas.store.migrate import upgrade
from lmaas.store.rights import LOGINS, DatabaseRole, role_name
from lmaas.store.scopes import SYSTEM
from lmaas.types import Role
from lmaas.up.embedded import postgres, valkey

FIRST_BYTE, WEIGHT = "console_first_byte_ms", "console_weight_kb"
NAMES = (FIRST_BYTE, WEIGHT)
TENANTS, ADAPTERS, EVENTS = 1_000, 10_000, 1_000_000
ROUNDS = 7
READY_S = 60.0
#: The migration before the daily sums.
BEFORE = "0018"
LOADED = frozenset({".css", ".js", ".svg"})

ROWS = (
    """
    INSERT INTO tenants (id, name, tier, max_queued, max_adapters)
    SELECT 'ten_' || n, 'tenant-' || n, 'standard', 64, 20 FROM generate_series(0, CAST(:tenants AS int) - 1) n
    """,
    """
    INSERT INTO base_models (id, name, source, kind, dtype, linears, max_lora_rank, max_loras, max_cpu_loras, max_num_seqs, max_model_len,
        kv_cache_bytes, engine_args)
    VALUES ('mod_1', 'base', 'none', 'generate', 'float32', '{}', 16, 8, 64, 16, 2048, 1000000, '')
    """,
    """
    INSERT INTO adapters (id, tenant_id, name, base_model_id)
    SELECT 'ada_' || n, 'ten_' || n % CAST(:tenants AS int), 'bot-' || n, 'mod_1' FROM generate_series(0, CAST(:adapters AS int) - 1) n
    """,
    """
    INSERT INTO usage_events (request_id, tenant_id, key_id, base_model, model, adapter, status, stream, prompt_tokens, cached_tokens,
        completion_tokens, queue_ms, load_ms, run_ms, replica_id, created_at, charge_picousd)
    SELECT 'req_' || n, 'ten_' || n % CAST(:tenants AS int), 'key_' || n % CAST(:tenants AS int), 'base',
        'bot-' || n % CAST(:adapters AS int) || '@1', 'x', CASE WHEN n % 50 = 0 THEN 'failed' ELSE 'completed' END, false, 100, 10, 50,
        1, 0, 900, 'rep_1', now() - n * interval '30 days' / CAST(:events AS int), 1000000
    FROM generate_series(0, CAST(:events AS int) - 1) n
    """,
)


async def measure(model: Path, folder: Path, wanted: Sequence[str], say: Say) -> AsyncIterator[Bar]:
    """Measure the requested bars of NAMES."""
    if not wanted:
        return
    with ExitStack() as exits:
        say(f"a service with {TENANTS:,} tenants, {ADAPTERS:,} adapters and {EVENTS:,} requests")
        url, keys = await asyncio.to_thread(lambda: exits.enter_context(service(folder)))
        if FIRST_BYTE in wanted:
            yield await attempted(FIRST_BYTE, _first_byte(url, keys))
        if WEIGHT in wanted:
            yield await attempted(WEIGHT, _weight(url, keys))


@contextmanager
def service(folder: Path, tenants: int = TENANTS, adapters: int = ADAPTERS, events: int = EVENTS) -> Iterator[tuple[str, dict[Role, str]]]:
    """Run a full service. Yields its address, and the keys of an operator and of a tenant's administrator."""
    keys = {role: new_key() for role in (Role.OPERATOR, Role.TENANT_ADMIN)}
    with ExitStack() as exits:
        database = make_url(driver_url(exits.enter_context(postgres(folder / "postgres"))))
        shown = database.render_as_string(hide_password=False)
        upgrade(shown, BEFORE)
        asyncio.run(_fill(shown, keys, {"tenants": tenants, "adapters": adapters, "events": events}))
        upgrade(shown, passwords=dict.fromkeys(LOGINS, PASSWORD))
        gateway, console = free_port("127.0.0.1"), free_port("127.0.0.1")
        login = database.set(username=role_name("lmaas", DatabaseRole.GATEWAY), password=PASSWORD, drivername="postgresql")
        given = {
            "LMAAS_HOME": str(folder / "home"),
            "LMAAS_PORT": str(gateway),
            "LMAAS_CONSOLE_PORT": str(console),
            "LMAAS_CONSOLE_URL": f"http://127.0.0.1:{console}",
            "LMAAS_DATABASE_URL": login.render_as_string(hide_password=False),
            "LMAAS_REDIS_URL": exits.enter_context(valkey(folder / "valkey")),
        }
        for name in ("gateway", "console"):
            command = bound_command([sys.executable, "-m", "lmaas", name])
            with (folder / f"{name}.log").open("wb") as log:
                process = subprocess.Popen(command, env=os.environ | given, stdout=log, stderr=log, start_new_session=True)
            exits.callback(process.wait)
            exits.callback(process.terminate)
        url = f"http://127.0.0.1:{gateway}"
        _wait(url)
        yield url, keys


def _wait(url: str) -> None:
    deadline = time.monotonic() + READY_S
    while True:
        try:
            if httpx.get(f"{url}/console/sign-in", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        if time.monotonic() > deadline:
            raise RuntimeError(f"the console was not ready within {READY_S:.0f} s")
        time.sleep(0.2)


async def _fill(url: str, keys: dict[Role, str], counts: dict[str, int]) -> None:
    db = Database(url)
    async with db.begin(SYSTEM) as connection:
        await connection.execute(text("SET LOCAL statement_timeout = '10min'"))
        for statement in ROWS:
            names = {name: count for name, count in counts.items() if f":{name}" in statement}
            await connection.execute(text(statement), names)
        for role, key in keys.items():
            values = {
                "id": f"key_{secrets.token_hex(4)}",
                "tenant": None if role is Role.OPERATOR else "ten_1",
                "role": role.value,
                "hash": hash_key(key),
            }
            await connection.execute(
                text("INSERT INTO api_keys (id, tenant_id, role, name, hash, prefix) VALUES (:id, :tenant, :role, '', :hash, '')"), values
            )
    async with db.autocommit() as connection:
        await connection.execute(text("ANALYZE"))
    await db.close()


@asynccontextmanager
async def _signed_in(url: str, key: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
        response = await client.post("/console/sign-in", data={"key": key}, headers={"origin": url})
        if response.status_code != 303:
            raise RuntimeError(f"signing in failed with status {response.status_code}")
        yield client


def pages(role: Role) -> list[str]:
    """Return the paths of the navigation for a role. An operator selects one tenant where a page is about one."""
    return [
        f"/console{page.path}" + ("?tenant=tenant-1" if page.of_tenant and role is Role.OPERATOR else "")
        for page in PAGES
        if role in page.roles
    ]


async def _first_byte(url: str, keys: dict[Role, str]) -> Bar:
    took: dict[str, list[float]] = {}
    for role, key in keys.items():
        async with _signed_in(url, key) as client:
            for _ in range(ROUNDS):
                for path in pages(role):
                    began = time.perf_counter()
                    async with client.stream("GET", path) as response:
                        await anext(response.aiter_raw())
                        took.setdefault(f"{role}: {path}", []).append(1000 * (time.perf_counter() - began))
                    if response.status_code != 200:
                        raise RuntimeError(f"{path} has status {response.status_code}")
    medians = {name: median(each) for name, each in took.items()}
    slowest = max(medians, key=lambda name: medians[name])
    detail = {"slowest": slowest, "ms": {name: round(value, 1) for name, value in medians.items()}}
    return Bar(FIRST_BYTE, medians[slowest], "<=", 300.0, summary(took[slowest]) | detail)


async def _weight(url: str, keys: dict[Role, str]) -> Bar:
    assets = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.suffix in LOADED)
    sizes: dict[str, int] = {}
    for role, key in keys.items():
        async with _signed_in(url, key) as client:
            for path in pages(role):
                # Includes the part that the page of money requests once it is shown.
                whole = path + ("&" if "?" in path else "?") + "whole=1"
                sizes[f"{role}: {path}"] = len((await client.get(whole)).content)
    largest = max(sizes, key=lambda name: sizes[name])
    return Bar(
        WEIGHT,
        (assets + sizes[largest]) / 1000,
        "<=",
        200.0,
        {"assets_kb": assets / 1000, "largest": largest, "largest_kb": sizes[largest] / 1000},
    )
