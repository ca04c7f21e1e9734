"""Runs the whole service on this machine until it is told to stop, and then leaves no process behind."""

import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import httpx
from redis.asyncio import Redis
from redis.exceptions import RedisError
from rich.console import Console

from lmaas.config import Settings
from lmaas.control.ending import END_GRACE_S, end_replicas
from lmaas.control.provisioners.local import LocalProvisioner, zygote_of
from lmaas.engine.launch import expect, spec_of
from lmaas.errors import LmaasError, SettingsError
from lmaas.manifests.apply import apply, described, working_keys
from lmaas.manifests.client import ApiClient
from lmaas.manifests.folder import read_folder
from lmaas.metering.writer import write_events
from lmaas.process import bound_command
from lmaas.scheduling.client import connect
from lmaas.store.database import Database
from lmaas.store.migrate import upgrade
from lmaas.store.models import BaseModel, list_base_models
from lmaas.up.bootstrap import ensure_operator_key, read_credentials, register_model, write_credentials

READY_S = 60.0
RESTART_AFTER_S = 1.0


class Stack:
    """One stack: `home` holds its state, so two with different homes and ports run side by side."""

    def __init__(self, settings: Settings, console: Console) -> None:
        self._settings, self._console = settings, console
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()

    async def run(self) -> None:
        """Start everything, say where it is, and stop everything when told to (SIGINT, SIGTERM, SIGHUP). Twice means: at once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._told_to_stop)
        with ExitStack() as stack:
            stack.enter_context(locked(self._settings.home))
            check_port(self._settings)
            if (zygote := zygote_of(self._settings)) is not None:
                stack.callback(zygote.stop)
                await zygote.ensure()  # its imports take longest, so they begin first
            settings = stack.enter_context(embedded_servers(self._settings, self._console))
            await asyncio.to_thread(upgrade, str(settings.database_url))
            db, redis = Database(str(settings.database_url)), connect(str(settings.redis_url))
            try:
                model = await register_model(settings, db, self._console)
                operator_key = await ensure_operator_key(settings, db)
                await self._serve(settings, model, operator_key, db, redis)
            finally:
                await redis.aclose()
                await db.close()
        self._console.print("Stopped.")

    def _told_to_stop(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    async def _serve(self, settings: Settings, model: BaseModel, operator_key: str, db: Database, redis: Redis) -> None:
        if settings.zygote == "on":
            expect(settings.home, spec_of(model, settings.engine_module, settings.engine_host))
        gateway = Child("gateway", settings)
        controller = Child("controller", settings)
        watch = asyncio.create_task(self._keep_running([gateway, controller]), name="children")
        try:
            await self._until_ready(settings, gateway)
            if not self._stop.is_set():
                await asyncio.to_thread(self._apply, settings, operator_key)
                self._say_where(settings, model)
            stopping = asyncio.create_task(self._stop.wait())
            await asyncio.wait({watch, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                watch.result()
            self._console.print("\nDraining; press Ctrl-C again to stop at once ...")
        finally:
            watch.cancel()
            await gateway.stop(settings.drain_timeout_s + 5, self._hurry)
            # No controller: nothing new is started while the replicas end.
            await controller.stop(5, self._hurry)
            where = LocalProvisioner(replace(settings, zygote="off"))  # nothing new is started
            await end_replicas(db, where, settings.drain_timeout_s + END_GRACE_S, self._hurry)
            with suppress(LmaasError, RedisError):
                for pool in await list_base_models(db):
                    while await write_events(redis, db, pool.id):
                        pass

    async def _keep_running(self, children: list["Child"]) -> None:
        """Start the children, and again if one ends unasked. The first start must succeed."""
        for child in children:
            child.start()
        while True:
            await asyncio.sleep(0.2)
            for child in children:
                if child.process is not None and child.process.poll() is not None:
                    if not child.was_ready:
                        raise SettingsError(f"The {child.name} did not start:\n{child.last_words()}")
                    self._console.print(f"[red]The {child.name} ended with code {child.process.returncode}; starting it again.[/red]")
                    await asyncio.sleep(RESTART_AFTER_S)
                    child.start()

    async def _until_ready(self, settings: Settings, gateway: "Child") -> None:
        url = settings.base_url.removesuffix("/v1") + "/readyz"
        deadline = asyncio.get_running_loop().time() + READY_S
        async with httpx.AsyncClient() as client:
            while not self._stop.is_set():
                if gateway.process is not None and gateway.process.poll() is not None:
                    raise SettingsError(f"The gateway did not start:\n{gateway.last_words()}")
                with suppress(httpx.TransportError):
                    if (await client.get(url)).status_code == 200:
                        gateway.was_ready = True
                        return
                if asyncio.get_running_loop().time() > deadline:
                    raise SettingsError(f"The gateway was not ready within {READY_S:.0f} s:\n{gateway.last_words()}")
                await asyncio.sleep(0.1)

    def _apply(self, settings: Settings, operator_key: str) -> None:
        """Apply the manifests, and see that the credentials file has working keys of their tenants."""
        if not settings.tenants.exists():
            return
        manifests = read_folder(settings.tenants)
        client = ApiClient(settings.base_url, operator_key)
        try:
            for change in apply(manifests, client):
                if change.outcome != "unchanged":
                    self._console.print(*(f"  {line}" for line in described(change)), sep="\n", markup=False, highlight=False)
            credentials = read_credentials(settings)
            for manifest in manifests.tenants:
                known = credentials["tenants"].get(manifest.name, {})
                credentials["tenants"][manifest.name] = working_keys(manifest.name, known, client)
            write_credentials(settings, credentials)
        finally:
            client.close()

    def _say_where(self, settings: Settings, model: BaseModel) -> None:
        credentials = read_credentials(settings)
        tenant = next(iter(credentials["tenants"]), None)
        say = self._console.print
        say(f"\n[bold green]lmaas is up[/bold green] at {settings.base_url} (no engine runs until the first request)", soft_wrap=True)
        say(f"Credentials: {settings.credentials_path}")
        say(f"Logs:        {settings.home / 'logs'}")
        if tenant is not None:
            pick = f'import json; print(json.load(open("{settings.credentials_path}"))["tenants"]["{tenant}"]["api_key"])'
            messages = '[{"role": "user", "content": "What is the capital of France?"}]'
            body = f'{{"model": "{model.name}", "stream": true, "messages": {messages}}}'
            line = (
                f"curl -N {settings.base_url}/chat/completions -H 'content-type: application/json' "
                f"-H \"authorization: Bearer $(python3 -c '{pick}')\" -d '{body}'"
            )
            say("Try it:")
            self._console.print(line, soft_wrap=True, markup=False, highlight=False)
        say("Ctrl-C stops it.\n")


class Child:
    """A process of ours: `lmaas gateway` or `lmaas controller`. It dies with us, whatever happens to us."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.name = name
        self.was_ready = name != "gateway"
        self.process: subprocess.Popen[bytes] | None = None
        self._environment = os.environ | settings.environment()
        self._log = settings.home / "logs" / f"{name}.log"

    def start(self) -> None:
        """Start the process. A terminal's Ctrl-C does not reach it: we tell it when to stop."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                bound_command([sys.executable, "-m", "lmaas", self.name]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=self._environment,
            )

    def last_words(self) -> str:
        """The end of its log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-8:])

    async def stop(self, grace_s: float, hurry: asyncio.Event) -> None:
        """Ask it to stop, and kill it after `grace_s` seconds or when there is no time."""
        if self.process is None:
            return
        with suppress(ProcessLookupError):
            self.process.terminate()
        deadline = asyncio.get_running_loop().time() + grace_s
        while self.process.poll() is None:
            if hurry.is_set() or asyncio.get_running_loop().time() > deadline:
                with suppress(ProcessLookupError):
                    self.process.kill()
            await asyncio.sleep(0.05)


