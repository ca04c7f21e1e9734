"""The waits of gateways that connect by address or by name."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvloop
from aiohttp import ClientSession, web

from lmaas.web.loop import Loop


class NameServer:
    """A name server that does not respond for `away` until `back` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.back = threading.Event()
        self._really = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self._look_up)

    def _look_up(self, host: str, *args: Any, **kwargs: Any) -> Any:
        self.asked.append(host)
        if host.startswith("away"):
            self.back.wait(60)
            raise socket.gaierror(socket.EAI_NONAME, "nobody knows it")
        return self._really(host, *args, **kwargs)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[NameServer]:
    server = NameServer(monkeypatch)
    yield server
    server.back.set()


def test_an_engine_is_reached_while_names_are_not_answered(names: NameServer) -> None:
    async def run() -> int:
        async def hello(_: web.Request) -> web.Response:
            return web.Response(text="hello")

        application = web.Application()
        application.router.add_get("/", hello)
        runner = web.AppRunner(application)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        loop = asyncio.get_running_loop()
        hanging = [asyncio.create_task(loop.getaddrinfo("away", number % 2)) for number in range(50)]
        async with ClientSession() as session, session.get(f"http://127.0.0.1:{port}/") as response:
            assert await response.text() == "hello"
        named = await loop.getaddrinfo("localhost", port, type=socket.SOCK_STREAM)
        names.back.set()
        ends = await asyncio.gather(*hanging, return_exceptions=True)
        assert all(isinstance(end, socket.gaierror) for end in ends)
        assert "127.0.0.1" in [address[4][0] for address in named]
        await runner.cleanup()
        return len(names.asked)

    # Once for each of two ports, and for localhost; never for an address.
    assert uvloop.run(run(), loop_factory=Loop) == 3


def test_one_who_gives_up_does_not_end_the_look_up_for_another(names: NameServer) -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        one, other = (asyncio.create_task(loop.getaddrinfo("away", 1)) for _ in range(2))
        await asyncio.sleep(0)
        one.cancel()
        await asyncio.sleep(0)
        names.back.set()
        with pytest.raises(socket.gaierror):
            await other
        with pytest.raises(asyncio.CancelledError):
            await one
        with pytest.raises(socket.gaierror):  # requested again, not remembered
            await loop.getaddrinfo("away", 1)

    uvloop.run(run(), loop_factory=Loop)
    assert len(names.asked) == 2


@pytest.mark.parametrize(("host", "family"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6), (b"127.0.0.1", socket.AF_INET)])
def test_an_address_is_its_own_answer(names: NameServer, host: str | bytes, family: int) -> None:
    async def run() -> Any:
        return await asyncio.get_running_loop().getaddrinfo(host, 80)

    [found] = uvloop.run(run(), loop_factory=Loop)
    assert found[0] == family
    assert found[4][:2] == (host.decode() if isinstance(host, bytes) else host, 80)
    assert names.asked == []
