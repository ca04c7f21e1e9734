"""The gateway's view of grammars: which it admits, which it sends to a checker, and which verdicts it remembers."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from lmaas.engine.client import EngineClient
from lmaas.engine.grammars.verdict import INVALID, TOO_COMPLEX, UNKNOWN, Verdict, key_of
from lmaas.errors import InvalidRequest, OverLimit, Unavailable
from lmaas.inference import checker_hosts
from lmaas.inference.checker_hosts import CheckerHosts, NoCheckerError
from lmaas.inference.grammars import EXPENSIVE_S, MAX_BYTES, MAX_NEW, TOO_COMPLEX_S, Grammars
from lmaas.inference.recent_work import MAX_CPU_S, WINDOW_S
from lmaas.observability import GatewayMetrics
from lmaas.store.models import BaseModel
from tests.integration.gateway.checker import Checker, serving
from tests.integration.gateway.stack import CHAT
from tests.support.conditions import until

MODEL = BaseModel("mod_1", "base", "no-model", "float32", {}, 16, 8, 8, 16, 2048, 2**28, "")


def grammar(name: str) -> dict[str, Any]:
    """The parameters of a request with a schema of this name."""
    return {"response_format": {"type": "json_schema", "json_schema": {"name": name, "schema": {"type": "string", "title": name}}}}


async def admit(grammars: Grammars, tenant: str, model: BaseModel, path: str, parameters: dict[str, Any], max_waiting: int = 100) -> bool:
    """Return whether the grammar passes; False if there is no checker. Raises the error that a client would get."""
    lookup = grammars.look_up(tenant, model, path, parameters, "response_format")
    try:
        verdict = lookup.verdict or await grammars.check(tenant, lookup, max_waiting)
    except NoCheckerError:
        return False
    if verdict.code:
        raise InvalidRequest(verdict.message, code=verdict.code, param=verdict.param)
    return True


class Clock:
    """A clock that the test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def checker(redis: Redis) -> AsyncIterator[Checker]:
    """A checker whose address is known."""
    async with serving() as found:
        await redis.set(key_of(), found.url)
        yield found


@pytest.fixture
async def grammars(redis: Redis) -> AsyncIterator[Grammars]:
    """A gateway's grammars without remembered verdicts, with a clock that the test moves."""
    async with EngineClient() as client:
        yield Grammars(CheckerHosts(redis, client, Clock()), GatewayMetrics(), Clock())


async def test_a_grammar_is_checked_once(checker: Checker, grammars: Grammars) -> None:
    for tenant in ("a", "a", "b"):
        assert await admit(grammars, tenant, MODEL, CHAT, grammar("one"))
    assert checker.asked == ["one"]
    assert checker.models == [MODEL.id]


async def test_requests_that_come_together_share_one_check(checker: Checker, grammars: Grammars) -> None:
    checker.open.clear()
    waiting = [asyncio.create_task(admit(grammars, "a", MODEL, CHAT, grammar("one"))) for _ in range(20)]
    await until(lambda: checker.asked)
    waiting[0].cancel()  # a client that disconnects takes nothing from the others
    checker.open.set()
    assert await asyncio.gather(*waiting[1:]) == [True] * 19
    assert checker.asked == ["one"]


@pytest.mark.parametrize("code", [INVALID, TOO_COMPLEX])
async def test_a_refusal_is_remembered_too(checker: Checker, grammars: Grammars, code: str) -> None:
    checker.verdicts["bad"] = Verdict(code, "It explodes.", "tools", 2.0)
    for _ in range(3):
        with pytest.raises(InvalidRequest, match="It explodes") as refused:
            await admit(grammars, "a", MODEL, CHAT, grammar("bad"))
        assert (refused.value.error_code, refused.value.param, refused.value.status) == (code, "tools", 400)
    assert checker.asked == ["bad"]


async def test_another_models_engine_is_asked_for_itself(checker: Checker, grammars: Grammars) -> None:
    other = BaseModel("mod_2", "other", "no-model", "float32", {}, 16, 8, 8, 16, 2048, 2**28, "")
    for model in (MODEL, other, MODEL):
        await admit(grammars, "a", model, CHAT, grammar("one"))
    assert checker.models == ["mod_1", "mod_2"]


