"""The whole service as real processes, which the test starts, kills and restarts as an init system would."""

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from redis import Redis as BlockingRedis

from lmaas.adapters.objects import AdapterFiles, source_of
from lmaas.app import object_store_url
from lmaas.config import Settings
from lmaas.keys import hash_key, new_key, shown_prefix
from lmaas.process import bound_command
from lmaas.scheduling.client import Scheduler, connect
from lmaas.states import PoolKind
from lmaas.store.adapters import add_version
from lmaas.store.database import Database
from lmaas.store.models import BaseModel, put_base_model
from lmaas.store.objects import Objects
from lmaas.store.tenants import create_key, create_tenant
from lmaas.types import Role
from lmaas.up import embedded
from tests.support.processes import command_of
from tests.support.verdict import Fault

MODEL = "base"
EMBEDDER = "embedder"
SLOTS = 5
GATEWAYS = 2
CONTROLLERS = 2
#: The time in which the test's engines generate one token.
TOKEN_MS = 15
#: The settings that a test does not change.
USUAL: dict[str, Any] = {
    "engine_module": "lmaas.testing.fake_engine",
    "engine_max_replicas": 2,
    "queue_deadline_s": 40,
    "drain_timeout_s": 10,
    "orphan_timeout_s": 30,
}


@dataclass(frozen=True, slots=True)
class Client:
    """A tenant's key for one worker, and the models that it may call."""

    tenant_id: str
    tenant: str
    key: str
    key_id: str
    models: tuple[str, ...]


