"""Waiting requests: many clients of a base model that never has a replica."""

import asyncio
import contextlib
import json
import resource
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from bench.gateways.processes import Proxy
from bench.gateways.protocols import MESSAGES

#: The number of clients that connect per second, low enough that connecting does not affect the measurement.
COMING = 200
#: File descriptors in addition to one for each client.
SPARE_FILES = 500


def allow_files(clients: int) -> None:
    """Raise the limit of connections for this process and its later children. Raises RuntimeError if that is not allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = clients + SPARE_FILES
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise RuntimeError(f"this machine allows {hard} open files; {needed} are needed")
    if soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@asynccontextmanager
async def waiting(gateway: Proxy, model: str, keys: Sequence[str], clients: int) -> AsyncIterator[None]:
    """Keep `clients` streaming requests for `model` waiting, with these keys in turn. Each has received a comment about its wait."""
    url = urlsplit(gateway.url)
    body = json.dumps({"model": model, "messages": MESSAGES, "max_tokens": 32, "stream": True}).encode()
    readers: set[asyncio.Task[None]] = set()

    async def join(number: int) -> None:
        await asyncio.sleep(number / COMING)
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        head = [f"POST {url.path} HTTP/1.1", f"host: {url.netloc}", f"authorization: Bearer {keys[number % len(keys)]}"]
        head += ["content-type: application/json", f"content-length: {len(body)}"]
        writer.write("\r\n".join([*head, "", ""]).encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"a request does not wait: {status.decode().strip()}: {(await reader.read())[-300:]!r}")
        await reader.readuntil(b": queued")
        readers.add(asyncio.create_task(_drop(reader, writer)))

    async with asyncio.timeout(clients / COMING + 60):
        await asyncio.gather(*(join(number) for number in range(clients)))
    try:
        yield
        if any(reader.done() for reader in readers):
            raise RuntimeError("a request does not wait any more")
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


async def _drop(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read and discard bytes until the gateway ends the connection."""
    with contextlib.closing(writer):
        while await reader.read(2**16):
            pass