@contextmanager
def locked(home: Path) -> Iterator[None]:
    """Hold the home folder for this stack alone. Raises SettingsError if another one has it."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SettingsError(f"Another `lmaas up` runs in {home}. Set LMAAS_HOME (and LMAAS_PORT) for a second stack.") from None
        yield


def check_port(settings: Settings) -> None:
    """Raises SettingsError if somebody listens on the stack's port already: it might be another stack's gateway."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise SettingsError(f"Port {settings.port} of {settings.host} cannot be used ({error.strerror}). Set LMAAS_PORT.") from None


@contextmanager
def embedded_servers(settings: Settings, console: Console) -> Iterator[Settings]:
    """The settings, with embedded servers for the addresses that are not set."""
    with ExitStack() as stack:
        if settings.database_url is None or settings.redis_url is None:
            console.print("Starting the database and the queue ...")
            from lmaas.up import embedded  # noqa: PLC0415 (importing it looks for a user and a runtime folder)

            if settings.database_url is None:
                settings = replace(settings, database_url=stack.enter_context(embedded.postgres(settings.home / "postgres")))
            if settings.redis_url is None:
                settings = replace(settings, redis_url=stack.enter_context(embedded.valkey(settings.home / "valkey")))
        yield settings


def up(settings: Settings) -> None:
    """Run a stack until it is told to stop."""

    async def run() -> None:
        await Stack(settings, Console()).run()

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run())
