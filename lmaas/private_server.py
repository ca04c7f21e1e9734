"""HTTP servers inside a process of the service, for machines in the same private network. Tenants cannot reach them."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp


class _Server(uvicorn.Server):
    """A server that does not handle signals, because the process that it runs in does."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signal handlers unchanged."""
        yield


async def serve_privately(app: ASGIApp, host: str, port: int, listener: socket.socket | None = None) -> None:
    """Serve `app` on this address, or on a socket that is already bound, until cancelled."""
    config = uvicorn.Config(
        app, host=host, port=port, log_config=None, access_log=False, server_header=False, proxy_headers=False, ws="none", lifespan="off"
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=None if listener is None else [listener]))
    try:
        await asyncio.shield(serving)
    finally:
        # The server would leave its sockets open if it were cancelled.
        server.should_exit = server.force_exit = True
        await serving