class Service:
    """Postgres, Valkey, gateways, controllers, and the replicas that the controllers start. Created by `running`."""

    def __init__(self, home: Path, fake: str, changes: dict[str, Any], *, embeds: bool = False, runners: int = 0) -> None:
        self.settings = Settings(home=home)
        #: True if there is a second base model, EMBEDDER.
        self.embeds = embeds
        #: The names of the job runners.
        self.runners = [f"jobs-{number}" for number in range(runners)]
        self._fake, self._changes = fake, changes
        self.truth = home / "truth"
        self.faults: list[Fault] = []
        #: Replicas whose supervisor or engine the test has killed.
        self.killed_replicas: set[str] = set()
        self.model: BaseModel
        #: The base models, of which `model` is the first.
        self.models: list[BaseModel] = []
        self.db: Database
        self.scheduler: Scheduler
        self._postgres, self._valkey = ExitStack(), ExitStack()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ports = {f"gateway-{number}": _free_port() for number in range(GATEWAYS)}

    # Servers

    async def start_postgres(self) -> str:
        """Start Postgres on its existing data. Returns its URL, which stays the same."""
        # In a thread of the loop's executor, so that clients continue. Postgres ends with that thread, which lives as long as the loop.
        return await asyncio.to_thread(self._postgres.enter_context, embedded.postgres(self.settings.home / "postgres"))

    async def stop_postgres(self) -> None:
        """Stop Postgres. Connections are cut, and new ones are refused."""
        await asyncio.to_thread(self._postgres.close)

    def start_valkey(self, *, forgetful: bool = False) -> str:
        """Start Valkey with its earlier data or without any. Returns its URL, which stays the same."""
        self._valkey.close()
        if forgetful:
            shutil.rmtree(self.settings.home / "valkey")
        # Not in a thread, because the server ends with the thread that started it.
        return self._valkey.enter_context(embedded.valkey(self.settings.home / "valkey"))

    def kill_valkey(self) -> None:
        """Kill the server with `kill -9`."""
        os.kill(self._valkey_pid(), signal.SIGKILL)

    @contextmanager
    def stalled_valkey(self) -> Iterator[None]:
        """Suspend the server for the block. It still accepts connections, but does nothing more."""
        pid = self._valkey_pid()
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def _valkey_pid(self) -> int:
        with BlockingRedis.from_url(str(self.settings.redis_url)) as client:
            information: Any = client.info("server")
            return int(information["process_id"])

    # Processes of lmaas

    def start(self, name: str) -> None:
        """Start a gateway, a controller or a job runner."""
        log = self.settings.home / f"{name}.log"
        settings = replace(self.settings, port=self._ports[name]) if name in self._ports else self.settings
        inherited = {variable: value for variable, value in os.environ.items() if not variable.startswith("LMAAS_")}
        with log.open("ab") as output:
            self._processes[name] = subprocess.Popen(
                bound_command([sys.executable, "-m", "lmaas", name.partition("-")[0]]),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=inherited | settings.environment(),
            )

    def kill(self, name: str) -> None:
        """Kill a gateway, a controller or a job runner with `kill -9`."""
        self._processes[name].kill()
        self._processes[name].wait()

    @contextmanager
    def frozen(self, name: str) -> Iterator[None]:
        """Suspend a process for the block, unless it is killed meanwhile."""
        process = self._processes[name]
        process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process.send_signal(signal.SIGCONT)

    def terminate(self, name: str) -> "subprocess.Popen[bytes]":
        """Send SIGTERM and return the process, which may take some time to end."""
        self._processes[name].terminate()
        return self._processes[name]

    def process(self, name: str) -> "subprocess.Popen[bytes]":
        """Return a gateway, a controller or a job runner by name."""
        return self._processes[name]

    def ended(self) -> dict[str, int]:
        """Return the processes that `start` started and that ended without being killed by the test, with their exit codes."""
        return {name: code for name, process in self._processes.items() if (code := process.poll()) is not None}

    def url(self, gateway: str) -> str:
        """Return a gateway's URL."""
        return f"http://127.0.0.1:{self._ports[gateway]}"

    @property
    def gateways(self) -> list[str]:
        """Return the gateways' names."""
        return list(self._ports)

    def supervisors(self) -> dict[str, psutil.Process]:
        """Return the running supervisors by replica id."""
        commands = {process: command_of(process) for process in self.processes()}
        return {words[-1]: process for process, words in commands.items() if "supervise" in words}

    def engines(self) -> dict[str, psutil.Process]:
        """Return the running engines by replica id."""
        found = {}
        for replica, supervisor in self.supervisors().items():
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in supervisor.children():
                    if "lmaas.testing.fake_engine" in command_of(child)[:3]:  # it has become the engine
                        found[replica] = child
        return found

    def processes(self) -> list[psutil.Process]:
        """Return every process that has this service's home in its environment."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                ours = process.environ().get("LMAAS_HOME") == str(self.settings.home) and process.pid != os.getpid()
                if ours and process.status() != psutil.STATUS_ZOMBIE and process.cmdline():
                    found.append(process)
        return found

    def logs(self) -> str:
        """Return the warnings and errors of gateways, controllers, job runners and supervisors, to help find the cause of a failure."""
        files = [*self.settings.home.glob("*.log"), *self.settings.home.glob("replicas/*/supervisor.log")]
        lines = [f"{file.name}: {line}" for file in files for line in file.read_text(errors="replace").splitlines()]
        return "\n".join(line for line in lines if "ERROR" in line or "CRITICAL" in line or "Traceback" in line)[-6000:]

    # Bootstrap

    async def bootstrap(self) -> None:
        """Prepare servers, schema and base model, and start the service's processes."""
        self.settings = replace(
            self.settings,
            database_url=await self.start_postgres(),
            redis_url=self.start_valkey(),
            **USUAL | self._changes,
        )
        migrate = [sys.executable, "-m", "lmaas", "migrate"]
        environment = os.environ | self.settings.environment()
        await asyncio.to_thread(subprocess.run, migrate, env=environment, check=True, timeout=60)
        self.db = Database(str(self.settings.database_url))
        self.scheduler = Scheduler(connect(str(self.settings.redis_url)))
        fake = f"--fake-token-ms {TOKEN_MS} --fake-truth {self.truth} {self._fake}"
        self.truth.touch()
        self.model = await put_base_model(self.db, BaseModel("", MODEL, "no-model", "float32", {}, 16, 3, 8, SLOTS, 2048, 2**28, fake))
        self.models = [self.model]
        if self.embeds:
            embedder = BaseModel("", EMBEDDER, "no-model", "float32", {}, 16, 1, 1, SLOTS, 512, 2**28, fake, kind=PoolKind.EMBED)
            self.models.append(await put_base_model(self.db, embedder))
        for name in (*self.gateways, *(f"controller-{number}" for number in range(CONTROLLERS)), *self.runners):
            self.start(name)

    async def clients(self, tenant: str, workers: int, *, adapters: int, max_queued: int) -> list[Client]:
        """Create a tenant with adapters, and a key for each of its workers."""
        row = await create_tenant(self.db, tenant, "standard", max_queued, 10)
        files = AdapterFiles(Objects(object_store_url(self.settings)))
        names = [f"bot-{number}" for number in range(adapters)]
        for name in names:
            content = secrets.token_hex(32)
            weights = self.settings.home / "weights"
            await asyncio.to_thread(weights.write_bytes, b"weights")
            await files.put(source_of(row.id, content), b'{"peft_type": "LORA", "r": 8}', weights)
            facts: dict[str, Any] = {"content_hash": content, "rank": 8, "target_modules": ["q_proj"], "size_bytes": 7}
            await add_version(self.db, row.id, name, self.model.id, activate=True, **facts)
        found = []
        for number in range(workers):
            key = new_key()
            made = await create_key(self.db, row.id, Role.INFERENCE, f"worker {number}", hash_key(key), shown_prefix(key))
            found.append(Client(row.id, tenant, key, made.id, (MODEL, *names)))
        return found

    def close(self) -> None:
        """End every process, and remove the home."""
        for process in self._processes.values():
            process.kill()
            process.wait()
        # The controllers have ended, so no process starts more.
        for left in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        self._valkey.close()
        self._postgres.close()
        shutil.rmtree(self.settings.home, ignore_errors=True)


@asynccontextmanager
async def running(*, fake: str = "", embeds: bool = False, runners: int = 0, **changes: Any) -> AsyncIterator[Service]:
    """Run a service with an empty database until the end of the block. Its engines get the `fake` arguments; `changes` are settings. With
    `embeds` it also has a base model that embeds, with `runners` this many job runners."""
    # A short path, because a Unix socket's path may have at most 107 bytes.
    service = Service(Path(tempfile.mkdtemp(prefix="lmaas-chaos-")), fake, changes, embeds=embeds, runners=runners)
    async with AsyncExitStack() as exits:
        exits.callback(service.close)
        await service.bootstrap()
        exits.push_async_callback(service.db.close)
        exits.push_async_callback(service.scheduler.redis.aclose)
        yield service


def now() -> float:
    """Return the wall-clock time, which the ledger and the engines use."""
    return time.time()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
