"""Runs the whole service on this machine until it is stopped, and then ends every process of it."""

import asyncio
import shlex
import signal
import socket
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from typing import Any, NoReturn

import httpx
from redis.asyncio import Redis
from redis.exceptions import RedisError
from rich.console import Console
from rich.text import Text

from lmaas.config import Settings
from lmaas.control.ending import END_GRACE_S, end_replicas
from lmaas.control.provisioners.local import LocalProvisioner, zygote_of
from lmaas.engine.launch import expect, spec_of
from lmaas.errors import LmaasError, SettingsError, SettingUp
from lmaas.manifests.apply import apply, described, working_credentials
from lmaas.manifests.client import ApiClient
from lmaas.manifests.folder import Manifests, read_folder
from lmaas.metering.writer import write_events
from lmaas.process import private_files
from lmaas.replica.address import free_port
from lmaas.scheduling.client import connect
from lmaas.states import PoolKind
from lmaas.store.models import BaseModel, list_base_models
from lmaas.store.rights import DatabaseRole
from lmaas.up.bootstrap import (
    ensure_console_key,
    ensure_operator_key,
    read_credentials,
    register_embedding_model,
    register_model,
    write_credentials,
)
from lmaas.up.children import Child
from lmaas.up.home import held
from lmaas.up.keeping import LOOK_EVERY_S, Kept, keep_running
from lmaas.up.logs import trim
from lmaas.up.roles import Logins, prepare_database
from lmaas.up.server import Server, is_full

READY_S = 60.0
DISK_LOOK_S = 5.0
#: The time for which background work waits for a warm engine by default. With a stack on one machine, its user is probably waiting.
MAX_WAIT_S = 30.0
LOOPBACK = "127.0.0.1"


