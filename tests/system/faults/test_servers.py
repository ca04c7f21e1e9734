"""Outages of Redis and Postgres: the service recovers by itself within five seconds, and running requests continue meanwhile."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psycopg
import pytest
from sqlalchemy import text

from lmaas.store.scopes import SYSTEM
from tests.integration.gateway.stack import Stream
from tests.support.conditions import until, within
from tests.system.chaos.service import GATEWAYS, Service
from tests.system.faults.conftest import RECOVERY_S, Caller, completed

#: Longer than a lease (6 s), after which a gateway that does not renew is given up.
LONGER_THAN_A_LEASE_S = 8.0


@asynccontextmanager
async def queue_away(service: Service, how: str) -> AsyncIterator[None]:
    """Take Valkey away during the block."""
    match how:
        case "stalled" | "stalled for longer than a lease":
            with service.stalled_valkey():
                yield
        case "restarted" | "restarted without memory":
            service.kill_valkey()
            yield
            service.start_valkey(forgetful=how == "restarted without memory")
        case _:
            await service.scheduler.redis.flushall()
            yield


@pytest.mark.parametrize("how", ["stalled", "stalled for longer than a lease", "restarted", "restarted without memory", "flushed"])
async def test_redis_gone_and_back(caller: Caller, how: str) -> None:
    got = [Stream() for _ in range(2 * GATEWAYS)]
    tokens = 900 if how == "stalled for longer than a lease" else 300
    models = caller.client.models
    tasks = [
        caller.stream(one, gateway, tokens=tokens, model=models[number % 2])
        for number, (one, gateway) in enumerate(zip(got, [*caller.service.gateways] * 2, strict=True))
    ]
    await until(lambda: all(one.tokens > 0 for one in got))
    async with queue_away(caller.service, how):
        if how == "stalled for longer than a lease":
            await asyncio.sleep(LONGER_THAN_A_LEASE_S)  # the fault itself
        before = [one.tokens for one in got]
        # Tokens do not pass through Redis.
        await until(lambda: all(one.tokens > count + 20 or one.done for one, count in zip(got, before, strict=True)))
    async with within(RECOVERY_S):
        for gateway in caller.service.gateways:
            for model in models:
                await until(lambda gateway=gateway, model=model: caller.works(gateway, model))
    await asyncio.gather(*tasks)
    assert all(completed(one, tokens) for one in got), [(one.error, one.tokens) for one in got]
    charged = await caller.ledger(*(one.headers["x-request-id"] for one in got))
    assert {(event.status, event.completion_tokens) for event in charged.values()} == {("completed", tokens)}
    await caller.rests()


async def test_while_redis_is_away_requests_are_refused_in_time(caller: Caller) -> None:
    caller.service.kill_valkey()
    response = await caller.ask()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_unavailable")
    assert 0 < int(response.headers["retry-after"]) <= 120
    caller.service.start_valkey()
    async with within(RECOVERY_S):
        await until(caller.works)


async def test_while_redis_stalls_requests_are_refused_in_time(caller: Caller) -> None:
    with caller.service.stalled_valkey():
        async with within(8):
            # Some requests arrive while the test waits for the first one.
            responses = await asyncio.gather(*(caller.ask() for _ in range(5)))
    assert {(response.status_code, response.json()["error"]["code"]) for response in responses} == {(503, "queue_unavailable")}
    assert all(0 < int(response.headers["retry-after"]) <= 120 for response in responses)
    async with within(RECOVERY_S):
        for gateway in caller.service.gateways:
            await until(lambda gateway=gateway: caller.works(gateway))
    await caller.rests()


async def _serves_those_it_knows(caller: Caller) -> None:
    """Check that gateways serve the tenants that they know, and report an outage to others, while Postgres is away."""
    for gateway in caller.service.gateways:
        for model in caller.client.models:
            response = await caller.ask(gateway, model=model)
            assert response.status_code == 200, response.text
        assert await caller.stranger(gateway) == (503, "database_unavailable")


async def _recovers(caller: Caller) -> None:
    async with within(RECOVERY_S):
        for gateway in caller.service.gateways:

            async def knows_who_is_unknown(gateway: str = gateway) -> bool:
                return await caller.stranger(gateway) == (401, "invalid_api_key")

            await until(knows_who_is_unknown)


async def test_postgres_gone_and_back(caller: Caller) -> None:
    got = Stream()
    task = caller.stream(got, tokens=200)
    await until(lambda: got.tokens > 0)
    await caller.service.stop_postgres()
    try:
        await _serves_those_it_knows(caller)
        await task
    finally:
        await caller.service.start_postgres()
    await _recovers(caller)
    assert completed(got, 200)
    # The request ended while the ledger was away.
    (event,) = (await caller.ledger(got.headers["x-request-id"])).values()
    assert (event.status, event.completion_tokens) == ("completed", 200)


async def test_every_connection_of_postgres_is_taken(caller: Caller) -> None:
    url = str(caller.service.settings.database_url)
    taken: list[psycopg.AsyncConnection] = []
    try:
        first = await psycopg.AsyncConnection.connect(url, autocommit=True)
        taken.append(first)

        async def full() -> bool:
            # Connections of others are cut, and taken before they are made again.
            await first.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid != pg_backend_pid() AND application_name != 'taken'"
            )
            with contextlib.suppress(psycopg.OperationalError):
                while True:
                    taken.append(await psycopg.AsyncConnection.connect(url, autocommit=True, application_name="taken"))
            others = (
                "SELECT count(*) FROM pg_stat_activity WHERE application_name != 'taken' AND backend_type = 'client backend'"
                " AND pid != pg_backend_pid()"
            )
            return await (await first.execute(others)).fetchone() == (0,)

        await until(full)
        await _serves_those_it_knows(caller)
    finally:
        for connection in taken:
            await connection.close()
    await _recovers(caller)


async def test_every_connection_of_the_gateways_waits(caller: Caller) -> None:
    """A lock that is never released: every query hangs, until the pools of the gateways have no connection left."""
    async with caller.service.db.begin(SYSTEM) as connection:
        await connection.execute(text("LOCK TABLE api_keys IN ACCESS EXCLUSIVE MODE"))
        strangers = [asyncio.create_task(caller.stranger(gateway)) for gateway in caller.service.gateways for _ in range(15)]
        for gateway in caller.service.gateways:
            assert await caller.works(gateway)
        assert set(await asyncio.gather(*strangers)) == {(503, "database_unavailable")}
    await _recovers(caller)
