"""A minimal proxy of Starlette and aiohttp, as a lower bound: `python -m bench.gateways.bare ENGINE_URL PORT`."""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route


def build(engine_url: str) -> Starlette:
    """Return the proxy's application."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), auto_decompress=False) as app.state.session:
            yield

    async def relay(request: Request) -> Response:
        session: aiohttp.ClientSession = request.app.state.session
        body = await request.body()
        answer = await session.post(engine_url + request.url.path, data=body, headers={"content-type": "application/json"})
        kind = answer.headers["content-type"]
        if kind.startswith("text/event-stream"):
            return StreamingResponse(answer.content.iter_any(), answer.status, {"content-type": kind})
        return Response(await answer.read(), answer.status, {"content-type": kind})

    return Starlette(routes=[Route("/v1/chat/completions", relay, methods=["POST"])], lifespan=lifespan)


if __name__ == "__main__":
    uvicorn.run(
        build(sys.argv[1]), port=int(sys.argv[2]), loop="uvloop", http="httptools", ws="none", log_config=None, access_log=False,
        server_header=False, timeout_keep_alive=75,
    )  # fmt: skip