async def test_what_has_no_verdict_is_asked_again(checker: Checker, grammars: Grammars) -> None:
    checker.verdicts["slow"] = Verdict(UNKNOWN, "too slow")
    with pytest.raises(Unavailable):
        await admit(grammars, "a", MODEL, CHAT, grammar("slow"))
    del checker.verdicts["slow"]
    assert await admit(grammars, "a", MODEL, CHAT, grammar("slow"))


@pytest.mark.parametrize("break_it", [lambda checker: setattr(checker, "status", 503), lambda checker: setattr(checker, "status", 500)])
async def test_a_checker_that_fails_is_unavailable(checker: Checker, grammars: Grammars, break_it: Callable[[Checker], None]) -> None:
    break_it(checker)
    with pytest.raises(Unavailable) as failed:
        await admit(grammars, "a", MODEL, CHAT, grammar("one"))
    assert failed.value.error_code == "grammar_check_unavailable"
    checker.status = 200
    assert await admit(grammars, "a", MODEL, CHAT, grammar("one"))


async def test_a_checker_that_is_gone_is_looked_for_again(redis: Redis, grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checker_hosts, "RETRY_S", 0.3)
    assert not await admit(grammars, "a", MODEL, CHAT, grammar("one"))  # no verdict is known
    async with serving() as first:
        await redis.set(key_of(), first.url)
        assert await admit(grammars, "a", MODEL, CHAT, grammar("one"))
    with pytest.raises(Unavailable):
        await admit(grammars, "a", MODEL, CHAT, grammar("two"))
    async with serving() as second:
        await redis.set(key_of(), second.url)
        assert await admit(grammars, "a", MODEL, CHAT, grammar("two"))


async def test_another_host_takes_over_unnoticed(redis: Redis, grammars: Grammars) -> None:
    async with serving() as first:
        await redis.set(key_of(), first.url)
        assert await admit(grammars, "a", MODEL, CHAT, grammar("one"))
    asking = asyncio.create_task(admit(grammars, "a", MODEL, CHAT, grammar("two")))
    async with serving() as second:
        await redis.set(key_of(), second.url)
        assert await asking


async def test_a_flood_of_new_grammars_is_refused(redis: Redis, checker: Checker) -> None:
    clock = Clock()
    async with EngineClient() as client:
        grammars = Grammars(CheckerHosts(redis, client, clock), GatewayMetrics(), clock)
        for number in range(MAX_NEW):
            await admit(grammars, "a", MODEL, CHAT, grammar(f"s{number}"))
        with pytest.raises(OverLimit) as refused:
            await admit(grammars, "a", MODEL, CHAT, grammar("one more"))
        assert refused.value.error_code == "too_many_new_schemas"
        assert refused.value.retry_after_s == pytest.approx(WINDOW_S)
        assert await admit(grammars, "a", MODEL, CHAT, grammar("s0"))  # a known one does not count
        assert await admit(grammars, "b", MODEL, CHAT, grammar("another tenant's"))
        clock.now += WINDOW_S
        assert await admit(grammars, "a", MODEL, CHAT, grammar("one more"))


async def test_what_takes_long_to_compile_uses_up_a_tenants_time(checker: Checker, grammars: Grammars) -> None:
    for number in range(int(MAX_CPU_S / 2)):
        checker.verdicts[f"s{number}"] = Verdict(TOO_COMPLEX, "no", "tools", 2.0)
        with pytest.raises(InvalidRequest):
            await admit(grammars, "a", MODEL, CHAT, grammar(f"s{number}"))
    with pytest.raises(OverLimit, match="needed 20 s"):
        await admit(grammars, "a", MODEL, CHAT, grammar("one more"))
    assert await admit(grammars, "b", MODEL, CHAT, grammar("one more"))


async def test_a_tenants_checks_run_one_at_a_time(checker: Checker, grammars: Grammars) -> None:
    checker.open.clear()
    mine = [asyncio.create_task(admit(grammars, "a", MODEL, CHAT, grammar(f"s{number}"))) for number in range(5)]
    await until(lambda: checker.asked)
    other = asyncio.create_task(admit(grammars, "b", MODEL, CHAT, grammar("other")))
    await until(lambda: len(checker.asked) == 2)
    assert checker.asked == ["s0", "other"]
    checker.open.set()
    assert await asyncio.gather(*mine, other) == [True] * 6


