"""A service whose parts are separate processes: real Postgres and Valkey, a controller, a replica, gateways."""

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
from rich.console import Console

from bench.gateways.processes import START_S, TREE, Proxy, Running, free_port, running
from bench.gateways.protocols import EMBEDDER
from lmaas.api import table
from lmaas.config import Settings
from lmaas.errors import ApiError, SettingsError
from lmaas.manifests.apply import apply, working_keys
from lmaas.manifests.client import ApiClient
from lmaas.manifests.folder import read_folder
from lmaas.states import Observed, PoolKind
from lmaas.store.database import Database
from lmaas.store.migrate import upgrade
from lmaas.store.models import BaseModel, change_base_model, put_base_model
from lmaas.store.replicas import list_replicas
from lmaas.up.bootstrap import ensure_operator_key, register_model
from lmaas.up.embedded import embedded_servers

TENANT, ADAPTER = "acme", "json-bot"
TENANTS = Path(__file__).parents[2] / "tenants"
#: More slots than the connections of any load, so that no request waits for a grant.
SLOTS = 256
#: Limits that are checked for every request and never reached.
LIMITS = {
    "requests_per_minute": 100_000_000,
    "tokens_per_minute": 1_000_000_000,
    "max_concurrent": 100_000,
    "tokens_per_month": 1_000_000_000_000,
    "budget_per_month": 1_000_000_000_000,
    "max_queued": 10_000,
}


@dataclass
class Service:
    """A running service with one tenant's adapter. `limits` are those of LIMITS that its API accepts."""

    settings: Settings
    db: Database
    model: BaseModel
    engine_url: str
    operator_key: str
    api_key: str
    limits: Sequence[str]
    folder: Path
    exits: AsyncExitStack

    async def pace(self, step_ms: float) -> None:
        """Set the milliseconds between the engine's tokens. With 0 it generates as fast as it can."""
        async with aiohttp.ClientSession() as http, http.post(f"{self.engine_url}/pace", json={"ms": step_ms}) as response:
            response.raise_for_status()

    async def gateway(self, name: str, *command: str, redis_url: str | None = None, tree: Path = TREE) -> Proxy:
        """Start another gateway, `python -m` with `command`, of this or another checkout. It ends with the service, and may not be ready
        when this returns."""
        settings = replace(self.settings, redis_url=redis_url or self.settings.redis_url)
        process, settings = await _gateway(settings, self.folder, name, command, self.exits, tree)
        return Proxy(process, f"{settings.base_url}/chat/completions", ADAPTER, {"authorization": f"Bearer {self.api_key}"})

    def tenants(self, gateway: Proxy, count: int) -> list[str]:
        """Create this many tenants with generous limits, through this gateway, and return their keys."""
        client = ApiClient(gateway.url.partition("/chat/")[0], self.operator_key)
        keys = []
        for number in range(count):
            client.send(table.CREATE_TENANT, {"name": f"waiting-{number}", **{name: LIMITS[name] for name in self.limits}})
            keys.append(working_keys(f"waiting-{number}", {}, client)["api_key"])
        client.close()
        return keys


async def _gateway(
    settings: Settings, folder: Path, name: str, command: Sequence[str], exits: AsyncExitStack, tree: Path = TREE
) -> tuple[Running, Settings]:
    settings = replace(settings, port=free_port())
    variables = settings.environment()
    if tree != TREE:
        # Another version refuses settings that it does not have.
        known = await _settings(tree)
        variables = {name: value for name, value in variables.items() if name in known}
    return await exits.enter_async_context(running([sys.executable, "-m", *command], folder / f"{name}.log", variables, tree)), settings


async def _settings(tree: Path) -> set[str]:
    """Return the variables of the settings of another checkout."""
    show = "from lmaas.config import Settings; print(*Settings.__dataclass_fields__)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", show, cwd=tree, stdout=asyncio.subprocess.PIPE)
    return {f"LMAAS_{name.upper()}" for name in (await process.communicate())[0].decode().split()}


@asynccontextmanager
async def service(folder: Path) -> AsyncIterator[Service]:
    """Run a service with the sample tenants and generous limits. Its engines are `bench.gateways.engine`: one to chat, one to embed."""
    given = Settings(
        home=folder / "home",
        engine_module="bench.gateways.engine",
        engine_max_num_seqs=SLOTS,
        idle_timeout_s=86400,
        drain_timeout_s=1,
        log_level="WARNING",
    )
    given.home.mkdir(parents=True)
    console = Console(quiet=True)
    with embedded_servers(given) as settings:
        await asyncio.to_thread(upgrade, str(settings.database_url))
        db = Database(str(settings.database_url))
        async with AsyncExitStack() as exits:
            exits.push_async_callback(db.close)
            model = await register_model(settings, db, console)
            await change_base_model(db, model.name, {"min_replicas": 1})
            await put_base_model(db, replace(model, id="", name=EMBEDDER, kind=PoolKind.EMBED, min_replicas=1))
            operator_key = await ensure_operator_key(settings, db)
            controller = [sys.executable, "-m", "lmaas", "controller"]
            await exits.enter_async_context(running(controller, folder / "controller.log", settings.environment()))
            urls = await _engine_urls(db, 2)
            # Only for creating the tenants. The measured processes are started later.
            async with AsyncExitStack() as first:
                process, at = await _gateway(settings, folder, "first", ("lmaas", "gateway"), first)
                api_key, limits = await asyncio.to_thread(_prepare, ApiClient(at.base_url, operator_key), process)
            yield Service(settings, db, model, urls[model.id], operator_key, api_key, limits, folder, exits)


async def _engine_urls(db: Database, count: int) -> dict[str, str]:
    """Wait until this many engines are ready. Returns their URLs by the ids of their base models."""
    async with asyncio.timeout(START_S):
        while True:
            replicas = [each for each in await list_replicas(db) if each.observed == Observed.READY]
            if len(replicas) >= count:
                return {each.base_model_id: each.url for each in replicas if each.url is not None}
            await asyncio.sleep(0.1)


def _prepare(client: ApiClient, gateway: Running) -> tuple[str, list[str]]:
    """Create the tenants. Returns the key of one, and the limits that the service accepts."""
    while gateway.process.returncode is None:
        with suppress(SettingsError):
            client.check_ready()
            break
    apply(read_folder(TENANTS), client)
    taken = []
    for name, value in LIMITS.items():
        try:
            client.send(table.CHANGE_TENANT, {name: value}, tenant=TENANT)
            taken.append(name)
        except ApiError as error:
            if error.status != 400:
                raise
    key = working_keys(TENANT, {}, client)["api_key"]
    client.close()
    return key, taken
