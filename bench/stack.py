"""A whole service to measure: `lmaas up` in a new home, with tenants and adapters created for it."""

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from bench.client import Place
from bench.engines import stopped
from lmaas.api import table
from lmaas.manifests.client import ApiClient
from lmaas.process import bound_command

_READY_S, _STOP_S = 180, 120
#: Limits that no load reaches, because the scheduler and the engine are measured, not the limits.
LIMITS = {"max_queued": 10_000, "max_adapters": 100}


@dataclass(frozen=True)
class Tenant:
    """A tenant and its key for inference."""

    id: str
    name: str
    key: str


class Stack:
    """A running service. `base_model` is the name of its default base model."""

    def __init__(self, credentials: dict[str, Any], base_model: str, up_s: float) -> None:
        self._url = str(credentials["base_url"])
        self._operator = ApiClient(self._url, credentials["operator_key"])
        self._credentials = credentials
        self.base_model = base_model
        #: The seconds that `lmaas up` took until it reported that it is up.
        self.up_s = up_s

    def close(self) -> None:
        """Close the operator's connections."""
        self._operator.close()

    async def tenant(self, name: str) -> Tenant:
        """Create a tenant."""

        def create() -> Tenant:
            made = self._operator.send(table.CREATE_TENANT, {"name": name, **LIMITS})
            key = self._operator.send(table.CREATE_KEY, {"role": "inference"}, tenant=name)
            return Tenant(made["id"], name, key["key"])

        return await asyncio.to_thread(create)

    def base(self, tenant: Tenant) -> Place:
        """Return the base model, with this tenant's key."""
        return Place(self._url, self.base_model, tenant.key)

    def known(self, tenant: str) -> Place:
        """Return the base model, with the key of a tenant of the manifests."""
        return Place(self._url, self.base_model, self._credentials["tenants"][tenant]["api_key"])

    async def adapter(self, tenant: Tenant, name: str, folder: Path) -> "Adapter":
        """Upload an adapter for this tenant."""
        owner = self._operator.for_tenant(tenant.name)
        made = await asyncio.to_thread(owner.upload, name, self.base_model, folder)
        return Adapter(Place(self._url, name, tenant.key), f"{tenant.id}-{made['content_hash']}")

    async def replicas(self) -> list[dict[str, Any]]:
        """Return the replicas that have not ended, as the management API shows them."""
        return await asyncio.to_thread(self._operator.items, table.LIST_REPLICAS)

    async def keep_one_engine(self, model: str | None = None) -> None:
        """Keep an engine running, of the default base model or of this one. lmaas does not see direct requests to it, and would stop it as
        idle."""
        await asyncio.to_thread(self._operator.send, table.CHANGE_MODEL, {"min_replicas": 1}, model=model or self.base_model)

    async def engine_url(self) -> str:
        """Return the URL of the only running engine. Raises RuntimeError if none runs; send a request first."""
        ready = [str(row["url"]) for row in await self.replicas() if row["observed"] == "ready"]
        if len(ready) != 1:
            raise RuntimeError(f"one engine should run, but {len(ready)} do")
        return ready[0]


@dataclass(frozen=True)
class Adapter:
    """An uploaded adapter: its model for the tenant, and its name on the engine once it has been used."""

    through: Place
    engine_name: str

    def straight(self, engine_url: str) -> Place:
        """The same adapter on the same engine, for direct requests."""
        return Place(f"{engine_url}/v1", self.engine_name)


@asynccontextmanager
async def stack(model: Path, home: Path, **settings: object) -> AsyncIterator[Stack]:
    """Run a service over `model` with its state in `home` and these settings (`engine_max_loras=2`). It has no tenants yet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LMAAS_")}
    chosen = {"home": home, "port": port, "model": model, "tenants": home / "none", "idle_timeout_s": 3600} | settings
    environment |= {f"LMAAS_{name.upper()}": str(value) for name, value in chosen.items()}
    log, began = _Log(home), time.perf_counter()
    with log.open() as output:
        command = bound_command([sys.executable, "-m", "lmaas", "up"])
        process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=output, stderr=output)
    try:
        await _ready(process, log)
        up_s = time.perf_counter() - began
        with closing(Stack(json.loads((home / "credentials.json").read_text()), model.name.lower(), up_s)) as running:
            yield running
    finally:
        await stopped(process, signal.SIGINT, _STOP_S)


class _Log:
    """The output of `lmaas up`."""

    def __init__(self, home: Path) -> None:
        home.parent.mkdir(parents=True, exist_ok=True)
        # Beside the home folder, because `lmaas up` refuses a home with other files.
        self._path = home.with_name(f"{home.name}.up.log")

    def open(self) -> BinaryIO:
        """Return the file, opened for writing."""
        return self._path.open("wb")

    def text(self) -> str:
        """Return the output so far."""
        return self._path.read_text(errors="replace")


async def _ready(process: asyncio.subprocess.Process, log: _Log) -> None:
    async with asyncio.timeout(_READY_S):
        while "lmaas is up" not in log.text():
            if process.returncode is not None:
                raise RuntimeError(f"lmaas did not start:\n{log.text()[-2000:]}")
            await asyncio.sleep(0.02)
