"""A gateway with real Postgres and Valkey in the test's own event loop, and real supervisors with fake engines."""

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import secrets
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from lmaas.adapters.objects import source_of
from lmaas.app import Services, build_gateway, connected
from lmaas.config import Settings
from lmaas.engine.client import EngineClient
from lmaas.engine.grammars.service import serve_checks
from lmaas.inference.observers import UNOBSERVED, Observers
from lmaas.keys import hash_key, new_key, shown_prefix
from lmaas.metering.writer import write_events
from lmaas.replica.supervisor import Supervisor
from lmaas.states import PoolKind, UsageStatus
from lmaas.store.adapters import add_version
from lmaas.store.database import Database, new_id
from lmaas.store.models import BaseModel, put_base_model
from lmaas.store.replicas import add_replica, get_replica
from lmaas.store.rights import DatabaseRole
from lmaas.store.scopes import scope_of
from lmaas.store.tenants import create_key, create_tenant
from lmaas.store.usage import UsageEvent, list_events
from lmaas.types import Role
from lmaas.web.server import server
from tests.integration.schemas import CHECKED
from tests.support.conditions import until
from tests.support.databases import login_url, new_database
from tests.support.processes import free_port

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"


@dataclass(frozen=True)
class Tenant:
    """A tenant with one key."""

    id: str
    key: str
    key_id: str

    @property
    def headers(self) -> dict[str, str]:
        """The headers with the tenant's credentials."""
        return {"authorization": f"Bearer {self.key}"}


@dataclass
class Replica:
    """A supervisor with its engine."""

    id: str
    url: str
    pid: int
    task: "asyncio.Task[Any]"

    async def counters(self) -> tuple[int, int, int]:
        """Return prompt tokens, generated tokens and running sequences, from the engine."""
        async with httpx.AsyncClient() as http:
            found = (await http.get(f"{self.url}/metrics")).text
        values = [
            re.findall(rf"^vllm:{name}{{.*}} (\S+)$", found, re.MULTILINE) for name in ("prompt_tokens_total", "generation_tokens_total")
        ]
        running = re.findall(r"^vllm:num_requests_running{.*} (\S+)$", found, re.MULTILINE)
        return int(float(values[0][0])), int(float(values[1][0])), int(float(running[0]))

    async def running(self) -> int:
        """Return the number of sequences that the engine works on."""
        return (await self.counters())[2]

    def freeze(self) -> None:
        """Suspend the engine: it still accepts connections, but does nothing else."""
        os.kill(self.pid, signal.SIGSTOP)

    def kill(self) -> None:
        """Kill the engine."""
        os.kill(self.pid, signal.SIGKILL)