class Stack:
    """One stack, whose state is in `home`. Stacks with different homes and ports can run side by side."""

    def __init__(self, settings: Settings, console: Console) -> None:
        self._settings, self._console = settings, console
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._keepers: list[asyncio.Task[NoReturn]] = []
        self._embedding = ""
        self._console_key: str | None = None

    async def run(self) -> None:
        """Start everything, print the addresses, and stop everything on SIGINT, SIGTERM or SIGHUP. A second signal skips the drain."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._told_to_stop)
        async with AsyncExitStack() as exits:
            if tightened := exits.enter_context(held(self._settings.home)):
                self._say(f"Other users could read {tightened} files in {self._settings.home}. Now only you can.")
            check_port(self._settings)
            if (zygote := zygote_of(self._settings)) is not None:
                exits.callback(zygote.stop)
                await zygote.ensure()  # its imports take longest, so they start first
            settings, servers = _embedded(with_console(self._settings))
            for server in servers:
                exits.callback(server.stop)
            redis = connect(str(settings.redis_url))
            exits.push_async_callback(redis.aclose)
            if await self._start(servers):
                watch = asyncio.create_task(self._watch_disk(), name="disk")
                exits.callback(self._let_go, [watch, *(self._keep(server) for server in servers)])
                logins, model, operator_key = await self._prepare(settings)
                await self._serve(logins, model, operator_key, redis)
        self._say("Stopped.")

    async def _start(self, servers: list[Server]) -> bool:
        """Start the embedded servers; return False if the stack is stopped meanwhile. Raises SettingsError."""
        if servers:
            self._say("Starting the database and the queue ...")
        for server in servers:
            server.launch()
        for server in servers:
            while not await asyncio.to_thread(server.answers):
                if not server.running:
                    raise SettingsError(f"{server.title} did not start: {server.failure()}")
                if self._stop.is_set():
                    return False
                await asyncio.sleep(LOOK_EVERY_S / 5)
        return True

    async def _prepare(self, settings: Settings) -> tuple[Logins, BaseModel, str]:
        """Prepare the database. Return the processes' database logins, the default base model and the operator's key."""
        logins = await asyncio.to_thread(prepare_database, settings, embedded=self._settings.database_url is None)
        db = logins.database(DatabaseRole.GATEWAY)
        try:
            model = await register_model(settings, db, self._console, self._stop.is_set)
            if (embedding := await register_embedding_model(settings, db, self._console)) is not None:
                self._embedding = embedding.name
            self._console_key = await ensure_console_key(settings, db)
            return logins, model, await ensure_operator_key(settings, db)
        finally:
            await db.close()

    @staticmethod
    def _let_go(keepers: "Sequence[asyncio.Task[Any]]") -> None:
        for keeper in keepers:
            keeper.cancel()

    def _keep(self, kept: Kept) -> "asyncio.Task[NoReturn]":
        """Restart the process whenever it ends. An unexpected error in this task stops the stack."""
        task = asyncio.create_task(keep_running(kept, self._warn), name=kept.title)
        self._keepers.append(task)
        task.add_done_callback(lambda _: self._stop.set())
        return task

    async def _watch_disk(self) -> None:
        """Report when the disk of the home folder becomes full, and when it has space again. Keep the logs small meanwhile."""
        home, was_full = self._settings.home, False
        while True:
            full = is_full(home)
            if full and not was_full:
                self._warn(f"The disk of {home} is full. Requests fail until there is space again.")
            elif was_full and not full:
                self._say(f"The disk of {home} has space again.")
            was_full = full
            await asyncio.to_thread(trim, home / "logs")
            await asyncio.sleep(DISK_LOOK_S)

    def _say(self, text: str, style: str = "") -> None:
        # The terminal wraps the lines, so text copied from it has no extra line breaks.
        self._console.print(Text(text, style), soft_wrap=True)

    def _warn(self, text: str) -> None:
        self._say(text, "yellow")

    def _told_to_stop(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    async def _serve(self, logins: Logins, model: BaseModel, operator_key: str, redis: Redis) -> None:
        settings = logins.gateway
        if settings.zygote == "on":
            expect(settings.home, spec_of(model, settings.engine_module, settings.engine_host, settings.traces_url))
        ready = settings.home / "ready"
        ready.unlink(missing_ok=True)
        gateway = Child("gateway", replace(logins.gateway, ready_file=ready))
        max_wait_s = settings.background_max_wait_s or MAX_WAIT_S
        controller = Child("controller", replace(logins.controller, ready_file=ready, background_max_wait_s=max_wait_s))
        jobs = Child("jobs", replace(logins.jobs, ready_file=ready), "The job runner")
        console = Child("console", replace(of_console(settings), console_key=self._console_key)) if settings.console else None
        keepers = []
        try:
            gateway.launch()
            controller.launch()
            jobs.launch()
            keepers += [self._keep(controller), self._keep(jobs)]
            if console is not None:
                console.launch()
                keepers.append(self._keep(console))
            if await self._until_serving(settings, gateway):
                keepers.append(self._keep(gateway))
                await asyncio.to_thread(self._apply, settings, operator_key)
                ready.touch(mode=0o600)
                self._say_where(settings, model)
                await self._stop.wait()
            for keeper in self._keepers:
                if keeper.done():
                    keeper.result()
            self._say("\nDraining; press Ctrl-C again to stop at once ...")
        finally:
            self._let_go(keepers)
            ready.unlink(missing_ok=True)
            # Work that the job runner gives back waits for the next start.
            drained = [child for child in (gateway, jobs, console) if child is not None]
            await asyncio.gather(*(child.stop(settings.drain_timeout_s + 5, self._hurry) for child in drained))
            # Stop the controller first, so that nothing new is started while the replicas end.
            await controller.stop(5, self._hurry)
            where = LocalProvisioner(replace(settings, zygote="off"))  # it starts nothing new
            db = logins.database(DatabaseRole.CONTROLLER)
            try:
                await end_replicas(db, where, settings.drain_timeout_s + END_GRACE_S, self._hurry)
                with suppress(LmaasError, RedisError):
                    for pool in await list_base_models(db):
                        while await write_events(redis, db, pool.id):
                            pass
            finally:
                await db.close()

    async def _until_serving(self, settings: Settings, gateway: Child) -> bool:
        """Wait until the gateway is ready except for the parts that this stack still has to set up. Return False if the stack is stopped.

        Raises SettingsError.
        """
        url = settings.base_url.removesuffix("/v1") + "/readyz"
        deadline = asyncio.get_running_loop().time() + READY_S
        async with httpx.AsyncClient(trust_env=False) as client:
            while not self._stop.is_set():
                if gateway.process is not None and gateway.process.poll() is not None:
                    raise SettingsError(f"The gateway did not start:\n{gateway.last_words()}")
                with suppress(httpx.TransportError, ValueError):
                    response = await client.get(url)
                    if response.status_code == 200 or response.json()["error"]["code"] == SettingUp.code:
                        return True
                if asyncio.get_running_loop().time() > deadline:
                    raise SettingsError(f"The gateway was not ready within {READY_S:.0f} s:\n{gateway.last_words()}")
                await asyncio.sleep(LOOK_EVERY_S)
        return False

    def _apply(self, settings: Settings, operator_key: str) -> None:
        """Apply the manifests, and ensure that the credentials file has working keys of their tenants, and no keys that do not work."""
        manifests = read_folder(settings.tenants) if settings.tenants.exists() else Manifests()
        client = ApiClient(settings.base_url, operator_key)
        try:
            for change in apply(manifests, client):
                if change.outcome != "unchanged":
                    self._console.print(*(f"  {line}" for line in described(change)), sep="\n", markup=False, highlight=False)
            credentials = read_credentials(settings)
            names = [manifest.name for manifest in manifests.tenants]
            credentials["tenants"] = working_credentials(credentials["tenants"], names, client)
            write_credentials(settings, credentials)
        finally:
            client.close()

    def _say_where(self, settings: Settings, model: BaseModel) -> None:
        self._console.print(f"\n[bold green]lmaas is up[/bold green] at {settings.base_url}", soft_wrap=True)
        if settings.console_url is not None:
            self._say(f"Console:     {settings.base_url.removesuffix('/v1')}/console")
        self._say("No engine runs until the first request.")
        embedding = f"; {self._embedding} (embeddings)" if self._embedding else ""
        self._say(f"Models:      {model.name}{embedding}")
        self._say(f"Credentials: {settings.credentials_path}")
        self._say(f"Logs:        {settings.home / 'logs'}")
        tenant = next((name for name, keys in read_credentials(settings)["tenants"].items() if "api_key" in keys), None)
        if tenant is not None:
            self._say("\nTry it:")
            self._say(example(settings, tenant, model.name, model.kind))
        self._say("\nCtrl-C stops it.\n")


def example(settings: Settings, tenant: str, model: str, kind: PoolKind = PoolKind.GENERATE) -> str:
    """Return shell commands that send a tenant's request, in lines that fit a narrow terminal."""
    path, more = "chat/completions", '"stream": true, "messages":\n       [{"role": "user", "content": "What is the capital of France?"}]'
    if kind is PoolKind.EMBED:
        path, more = "embeddings", '"input":\n       "What is the capital of France?"'
    return f"""\
KEY=$(python3 -c \\
  'import json; print(json.load(open(0))["tenants"]["{tenant}"]["api_key"])' \\
  < {shlex.quote(str(settings.credentials_path))})
curl -N {settings.base_url}/{path} \\
  -H "authorization: Bearer $KEY" -H 'content-type: application/json' \\
  -d '{{"model": "{model}", {more}}}'"""


