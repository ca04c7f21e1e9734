"""Which grammars a gateway lets pass, what it asks a checker, and what it remembers."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lmaas.engine.client import EngineClient
from lmaas.engine.grammars.verdict import INVALID, KEY, TOO_COMPLEX, UNKNOWN, Question, Verdict, decode_question, encode
from lmaas.errors import InvalidRequest, OverLimit, Unavailable
from lmaas.gateway.grammars import MAX_BYTES, MAX_CPU_S, MAX_NEW, WINDOW_S, Grammars
from lmaas.gateway.schemas import depth
from lmaas.observability import GatewayMetrics
from lmaas.private_server import serve_privately
from lmaas.store.models import BaseModel
from tests.conftest import until
from tests.gateway.stack import CHAT, free_port

MODEL = BaseModel("mod_1", "base", "no-model", "float32", {}, 16, 8, 8, 16, 2048, 2**28, "")


def grammar(name: str) -> dict[str, Any]:
    """The parameters of a request with a schema of this name."""
    return {"response_format": {"type": "json_schema", "json_schema": {"name": name, "schema": {"type": "string", "title": name}}}}


def name_of(question: Question) -> str:
    """The name of the schema that is asked about."""
    form: Any = question.parameters["response_format"]
    return str(form["json_schema"]["name"])


class Checker:
    """A checker whose verdicts are the test's: `verdicts` by the schema's name; everything else passes."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.asked: list[str] = []
        self.models: list[str] = []
        self.verdicts: dict[str, Verdict] = {}
        self.status = 200
        self.open = asyncio.Event()
        self.open.set()

    async def check(self, request: Request) -> Response:
        """Answer one question."""
        question = decode_question(await request.body())
        self.asked.append(name_of(question))
        self.models.append(request.query_params["model"])
        await self.open.wait()
        return Response(encode(self.verdicts.get(name_of(question), Verdict(cpu_s=0.05))), self.status)


