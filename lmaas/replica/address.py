"""The addresses and ports of replicas' engines."""

import asyncio
import socket


async def address_of(host: str) -> str:
    """Return the first address of a host."""
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return str(found[0][4][0])


def free_port(host: str) -> int:
    """Return a free port of this machine's address `host`."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