@dataclass
class Stream:
    """A stream as its client received it, event by event."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    comments: list[str] = field(default_factory=list)
    raw: list[str] = field(default_factory=list)

    @property
    def events(self) -> list[dict[str, Any]]:
        """Return all events except `[DONE]`."""
        return [json.loads(event) for event in self.raw if event != "[DONE]"]

    @property
    def done(self) -> bool:
        """True if the stream ended with success."""
        return bool(self.raw) and self.raw[-1] == "[DONE]"

    @property
    def error(self) -> dict[str, Any] | None:
        """The error event, which must be the last event."""
        errors = [event["error"] for event in self.events if "error" in event]
        assert len(errors) <= 1
        assert not errors or "error" in self.events[-1]
        return errors[0] if errors else None

    def texts(self) -> dict[int, list[str]]:
        """The tokens of each choice."""
        texts: dict[int, list[str]] = {}
        for event in self.events:
            for choice in event.get("choices", ()):
                piece = choice["text"] if "text" in choice else choice["delta"].get("content")
                if piece:
                    texts.setdefault(choice["index"], []).append(piece)
        return texts

    @property
    def tokens(self) -> int:
        """The number of tokens received."""
        return sum(len(texts) for texts in self.texts().values())


class Stack:
    """The parts of a service that a request needs. Created by `running`."""

    def __init__(self, settings: Settings, services: Services, exits: AsyncExitStack) -> None:
        self.settings, self.services, self._exits = settings, services, exits
        # The test's own connections, as the superuser. Processes have their own rights.
        self.db, self.redis, self.scheduler = services.db, services.redis, services.scheduler
        self.url = ""
        self._checks: asyncio.Task[None] | None = None
        self._databases: dict[DatabaseRole, Database] = {}

    def check_grammars(self) -> None:
        """Start a host that checks grammars."""
        checks = serve_checks(self.settings, self.database(DatabaseRole.CONTROLLER), self.redis)
        self._checks = asyncio.create_task(checks, name="grammar-checker")
        self._exits.push_async_callback(_end, self._checks)

    def database(self, role: DatabaseRole) -> Database:
        """Return the database with the login of a process of the service."""
        if role not in self._databases:
            self._databases[role] = Database(login_url(str(self.settings.database_url), role), role)
            self._exits.push_async_callback(self._databases[role].close)
        return self._databases[role]

    async def check_no_grammars(self) -> None:
        """Stop the host that checks grammars."""
        assert self._checks is not None
        await _end(self._checks)

    async def model(self, name: str, slots: int = 16, loras: int = 8, context: int = 2048, kind: PoolKind = PoolKind.GENERATE) -> BaseModel:
        """Create a base model without a replica."""
        model = BaseModel("", name, "no-model", "float32", {}, 16, loras, loras, slots, context, 2**28, "", kind)
        return await put_base_model(self.db, model)

    async def tenant(self, max_queued: int = 256) -> Tenant:
        """Create a tenant with a key for inference."""
        tenant = await create_tenant(self.db, f"tenant-{secrets.token_hex(4)}", "standard", max_queued, 10)
        key = new_key()
        row = await create_key(self.db, tenant.id, Role.INFERENCE, "test", hash_key(key), shown_prefix(key))
        return Tenant(tenant.id, key, row.id)

    async def adapter(self, tenant: Tenant, name: str, model: BaseModel, *, files: bool = True) -> str:
        """Create a new live version of an adapter, and return the engines' name for it. Without its files it cannot be loaded."""
        content = secrets.token_hex(32)
        if files:
            weights = self.settings.home / f"{content}.safetensors"
            await asyncio.to_thread(weights.write_bytes, b"weights")
            await self.services.adapter_files.put(source_of(tenant.id, content), b'{"peft_type": "LORA", "r": 8}', weights)
        await add_version(
            self.db, tenant.id, name, model.id, content_hash=content, rank=8, target_modules=["q_proj"], size_bytes=7, activate=True
        )
        return f"{tenant.id}-{content}"

    async def replica(self, model: BaseModel, fake: str = "", clock: Callable[[], float] = time.monotonic) -> Replica:
        """Run a ready replica whose engine gets the `fake` arguments. Its time sheet uses `clock`."""
        replica_id = new_id("rep")
        await add_replica(self.db, replica_id, model.id)
        client = await self._exits.enter_async_context(EngineClient())
        started = dataclasses.replace(model, engine_args=fake)
        supervisor = Supervisor(
            self.settings,
            self.database(DatabaseRole.REPLICA),
            self.scheduler,
            self.services.adapter_files,
            client,
            started,
            replica_id,
            clock,
        )
        task = asyncio.create_task(supervisor.run(), name=replica_id)
        self._exits.push_async_callback(_end, task)
        found: list[dict[str, Any]] = []

        async def ready() -> bool:
            assert not task.done(), task.result()
            row = await get_replica(self.db, replica_id)
            if row is not None and row.url is not None:
                state = (await self.scheduler.stats(model.id))["replicas"]
                if replica_id in state and state[replica_id]["state"] == "ready":
                    found.append({"url": row.url})
                    return True
            return False

        await until(ready)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)  # these belong to pytest
        url = found[0]["url"]
        return Replica(replica_id, url, await asyncio.to_thread(_pid_of, url), task)

    @asynccontextmanager
    async def gateway(self, observers: Observers = UNOBSERVED, **changes: Any) -> AsyncIterator["Gateway"]:
        """Run another gateway with other settings until the end of the block."""
        settings = dataclasses.replace(self.settings, port=free_port(), **changes)
        app, leases = build_gateway(settings, dataclasses.replace(self.services, db=self.database(DatabaseRole.GATEWAY)), observers)
        serving = server(app, settings, observers.ended)
        task = asyncio.create_task(serving.serve(), name="gateway")
        await until(lambda: serving.started or task.done(), every_s=0.01)
        gateway = Gateway(f"http://127.0.0.1:{settings.port}", serving.__setattr__, leases, task)
        try:
            yield gateway
        finally:
            gateway.stop()
            await task

    def client(self, tenant: Tenant | None = None, url: str = "") -> httpx.AsyncClient:
        """Return an HTTP client with the tenant's key, which compares what it receives with the OpenAPI document."""
        headers = tenant.headers if tenant else {}
        return httpx.AsyncClient(base_url=url or self.url, headers=headers, timeout=60, event_hooks=CHECKED)

    async def stream(
        self,
        tenant: Tenant,
        path: str,
        body: dict[str, Any],
        into: Stream | None = None,
        url: str = "",
        headers: dict[str, str] | None = None,
    ) -> Stream:
        """Read a stream to its end. If this is cancelled, the connection is closed."""
        got = Stream() if into is None else into
        sent = body | {"stream": True}
        async with self.client(tenant, url) as http, http.stream("POST", path, json=sent, headers=headers) as response:
            got.status, got.headers = response.status_code, dict(response.headers)
            assert got.status == 200, await response.aread()
            async for line in response.aiter_lines():
                if line.startswith(":"):
                    got.comments.append(line)
                elif line:
                    assert line.startswith("data: ")
                    got.raw.append(line.removeprefix("data: "))
        return got

    async def told(self, model: BaseModel) -> list[dict[str, Any]]:
        """Return the requests' usage events in Redis. A duplicate is listed twice."""
        entries: Any = await self.redis.xrange(f"lmaas:{{{model.id}}}:usage")
        events = [json.loads(fields["event"]) for _, fields in entries]
        return [event for event in events if event["status"] != UsageStatus.PROBE]

    async def told_once(self, model: BaseModel, count: int) -> list[dict[str, Any]]:
        """Wait until there are events of `count` requests, and assert that each has exactly one."""

        async def all_told() -> bool:
            return len(await self.told(model)) >= count

        await until(all_told)
        events = await self.told(model)
        assert Counter(event["request_id"] for event in events).most_common(1)[0][1] == 1
        assert len(events) == count
        return events

    async def ledger(self, model: BaseModel, tenant: Tenant | None = None) -> list[UsageEvent]:
        """Return the ledger, after running the metering writer."""
        while await write_events(self.redis, self.database(DatabaseRole.CONTROLLER), model.id):
            pass
        return await list_events(self.db, scope_of(tenant.id if tenant else None))

    async def idle(self, model: BaseModel) -> None:
        """Wait until no request is queued and no slot is taken."""

        async def nothing_left() -> bool:
            stats = await self.scheduler.stats(model.id)
            return bool(stats["queued"] == 0 and stats["load"] == 0)

        await until(nothing_left, timeout_s=20)


