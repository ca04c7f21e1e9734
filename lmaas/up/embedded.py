"""The embedded servers of a stack, and context managers that run one for a block, for tests, benchmarks and simulations."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from lmaas.config import Settings
from lmaas.up.postgres import Postgres
from lmaas.up.server import Server
from lmaas.up.valkey import Valkey


def servers(settings: Settings) -> tuple[Settings, list[Server]]:
    """Return a server, not started yet, for each address that the settings leave empty, and the settings with all addresses."""
    found: list[Server] = []
    logs = settings.home / "logs"
    if settings.database_url is None:
        found.append(Postgres(settings.home / "postgres", logs / "postgres.log"))
        settings = replace(settings, database_url=found[-1].url)
    if settings.redis_url is None:
        found.append(Valkey(settings.home / "valkey", logs / "valkey.log"))
        settings = replace(settings, redis_url=found[-1].url)
    return settings, found


@contextmanager
def embedded_servers(settings: Settings) -> Iterator[Settings]:
    """Run embedded servers for the addresses that the settings leave empty, and yield the settings with their addresses."""
    with ExitStack() as exits:
        settings, found = servers(settings)
        for server in found:
            exits.enter_context(started(server))
        yield settings


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """Run Postgres with its data in `folder`, and yield its URL. Raises SettingsError if it does not start."""
    with started(Postgres(folder, folder.with_name(f"{folder.name}.log"))) as server:
        yield server.url


@contextmanager
def valkey(folder: Path) -> Iterator[str]:
    """Run Valkey with its append-only file in `folder`, and yield its URL. Raises SettingsError if it does not start."""
    with started(Valkey(folder, folder / "valkey.log")) as server:
        yield server.url


@contextmanager
def started(server: Server) -> Iterator[Server]:
    """Run a server for a block."""
    try:
        server.start()
        yield server
    finally:
        server.stop()