def with_console(settings: Settings) -> Settings:
    """Return the settings with the port of this stack's console, and its address for the gateway."""
    if not settings.console:
        return settings
    port = settings.console_port or free_port(LOOPBACK)
    return replace(settings, console_port=port, console_url=f"http://{LOOPBACK}:{port}")


def of_console(settings: Settings) -> Settings:
    """Return the settings of the console. It listens for the gateway only, and gets the addresses of no servers: an empty one replaces that
    of the environment."""
    api_url = settings.console_api_url or settings.base_url
    return replace(settings, host=LOOPBACK, console_api_url=api_url, database_url="", replica_database_url="", redis_url="")


def check_port(settings: Settings) -> None:
    """Raise SettingsError if another process listens on the stack's port: it may be the gateway of another stack."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except (OSError, OverflowError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            message = f"The address {settings.host}, port {settings.port}, cannot be used ({why}). Set LMAAS_PORT or LMAAS_HOST."
            raise SettingsError(message) from None


def _embedded(settings: Settings) -> tuple[Settings, list[Server]]:
    if settings.database_url is not None and settings.redis_url is not None:
        return settings, []
    from lmaas.up import embedded  # noqa: PLC0415 (with servers of its own, an installation does without their wheels)

    return embedded.servers(settings)


def up(settings: Settings) -> None:
    """Run a stack until it is stopped. Raises SettingsError."""
    private_files()
    try:
        asyncio.run(Stack(settings, Console()).run())
    except OSError as error:
        raise SettingsError(f"{error.filename or settings.home}: {error.strerror or error}.") from error
