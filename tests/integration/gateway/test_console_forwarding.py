"""The gateway forwards only /console to the console's process."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lmaas.private_server import serve_privately
from tests.integration.gateway.stack import Stack, running
from tests.support.conditions import until
from tests.support.processes import free_port


class Behind:
    """A server in the console's place, which reports what it received."""

    def __init__(self) -> None:
        self.more, self.left = asyncio.Event(), asyncio.Event()

    def app(self) -> Starlette:
        methods = ["GET", "POST"]
        return Starlette(routes=[Route("/console/live", self._live), Route("/{path:path}", self._echo, methods=methods)])

    async def _echo(self, request: Request) -> Response:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
        seen = {"path": request.scope["raw_path"].decode(), "query": request.url.query, "headers": dict(request.headers), "size": size}
        response = JSONResponse(seen, 418)
        response.set_cookie("a", "1")
        response.set_cookie("b", "2")
        return response

    async def _live(self, _: Request) -> Response:
        async def content() -> AsyncIterator[bytes]:
            try:
                yield b"first"
                await self.more.wait()
                yield b"second"
                await asyncio.Event().wait()
            finally:
                self.left.set()

        return StreamingResponse(content())


@pytest.fixture
async def behind() -> AsyncIterator[tuple[Behind, str]]:
    port, server = free_port(), Behind()
    task = asyncio.create_task(serve_privately(server.app(), "127.0.0.1", port))
    yield server, f"http://127.0.0.1:{port}"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def stack(postgres_url: str, valkey_url: str, tmp_path: Path, behind: tuple[Behind, str]) -> AsyncIterator[Stack]:
    async with running(postgres_url, valkey_url, tmp_path, console_url=behind[1]) as stack:
        yield stack


async def test_requests_and_answers_are_forwarded_as_they_are(stack: Stack, behind: tuple[Behind, str]) -> None:
    server, _ = behind
    async with httpx.AsyncClient(base_url=stack.url) as http:

        async def answers() -> bool:
            return (await http.get("/console")).status_code == 418

        await until(answers)
        for path, seen in (("/console", "/console"), ("/console/", "/console"), ("/console/a%2Fb%20c/", "/console/a%2Fb%20c")):
            got = await http.get(f"{path}?x=%22&y", headers={"cookie": "s=1", "connection": "x-hop", "x-hop": "1", "te": "trailers"})
            assert got.status_code == 418
            assert (got.json()["path"], got.json()["query"]) == (seen, "x=%22&y")
            headers = got.json()["headers"]
            assert headers["cookie"] == "s=1"
            assert headers["host"] == httpx.URL(stack.url).netloc.decode()
            assert headers["x-forwarded-proto"] == "http"
            assert not {"x-hop", "te"} & set(headers)
            cookies = [value for name, value in got.headers.multi_items() if name == "set-cookie"]
            assert cookies == ["a=1; Path=/; SameSite=lax", "b=2; Path=/; SameSite=lax"]
            assert got.headers["x-request-id"].startswith("req_")
        assert (await http.post("/console/upload", content=b"x" * 5_000_000)).json()["size"] == 5_000_000

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(10):
                yield b"y" * 1000

        assert (await http.post("/console/upload", content=pieces())).json()["size"] == 10_000
        assert (await http.get("/consoles")).status_code == 404
        assert (await http.delete("/console/x")).status_code == 405
        # A stream is passed on at once, and ends for the console when the client disconnects.
        async with http.stream("GET", "/console/live") as live:
            content = live.aiter_raw()
            assert await anext(content) == b"first"
            server.more.set()
            assert await anext(content) == b"second"
        await asyncio.wait_for(server.left.wait(), 10)


async def test_without_a_console_the_gateway_says_so(stack: Stack) -> None:
    async with stack.gateway(console_url=None) as gateway, httpx.AsyncClient(base_url=gateway.url) as http:
        response = await http.get("/console")
        assert response.status_code == 404
        assert "LMAAS_CONSOLE_URL" in response.json()["error"]["message"]
    async with stack.gateway(console_url="http://127.0.0.1:9") as gateway, httpx.AsyncClient(base_url=gateway.url) as http:
        response = await http.get("/console")
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "console_unavailable"