@dataclass
class Gateway:
    """A running gateway."""

    url: str
    _set: Any
    leases: Any
    task: "asyncio.Task[None]"

    def stop(self) -> None:
        """Stop the gateway as SIGTERM does."""
        self._set("should_exit", True)


@asynccontextmanager
async def running(postgres_url: str, valkey_url: str, home: Path, **changes: Any) -> AsyncIterator[Stack]:
    """Run a stack with an empty database, an empty Valkey and a gateway. `changes` are other settings."""
    with new_database(postgres_url) as database_url:
        async with running_on(database_url, valkey_url, home, **changes) as stack:
            yield stack


@asynccontextmanager
async def running_on(database_url: str, valkey_url: str, home: Path, **changes: Any) -> AsyncIterator[Stack]:
    """Run a stack with this database, an empty Valkey and a gateway."""
    settings = Settings(
        home=home,
        database_url=database_url,
        redis_url=valkey_url,
        engine_module="lmaas.testing.fake_engine",
        queue_deadline_s=60,
        orphan_timeout_s=600,
        drain_timeout_s=1,
    )
    settings = dataclasses.replace(settings, **changes)
    async with AsyncExitStack() as exits:
        services = await exits.enter_async_context(connected(settings, None))
        await services.redis.flushall()
        stack = Stack(settings, services, exits)
        stack.check_grammars()
        stack.url = (await exits.enter_async_context(stack.gateway())).url
        yield stack


async def _end(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _pid_of(url: str) -> int:
    port = int(url.rpartition(":")[2])
    return next(
        child.pid
        for child in psutil.Process().children(recursive=True)
        if any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in child.net_connections("tcp"))
    )
