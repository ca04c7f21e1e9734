"""The gateway's event loop: uvloop's, but nobody waits for the name of somebody else."""

import asyncio
import contextlib
import ipaddress
import socket
import threading
from typing import Any

import uvloop

Found = list[tuple[Any, ...]]
Question = tuple[Any, Any, int, int, int, int]


class Loop(uvloop.Loop):
    """uvloop looks up names two at a time in all, and before each connection by aiohttp its address too, as if it were a name. A name that
    nobody answers for (a stopped container's: ten seconds and more) would so keep gateways from engines that are well.

    Here an address is not looked up, and a name once for all that wait for it, in a thread of its own, which nobody waits for at the end.
    (Not so the names of `create_connection`, by which redis-py connects: these stay uvloop's.)
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
            # If there is no thread to be had, the next one asks anew.
            threading.Thread(target=self._look_up, args=question, name="look-up", daemon=True).start()
            found = self._looking_up[question] = self.create_future()
        return await asyncio.shield(found)

    def _look_up(self, *question: Any) -> None:
        found: Found | None = None
        error: Exception | None = None
        try:
            found = socket.getaddrinfo(*question)
        except Exception as raised:  # noqa: BLE001 (whoever waits hears it)
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.call_soon_threadsafe(self._looked_up, question, found, error)

    def _looked_up(self, question: Question, found: Found | None, error: Exception | None) -> None:
        waiting = self._looking_up.pop(question)
        if waiting.cancelled():
            return
        if error is None:
            waiting.set_result(found or [])
        else:
            waiting.set_exception(error)
            waiting.exception()  # whoever waits hears it, if anybody still does


def _is_address(host: object) -> bool:
    try:
        ipaddress.ip_address(host.decode() if isinstance(host, bytes) else str(host))
    except ValueError:
        return False
    return True
