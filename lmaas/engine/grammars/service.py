"""Grammar checks and tokens over HTTP, for gateways, which have no engine installed and may run on other machines.

Hosts that run engines serve `POST /check?model=ID` and `POST /tokens?model=ID` on a free port of their private address. If engines run
beside the controller, the controller is this host; otherwise each replica's supervisor is, for its own base model. One host at a time
publishes its address in Redis for a few seconds, under the key of its model or of all models, and gateways send their questions there.
"""

import asyncio
import contextlib
import functools
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from lmaas.cancellation import unswallowed
from lmaas.config import Settings
from lmaas.engine.grammars.client import Checkers, NoVerdict
from lmaas.engine.grammars.verdict import Tokens, Verdict, decode_prompt, decode_question, encode, key_of
from lmaas.engine.launch import EngineSpec, spec_of
from lmaas.errors import LmaasError
from lmaas.private_server import serve_privately
from lmaas.store.database import Database
from lmaas.store.models import get_base_model

log = logging.getLogger(__name__)

#: The lifetime of an address in Redis, and the interval at which its host renews it.
ADDRESS_S, RENEW_S = 6, 1.5


async def serve_checks(settings: Settings, db: Database, redis: Redis, model_id: str = "") -> None:
    """Serve checks, and keep the address published, until cancelled. With `model_id`, for that base model only."""
    home = settings.home if settings.zygote == "on" else None
    family = socket.AF_INET6 if ":" in settings.engine_host else socket.AF_INET
    async with Checkers(settings.home / "grammars", home).kept() as checkers:
        with socket.socket(family) as listener:
            listener.bind((settings.engine_host, 0))
            host = f"[{settings.engine_host}]" if ":" in settings.engine_host else settings.engine_host
            url = f"http://{host}:{listener.getsockname()[1]}"
            routes = [
                Route("/check", functools.partial(_check, settings, db, checkers), methods=["POST"]),
                Route("/tokens", functools.partial(_tokens, settings, db, checkers), methods=["POST"]),
            ]
            app = Starlette(routes=routes)
            async with asyncio.TaskGroup() as group:
                group.create_task(serve_privately(app, settings.engine_host, 0, listener), name="grammar-checks")
                group.create_task(_keep_known(redis, key_of(model_id), url), name="grammar-address")


async def _check(settings: Settings, db: Database, checkers: Checkers, request: Request) -> Response:
    return await _answered(settings, db, request, lambda spec, body: checkers.check(spec, decode_question(body)))


async def _tokens(settings: Settings, db: Database, checkers: Checkers, request: Request) -> Response:
    return await _answered(settings, db, request, lambda spec, body: checkers.tokens(spec, decode_prompt(body)))


async def _answered(
    settings: Settings, db: Database, request: Request, answer: Callable[[EngineSpec, bytes], Awaitable[Verdict | Tokens]]
) -> Response:
    try:
        body = await request.body()
        model = await get_base_model(db, request.query_params.get("model", ""))
        answered = await answer(spec_of(model, settings.engine_module, settings.engine_host), body)
    except (msgspec.DecodeError, LmaasError, NoVerdict) as error:
        # The grammar or prompt is a tenant's text and is not logged.
        log.warning("a grammar or prompt could not be checked", extra={"action": "grammar", "detail": str(error)[:500]})
        return _json({"error": "it could not be checked"}, 503)
    except ClientDisconnect:
        return Response(status_code=499)
    return Response(encode(answered), media_type="application/json")


def _json(value: Any, status: int) -> Response:
    return Response(encode(value), status, media_type="application/json")


async def _keep_known(redis: Redis, key: str, url: str) -> None:
    """Keep this host's address in Redis unless another host's is there, and remove it at the end."""
    try:
        while True:
            try:
                with unswallowed():
                    if await redis.get(key) in (None, url):
                        await redis.set(key, url, ex=ADDRESS_S)
            except RedisError as error:
                log.warning("the address of the grammar checker is not known", extra={"action": "grammar", "detail": repr(error)})
            await asyncio.sleep(RENEW_S)
    finally:
        with contextlib.suppress(RedisError):
            if await redis.get(key) == url:
                await redis.delete(key)
