"""Starting an engine for a test and waiting until it serves."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from lmaas.engine.client import EngineClient
from lmaas.engine.launch import EngineProcess, EngineSpec, launched
from tests.support.conditions import until


@asynccontextmanager
async def running(
    spec: EngineSpec, log: Path, home: Path | None = None
) -> AsyncIterator[tuple[EngineProcess, httpx.AsyncClient, EngineClient]]:
    """Start a server and wait until it serves; provide it with a plain HTTP client and lmaas's client. With a home folder, that folder's
    zygote forks it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with (
        launched(spec, port, log, home) as process,
        httpx.AsyncClient(base_url=process.url, timeout=300, limits=httpx.Limits(max_keepalive_connections=0)) as http,
        EngineClient() as client,
    ):
        assert process.by == ("plain" if home is None else "zygote")

        async def ready() -> bool:
            assert process.running, process.last_words()
            return await client.healthy(process.url)

        await until(ready, timeout_s=300, every_s=0.2)
        yield process, http, client
