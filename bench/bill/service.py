"""A service with real engines and several pools: one that all tenants share, and a separate one for each tenant."""

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from sqlalchemy import func, select

from bench.client import Place
from bench.gateways.processes import free_port, running
from lmaas.api import table
from lmaas.config import Settings
from lmaas.errors import SettingsError
from lmaas.manifests.client import ApiClient
from lmaas.simulation.profile import Profile
from lmaas.states import EnginePhase
from lmaas.store.database import Database
from lmaas.store.migrate import upgrade
from lmaas.store.models import BaseModel, put_base_model
from lmaas.store.replicas import Replica, list_replicas
from lmaas.store.scopes import SYSTEM
from lmaas.store.tables import engine_time
from lmaas.up.bootstrap import ensure_operator_key, register_model
from lmaas.up.embedded import embedded_servers

ADAPTER = Path(__file__).parents[2] / "tenants" / "adapters" / "acme-json"
#: A longer timeout would only make each run wait for its end.
IDLE_TIMEOUT_S = 10.0
GONE_S = 120.0
LIMITS = {"max_queued": 10_000, "max_adapters": 100}


@dataclass(frozen=True)
class Places:
    """The models that a tenant calls: its adapter in the shared pool, and its own pool."""

    shared: Place
    own: Place


@dataclass
class Service:
    """A running service. `shared` is the base model of all tenants, `own` has one for each tenant, and `places` are the models that each
    tenant calls."""

    settings: Settings
    db: Database
    operator: ApiClient
    shared: BaseModel
    own: dict[str, BaseModel]
    places: dict[str, Places]

    def sizes(self) -> Profile:
        """Return a profile with the sizes of the engines. Its times are not measured yet."""
        model = self.shared
        return Profile(slots=model.max_num_seqs, adapter_slots=model.max_loras, adapters_resident=max(model.max_cpu_loras, model.max_loras))

    async def engine_ms(self, models: Sequence[BaseModel]) -> dict[EnginePhase, int]:
        """Return the total time of all engines of these base models by phase, in ms."""
        query = (
            select(engine_time.c.phase, func.sum(engine_time.c.ms))
            .where(engine_time.c.base_model_id.in_([model.id for model in models]))
            .group_by(engine_time.c.phase)
        )
        async with self.db.begin(SYSTEM) as connection:
            found = {EnginePhase(phase): int(ms) for phase, ms in await connection.execute(query)}
        return dict.fromkeys(EnginePhase, 0) | found

    async def gone(self, within_s: float = GONE_S) -> None:
        """Wait until no engine is left. Raises TimeoutError."""
        async with asyncio.timeout(within_s):
            while True:
                if not await list_replicas(self.db):
                    return
                await asyncio.sleep(0.2)

    async def replicas(self, models: Sequence[BaseModel]) -> list[Replica]:
        """Return all replicas of these base models, including ended ones, newest first."""
        found = [await list_replicas(self.db, base_model_id=model.id, ended=True) for model in models]
        return sorted((replica for some in found for replica in some), key=lambda replica: replica.created_at, reverse=True)


@asynccontextmanager
async def service(model: Path, folder: Path, tenants: Sequence[str]) -> AsyncIterator[Service]:
    """Run a service over this model for these tenants. No engine runs until the first request."""
    given = Settings(home=folder / "home", model=str(model), idle_timeout_s=IDLE_TIMEOUT_S, drain_timeout_s=5, log_level="WARNING")
    # The capacity is set so that every tenant can have its engine at the same time, on any machine.
    given = replace(given, engine_args="--no-enable-prefix-caching", port=free_port(), local_cpus=float(1 + len(tenants)))
    given.home.mkdir(parents=True)
    console = Console(quiet=True)
    with embedded_servers(given) as settings:
        await asyncio.to_thread(upgrade, str(settings.database_url))
        db = Database(str(settings.database_url))
        async with AsyncExitStack() as exits:
            exits.push_async_callback(db.close)
            shared = await register_model(settings, db, console)
            own = {tenant: await put_base_model(db, replace(shared, id="", name=f"own-{tenant}")) for tenant in tenants}
            operator_key = await ensure_operator_key(settings, db)
            for command in ("controller", "gateway"):
                line = [sys.executable, "-m", "lmaas", command]
                await exits.enter_async_context(running(line, folder / f"{command}.log", settings.environment()))
            operator = exits.enter_context(closing(ApiClient(settings.base_url, operator_key)))
            await asyncio.to_thread(_ready, operator)
            places = {tenant: await asyncio.to_thread(_tenant, settings, operator, tenant, shared, own[tenant]) for tenant in tenants}
            try:
                yield Service(settings, db, operator, shared, own, places)
            finally:
                for replica in await list_replicas(db):
                    await asyncio.to_thread(operator.send, table.STOP_REPLICA, replica=replica.id)
                await Service(settings, db, operator, shared, own, places).gone()


def _ready(operator: ApiClient) -> None:
    for _ in range(300):
        with contextlib.suppress(SettingsError):
            operator.check_ready()
            return
        time.sleep(0.2)
    raise RuntimeError("the gateway does not start")


def _tenant(settings: Settings, operator: ApiClient, name: str, shared: BaseModel, own: BaseModel) -> Places:
    operator.send(table.CREATE_TENANT, {"name": name, **LIMITS})
    owner = operator.for_tenant(name)
    key = str(owner.send(table.CREATE_KEY, {"role": "inference"})["key"])
    owner.upload("shared-bot", shared.name, ADAPTER)
    owner.upload("own-bot", own.name, ADAPTER)
    return Places(Place(settings.base_url, "shared-bot", key), Place(settings.base_url, "own-bot", key))