class Clock:
    """A clock that stands still."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def serving() -> AsyncIterator[Checker]:
    """A checker on a port of its own."""
    port = free_port()
    checker = Checker(f"http://127.0.0.1:{port}")
    app = Starlette(routes=[Route("/check", checker.check, methods=["POST"])])
    task = asyncio.create_task(serve_privately(app, "127.0.0.1", port))

    async def listens() -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        writer.close()
        return True

    await until(listens, every_s=0.01)
    try:
        yield checker
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def checker(redis: Redis) -> AsyncIterator[Checker]:
    """A checker whose address is known."""
    async with serving() as found:
        await redis.set(KEY, found.url)
        yield found


@pytest.fixture
async def grammars(redis: Redis) -> AsyncIterator[Grammars]:
    """The view of a gateway without a past, whose clock stands still."""
    async with EngineClient() as client:
        yield Grammars(redis, client, GatewayMetrics(), Clock())


async def test_a_grammar_is_checked_once(checker: Checker, grammars: Grammars) -> None:
    for tenant in ("a", "a", "b"):
        assert await grammars.admit(tenant, MODEL, CHAT, grammar("one"))
    assert checker.asked == ["one"]
    assert checker.models == [MODEL.id]


async def test_requests_that_come_together_share_one_check(checker: Checker, grammars: Grammars) -> None:
    checker.open.clear()
    waiting = [asyncio.create_task(grammars.admit("a", MODEL, CHAT, grammar("one"))) for _ in range(20)]
    await until(lambda: checker.asked)
    waiting[0].cancel()  # a client that leaves takes nothing from the others
    checker.open.set()
    assert await asyncio.gather(*waiting[1:]) == [True] * 19
    assert checker.asked == ["one"]


@pytest.mark.parametrize("code", [INVALID, TOO_COMPLEX])
async def test_a_refusal_is_remembered_too(checker: Checker, grammars: Grammars, code: str) -> None:
    checker.verdicts["bad"] = Verdict(code, "It explodes.", "tools", 2.0)
    for _ in range(3):
        with pytest.raises(InvalidRequest, match="It explodes") as refused:
            await grammars.admit("a", MODEL, CHAT, grammar("bad"))
        assert (refused.value.error_code, refused.value.param, refused.value.status) == (code, "tools", 400)
    assert checker.asked == ["bad"]


async def test_another_models_engine_is_asked_for_itself(checker: Checker, grammars: Grammars) -> None:
    other = BaseModel("mod_2", "other", "no-model", "float32", {}, 16, 8, 8, 16, 2048, 2**28, "")
    for model in (MODEL, other, MODEL):
        await grammars.admit("a", model, CHAT, grammar("one"))
    assert checker.models == ["mod_1", "mod_2"]


async def test_what_has_no_verdict_is_asked_again(checker: Checker, grammars: Grammars) -> None:
    checker.verdicts["slow"] = Verdict(UNKNOWN, "too slow")
    with pytest.raises(Unavailable):
        await grammars.admit("a", MODEL, CHAT, grammar("slow"))
    del checker.verdicts["slow"]
    assert await grammars.admit("a", MODEL, CHAT, grammar("slow"))


@pytest.mark.parametrize("break_it", [lambda checker: setattr(checker, "status", 503), lambda checker: setattr(checker, "status", 500)])
async def test_a_checker_that_fails_is_unavailable(checker: Checker, grammars: Grammars, break_it: Callable[[Checker], None]) -> None:
    break_it(checker)
    with pytest.raises(Unavailable) as failed:
        await grammars.admit("a", MODEL, CHAT, grammar("one"))
    assert failed.value.error_code == "grammar_check_unavailable"
    checker.status = 200
    assert await grammars.admit("a", MODEL, CHAT, grammar("one"))


async def test_a_checker_that_is_gone_is_looked_for_again(redis: Redis, grammars: Grammars) -> None:
    assert not await grammars.admit("a", MODEL, CHAT, grammar("one"))  # none is known
    async with serving() as first:
        await redis.set(KEY, first.url)
        assert await grammars.admit("a", MODEL, CHAT, grammar("one"))
    with pytest.raises(Unavailable):
        await grammars.admit("a", MODEL, CHAT, grammar("two"))
    async with serving() as second:
        await redis.set(KEY, second.url)
        assert await grammars.admit("a", MODEL, CHAT, grammar("two"))


async def test_a_flood_of_new_grammars_is_refused(redis: Redis, checker: Checker) -> None:
    clock = Clock()
    async with EngineClient() as client:
        grammars = Grammars(redis, client, GatewayMetrics(), clock)
        for number in range(MAX_NEW):
            await grammars.admit("a", MODEL, CHAT, grammar(f"s{number}"))
        with pytest.raises(OverLimit) as refused:
            await grammars.admit("a", MODEL, CHAT, grammar("one more"))
        assert refused.value.error_code == "too_many_new_schemas"
        assert refused.value.retry_after_s == pytest.approx(WINDOW_S)
        assert await grammars.admit("a", MODEL, CHAT, grammar("s0"))  # a known one does not count
        assert await grammars.admit("b", MODEL, CHAT, grammar("another tenant's"))
        clock.now += WINDOW_S
        assert await grammars.admit("a", MODEL, CHAT, grammar("one more"))


async def test_what_takes_long_to_compile_uses_up_a_tenants_time(checker: Checker, grammars: Grammars) -> None:
    for number in range(int(MAX_CPU_S / 2)):
        checker.verdicts[f"s{number}"] = Verdict(TOO_COMPLEX, "no", "tools", 2.0)
        with pytest.raises(InvalidRequest):
            await grammars.admit("a", MODEL, CHAT, grammar(f"s{number}"))
    with pytest.raises(OverLimit, match="need 20 s"):
        await grammars.admit("a", MODEL, CHAT, grammar("one more"))
    assert await grammars.admit("b", MODEL, CHAT, grammar("one more"))


async def test_a_tenants_checks_run_one_at_a_time(checker: Checker, grammars: Grammars) -> None:
    checker.open.clear()
    mine = [asyncio.create_task(grammars.admit("a", MODEL, CHAT, grammar(f"s{number}"))) for number in range(5)]
    await until(lambda: checker.asked)
    other = asyncio.create_task(grammars.admit("b", MODEL, CHAT, grammar("other")))
    await until(lambda: len(checker.asked) == 2)
    assert checker.asked == ["s0", "other"]
    checker.open.set()
    assert await asyncio.gather(*mine, other) == [True] * 6


def deep(levels: int) -> dict[str, Any]:
    """A schema that is nested."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize("schema", [deep(100), {"title": "x" * MAX_BYTES}])
async def test_what_is_too_large_is_not_even_checked(checker: Checker, grammars: Grammars, schema: dict[str, Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(InvalidRequest, match="262144 bytes and 64 levels") as refused:
        await grammars.admit("a", MODEL, CHAT, {"response_format": form})
    assert (refused.value.error_code, refused.value.param) == ("invalid_schema", "response_format")
    assert checker.asked == []


def test_depth_needs_no_recursion() -> None:
    assert depth(deep(5000)) == 5002
    assert depth("x") == 1
