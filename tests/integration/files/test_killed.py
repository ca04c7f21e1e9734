"""A gateway that is killed in the middle of an upload leaves nothing."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.integration.gateway.stack import Stack, running
from tests.support.conditions import until
from tests.support.processes import free_port


@pytest.fixture
async def stack(postgres_url: str, valkey_url: str, tmp_path: Path) -> AsyncIterator[Stack]:
    async with running(postgres_url, valkey_url, tmp_path) as stack:
        yield stack


async def test_a_gateway_that_is_killed_leaves_nothing(stack: Stack) -> None:
    acme, port, sent = await stack.tenant(), free_port(), asyncio.Event()
    environment = os.environ | stack.settings.environment() | {"LMAAS_PORT": str(port)}
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "lmaas", "gateway", env=environment)
    drafts = stack.settings.uploads

    async def up() -> bool:
        assert process.returncode is None
        async with httpx.AsyncClient() as http:
            try:
                return (await http.get(f"http://127.0.0.1:{port}/readyz")).status_code == 200
            except httpx.TransportError:
                return False

    async def half() -> AsyncIterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"x" * 5_000_000
        sent.set()
        await asyncio.Event().wait()

    def written() -> bool:
        """Return whether the process has bytes of the draft on the disk."""
        for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
            with suppress(OSError):  # it has been closed
                if descriptor.readlink().is_relative_to(drafts) and descriptor.stat().st_size >= 1_000_000:
                    return True
        return False

    try:
        await until(up)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=acme.headers) as http:
            headers = {"content-type": "multipart/form-data; boundary=b"}
            upload = asyncio.create_task(http.post("/v1/files", content=half(), headers=headers))
            await sent.wait()
            await until(written)
            process.kill()
            await process.wait()
            upload.cancel()
            await asyncio.gather(upload, return_exceptions=True)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert os.listdir(drafts) == []
    assert await stack.services.objects.list("files") == []
    async with stack.client(acme) as http:
        assert (await http.get("/v1/files")).json()["data"] == []