def deep(levels: int) -> dict[str, Any]:
    """Return a schema that is nested this deep."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize("schema", [deep(100), {"title": "x" * MAX_BYTES}])
async def test_what_is_too_large_is_not_even_checked(checker: Checker, grammars: Grammars, schema: dict[str, Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(InvalidRequest, match="262144 bytes and 64 levels") as refused:
        await admit(grammars, "a", MODEL, CHAT, {"response_format": form})
    assert (refused.value.error_code, refused.value.param) == ("invalid_schema", "response_format")
    assert checker.asked == []


async def test_one_tenants_slow_checks_do_not_hold_up_anothers_same_grammar(checker: Checker, grammars: Grammars) -> None:
    checker.open.clear()
    slow = [asyncio.create_task(admit(grammars, "a", MODEL, CHAT, grammar(name))) for name in ("s0", "s1", "common")]
    await until(lambda: checker.asked == ["s0"])
    other = asyncio.create_task(admit(grammars, "b", MODEL, CHAT, grammar("common")))
    await until(lambda: checker.asked == ["s0", "common"])
    checker.open.set()
    assert await asyncio.gather(*slow, other) == [True] * 4
    assert checker.asked == ["s0", "common", "s1"]  # the second verdict was known by then


async def test_checks_that_are_in_line_stop_when_the_time_is_used_up(checker: Checker, grammars: Grammars) -> None:
    for number in range(15):
        checker.verdicts[f"s{number}"] = Verdict(TOO_COMPLEX, "no", "tools", 2.0)
    asked = [asyncio.create_task(admit(grammars, "a", MODEL, CHAT, grammar(f"s{number}"))) for number in range(15)]
    ends = await asyncio.gather(*asked, return_exceptions=True)
    assert Counter(map(type, ends)) == {InvalidRequest: 10, OverLimit: 5}
    assert len(checker.asked) == 10


async def test_a_tenants_waiting_requests_are_bounded(checker: Checker, grammars: Grammars) -> None:
    checker.open.clear()
    waiting = [asyncio.create_task(admit(grammars, "a", MODEL, CHAT, grammar("one"), 5)) for _ in range(5)]
    await until(lambda: checker.asked)
    with pytest.raises(OverLimit) as refused:
        await admit(grammars, "a", MODEL, CHAT, grammar("one"), 5)
    assert refused.value.error_code == "queue_full"
    checker.open.set()
    assert await asyncio.gather(*waiting) == [True] * 5
    assert await admit(grammars, "a", MODEL, CHAT, grammar("two"), 5)


async def test_using_expensive_grammars_in_turn_counts(checker: Checker, redis: Redis) -> None:
    clock = Clock()
    async with EngineClient() as client:
        grammars = Grammars(CheckerHosts(redis, client, clock), GatewayMetrics(), clock)
        for number in range(20):
            checker.verdicts[f"s{number}"] = Verdict(cpu_s=0.9)
            await admit(grammars, "a", MODEL, CHAT, grammar(f"s{number}"))
        clock.now += WINDOW_S
        for _ in range(100):
            assert await admit(grammars, "a", MODEL, CHAT, grammar("s0"))  # one of them is fine
        used = 0
        with contextlib.suppress(OverLimit):
            for used in range(50):
                await admit(grammars, "a", MODEL, CHAT, grammar(f"s{used % 20}"))
        assert 20 <= used < 30
    assert EXPENSIVE_S < 0.9


async def test_too_complex_is_not_for_ever(checker: Checker, redis: Redis) -> None:
    clock = Clock()
    checker.verdicts["bad"] = Verdict(TOO_COMPLEX, "It explodes.", "tools", 2.0)
    async with EngineClient() as client:
        grammars = Grammars(CheckerHosts(redis, client, clock), GatewayMetrics(), clock)
        with pytest.raises(InvalidRequest):
            await admit(grammars, "a", MODEL, CHAT, grammar("bad"))
        del checker.verdicts["bad"]
        with pytest.raises(InvalidRequest):
            await admit(grammars, "a", MODEL, CHAT, grammar("bad"))
        clock.now += TOO_COMPLEX_S
        assert await admit(grammars, "a", MODEL, CHAT, grammar("bad"))


async def test_a_replica_may_check_for_its_own_model(redis: Redis, grammars: Grammars) -> None:
    async with serving() as found:
        await redis.set(key_of(MODEL.id), found.url)
        assert await admit(grammars, "a", MODEL, CHAT, grammar("one"))
        other = BaseModel("mod_2", "other", "no-model", "float32", {}, 16, 8, 8, 16, 2048, 2**28, "")
        assert not await admit(grammars, "a", other, CHAT, grammar("one"))
