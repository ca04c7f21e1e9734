"""Embedded Postgres and Valkey for a block: for tests, benchmarks and simulations. `lmaas up` keeps its own running (`lmaas.up.stack`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lmaas.up.postgres import Postgres
from lmaas.up.server import Server
from lmaas.up.valkey import Valkey


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """Run Postgres with its data in `folder`, and give its URL. Raises SettingsError if it does not start."""
    with started(Postgres(folder, folder.with_name(f"{folder.name}.log"))) as server:
        yield server.url


@contextmanager
def valkey(folder: Path) -> Iterator[str]:
    """Run Valkey with its append-only file in `folder`, and give its URL. Raises SettingsError if it does not start."""
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
