"""The gateway's event loop: uvloop's, with host names looked up independently of each other."""

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
    """Looks up each host name in a separate thread, once for all callers that wait for it. Addresses are not looked up.

    uvloop looks up two names at a time, and for each connection of aiohttp also its address. A name that does not resolve (of a stopped
    container, for example) takes ten seconds or more, during which the gateway could not reach any other engine. The threads are daemons,
    so that the process need not wait for them when it ends. `create_connection`, which redis-py uses, still looks up names as uvloop does.
    """

    def __init__(self) -> None:
        super().__init__()
        self._looking_up: dict[Question, asyncio.Future[Found]] = {}

    async def getaddrinfo(self, host: Any, port: Any, *, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0) -> Found:
        """Do what socket.getaddrinfo does; for an address without a type, return only the entry for TCP."""
        if _is_address(host):
            return await super().getaddrinfo(host, port, family=family, type=type or socket.SOCK_STREAM, proto=proto, flags=flags)
        question = (host, port, family, type, proto, flags)
        found = self._looking_up.get(question)
        if found is None:
            # If no thread can be started, the next caller tries again.
            threading.Thread(target=self._look_up, args=question, name="look-up", daemon=True).start()
            found = self._looking_up[question] = self.create_future()
        return await asyncio.shield(found)

    def _look_up(self, *question: Any) -> None:
        found: Found | None = None
        error: Exception | None = None
        try:
            found = socket.getaddrinfo(*question)
        except Exception as raised:  # noqa: BLE001 (it is raised where the name is awaited)
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.call_soon_threadsafe(self._looked_up, question, found, error)

    def _looked_up(self, question: Question, found: Found | None, error: Exception | None) -> None:
        waiting = self._looking_up.pop(question)
        if waiting.cancelled():
            return
        if error is None:
            waiting.set_result(found or [])
        else:
            waiting.set_exception(error)
            waiting.exception()  # prevents a log line about an unretrieved exception if all waiting callers were cancelled


def _is_address(host: object) -> bool:
    try:
        ipaddress.ip_address(host.decode() if isinstance(host, bytes) else str(host))
    except ValueError:
        return False
    return True
