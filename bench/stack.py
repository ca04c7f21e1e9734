"""A whole service to measure: `lmaas up` in a home of its own, with tenants and adapters made for it."""

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
#: Limits of the tenants here: none that a load could meet, since the scheduler and the engine are measured, not the limits.
LIMITS = {"max_queued": 10_000, "max_adapters": 100}


@dataclass(frozen=True)
class Tenant:
    """A tenant and its key for inference."""

    id: str
    name: str
    key: str


class Stack:
    """A running service. `base_model` is the name of its one base model."""

    def __init__(self, credentials: dict[str, Any], base_model: str, up_s: float) -> None:
        self._url = str(credentials["base_url"])
        self._operator = ApiClient(self._url, credentials["operator_key"])
        self._credentials = credentials
        self.base_model = base_model
        #: How long `lmaas up` took until it said that it is up.
        self.up_s = up_s

    def close(self) -> None:
        """Close the operator's connections."""
        self._operator.close()

    async def tenant(self, name: str) -> Tenant:
        """A new tenant."""

        def create() -> Tenant:
            made = self._operator.send(table.CREATE_TENANT, {"name": name, **LIMITS})
            key = self._operator.send(table.CREATE_KEY, {"role": "inference"}, tenant=name)
            return Tenant(made["id"], name, key["key"])

        return await asyncio.to_thread(create)

    def base(self, tenant: Tenant) -> Place:
        """The base model, as this tenant reaches it."""
        return Place(self._url, self.base_model, tenant.key)

    def known(self, tenant: str) -> Place:
        """The base model, as a tenant of the manifests reaches it."""
        return Place(self._url, self.base_model, self._credentials["tenants"][tenant]["api_key"])

    async def adapter(self, tenant: Tenant, name: str, folder: Path) -> "Adapter":
        """Upload an adapter for this tenant."""
        owner = self._operator.for_tenant(tenant.name)
        made = await asyncio.to_thread(owner.upload, name, self.base_model, folder)
        return Adapter(Place(self._url, name, tenant.key), f"{tenant.id}-{made['content_hash']}")

    async def replicas(self) -> list[dict[str, Any]]:
        """The replicas that have not ended, as the operator API shows them."""
        return await asyncio.to_thread(self._operator.items, table.LIST_REPLICAS)

    async def keep_one_engine(self) -> None:
        """Keep an engine running. Requests straight to it are invisible to lmaas, which would stop it as idle."""
        await asyncio.to_thread(self._operator.send, table.CHANGE_MODEL, {"min_replicas": 1}, model=self.base_model)

    async def engine_url(self) -> str:
        """Where the one engine that runs listens. Raises RuntimeError if none does: ask for something first."""
        ready = [str(row["url"]) for row in await self.replicas() if row["observed"] == "ready"]
        if len(ready) != 1:
            raise RuntimeError(f"one engine should run, but {len(ready)} do")
        return ready[0]


@dataclass(frozen=True)
class Adapter:
    """An uploaded adapter: where its tenant reaches it, and its name on the engine once it has been used."""

    through: Place
    engine_name: str

    def straight(self, engine_url: str) -> Place:
        """The same adapter on the same engine, without lmaas between."""
        return Place(f"{engine_url}/v1", self.engine_name)


@asynccontextmanager
async def stack(model: Path, home: Path, **settings: object) -> AsyncIterator[Stack]:
    """Run a service over `model` with its state in `home` and these settings (`engine_max_loras=2`). Its tenants are yet to be made."""
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
        # Beside the home folder: `lmaas up` takes none that has files of others in it.
        self._path = home.with_name(f"{home.name}.up.log")

    def open(self) -> BinaryIO:
        """The file, to write to."""
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
