"""The gateway's event loop: uvloop's, but nobody waits for the name of somebody else."""

import asyncio
import functools
import ipaddress
import socket
from typing import Any

import uvloop

Found = list[tuple[Any, ...]]
Question = tuple[Any, Any, int, int, int, int]


class Loop(uvloop.Loop):
    """uvloop looks up names two at a time in all, and before each connection by aiohttp its address too, as if it were a name. A name that
    nobody answers for (a stopped container's: ten seconds and more) would so keep gateways from engines that are well.

    Here an address is not looked up; a name is looked up once for all that wait for it, in a thread of asyncio's.
    """

    def __init__(self) -> None:
        super().__init__()
        self._looking_up: dict[Question, asyncio.Future[Found]] = {}

    async def getaddrinfo(self, host: Any, port: Any, *, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0) -> Found:
        """As socket.getaddrinfo, but of an address without a type only what is right for TCP."""
        if _is_address(host):
            return await super().getaddrinfo(host, port, family=family, type=type or socket.SOCK_STREAM, proto=proto, flags=flags)
        question = (host, port, family, type, proto, flags)
        found = self._looking_up.get(question)
        if found is None:
            found = asyncio.ensure_future(self.run_in_executor(None, socket.getaddrinfo, *question))
            self._looking_up[question] = found
            found.add_done_callback(functools.partial(self._looked_up, question))
        return await asyncio.shield(found)

    def _looked_up(self, question: Question, found: asyncio.Future[Found]) -> None:
        del self._looking_up[question]
        if not found.cancelled():
            found.exception()  # whoever waits hears it


def _is_address(host: object) -> bool:
    try:
        ipaddress.ip_address(host.decode() if isinstance(host, bytes) else str(host))
    except ValueError:
        return False
    return True
