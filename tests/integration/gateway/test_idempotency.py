"""Requests with an `Idempotency-Key`: one of them runs, and the others get its response for a day."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, ConflictError
from sqlalchemy import create_engine, func, make_url, text

from lmaas.store import idempotency
from lmaas.store.database import driver_url
from lmaas.store.models import BaseModel
from lmaas.store.scopes import SYSTEM
from lmaas.store.tenants import delete_tenant
from tests.integration.gateway.stack import CHAT, COMPLETION, Replica, Stack, Stream, Tenant, running
from tests.support.conditions import until
from tests.support.processes import free_port

PATHS = pytest.mark.parametrize("path", [CHAT, COMPLETION])
HI = [{"role": "user", "content": "Say hi."}]
LONG = 2000


@pytest.fixture(autouse=True)
def up_for_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat Postgres, which has just been started for these tests, as up for an hour."""
    monkeypatch.setattr(idempotency, "SERVER_STARTED", func.now() - timedelta(hours=1))


@dataclass(frozen=True)
class Service:
    """A stack with a model that is served slowly enough to act during a request, one without an engine, and two whose engines tests
    start."""

    stack: Stack
    model: BaseModel
    cold: BaseModel
    waking: BaseModel
    fragile: BaseModel
    replica: Replica

    async def send(self, tenant: Tenant, body: dict[str, Any], key: str = "k", *, path: str = CHAT, url: str = "") -> httpx.Response:
        """Send a request with a key; return its whole response, also if it is a stream."""
        async with self.stack.client(tenant, url) as http:
            return await http.post(path, json=body, headers={"idempotency-key": key})

    async def tokens(self) -> int:
        """Return the number of tokens that the engine has generated so far."""
        return (await self.replica.counters())[1]

    async def rows(self, tenant: Tenant) -> list[tuple[str, int | None]]:
        """Return state and size of the tenant's rows."""
        async with self.stack.db.begin(SYSTEM) as connection:
            query = text("SELECT state, length(answer) FROM idempotency WHERE tenant_id = :tenant")
            return [(state, size) for state, size in await connection.execute(query, {"tenant": tenant.id})]

    async def age(self, tenant: Tenant, interval: str) -> None:
        """Age the tenant's rows."""
        async with self.stack.db.begin(SYSTEM) as connection:
            query = text("UPDATE idempotency SET seen_at = seen_at - CAST(:age AS interval) WHERE tenant_id = :tenant")
            await connection.execute(query, {"age": interval, "tenant": tenant.id})

    async def has(self, tenant: Tenant, states: list[str]) -> bool:
        """Return whether the tenant's rows are in these states."""
        return sorted(state for state, _ in await self.rows(tenant)) == states

    async def running(self, tenant: Tenant) -> None:
        """Wait until a request of the tenant has claimed its key."""

        async def claimed() -> bool:
            return ("running", None) in await self.rows(tenant)

        await until(claimed, every_s=0.01)

    async def free(self, tenant: Tenant) -> None:
        """Wait until no key of the tenant is claimed."""
        await until(lambda: self.has(tenant, []), every_s=0.01)


@pytest.fixture(scope="module")
async def service(postgres_url: str, valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    async with running(postgres_url, valkey_url, tmp_path_factory.mktemp("stack")) as stack:
        base, cold, waking, fragile = [await stack.model(name) for name in ("base", "cold", "waking", "fragile")]
        yield Service(stack, base, cold, waking, fragile, await stack.replica(base, "--fake-token-ms 10"))


@pytest.fixture
async def tenant(service: Service) -> Tenant:
    return await service.stack.tenant()


def ask(path: str = CHAT, model: str = "base", *, tokens: int = 6, **more: Any) -> dict[str, Any]:
    prompt = {"messages": HI} if path == CHAT else {"prompt": "Say hi."}
    return {"model": model, "max_tokens": tokens, "ignore_eos": True, **prompt, **more}


def check_error(response: httpx.Response, status: int, code: str, *, retry: bool = False) -> None:
    assert response.status_code == status, response.text
    assert response.json()["error"]["code"] == code
    assert response.headers["x-should-retry"] == ("true" if retry else "false")
    assert ("retry-after" in response.headers) is retry
    assert "idempotency-replayed" not in response.headers


@PATHS
@pytest.mark.parametrize("stream", [True, False])
async def test_a_repeat_gets_the_same_bytes_and_costs_nothing(service: Service, tenant: Tenant, path: str, stream: bool) -> None:
    body = ask(path, n=2, stream=stream)
    first = await service.send(tenant, body, path=path)
    assert first.status_code == 200
    assert "idempotency-replayed" not in first.headers
    before = await service.tokens()
    for _ in range(2):
        again = await service.send(tenant, body, path=path)
        assert (again.status_code, again.content) == (200, first.content)
        assert again.headers["idempotency-replayed"] == "true"
        own = {"date", "x-request-id", "openai-processing-ms", "idempotency-replayed", "x-lmaas-model"}
        assert {name: value for name, value in again.headers.items() if name not in own} == {
            name: value for name, value in first.headers.items() if name not in own
        }
        assert again.headers["x-request-id"] != first.headers["x-request-id"]
    assert await service.tokens() == before
    (event,) = await service.stack.ledger(service.model, tenant)
    assert (event.request_id, event.completion_tokens) == (first.headers["x-request-id"], 12)


async def test_openais_client_gets_the_same_answers(service: Service, tenant: Tenant) -> None:
    key = {"Idempotency-Key": "order-17"}
    streamed = {"Idempotency-Key": "order-18"}
    async with AsyncOpenAI(base_url=f"{service.stack.url}/v1", api_key=tenant.key, max_retries=0) as client:
        plain = [await client.chat.completions.create(model="base", messages=HI, max_tokens=9, extra_headers=key) for _ in range(2)]
        assert plain[0] == plain[1]
        streams = []
        for _ in range(3):  # the response can be replayed as soon as [DONE] was sent
            stream = await client.chat.completions.create(model="base", messages=HI, max_tokens=9, stream=True, extra_headers=streamed)
            streams.append([chunk async for chunk in stream])
        assert streams[0] == streams[1] == streams[2]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streams[0]) == plain[0].choices[0].message.content
        with pytest.raises(ConflictError) as caught:
            await client.chat.completions.create(model="base", messages=HI, max_tokens=10, extra_headers=key)
        assert caught.value.code == "idempotency_mismatch"
    assert len(await service.stack.ledger(service.model, tenant)) == 2


async def test_another_request_under_the_same_key_is_refused(service: Service, tenant: Tenant) -> None:
    running = asyncio.create_task(service.send(tenant, ask(tokens=60)))
    await service.running(tenant)
    check_error(await service.send(tenant, ask(tokens=61)), 409, "idempotency_mismatch")
    assert (await running).status_code == 200
    for body, path in ((ask(tokens=61), CHAT), (ask(tokens=60, stream=True), CHAT), (ask(COMPLETION), COMPLETION)):
        check_error(await service.send(tenant, body, path=path), 409, "idempotency_mismatch")
    assert len(await service.stack.ledger(service.model, tenant)) == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_while_the_first_runs_the_others_hear_so(service: Service, tenant: Tenant, stream: bool) -> None:
    body = ask(tokens=50, stream=stream)
    first = asyncio.create_task(service.send(tenant, body))
    await service.running(tenant)
    response = await service.send(tenant, body)
    check_error(response, 409, "idempotency_in_progress", retry=True)
    assert 1 <= int(response.headers["retry-after"]) <= 5
    answer = await first
    assert (await service.send(tenant, body)).content == answer.content
    assert len(await service.stack.ledger(service.model, tenant)) == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_of_ten_at_once_through_two_gateways_one_runs(service: Service, tenant: Tenant, stream: bool) -> None:
    body = ask(tokens=20, stream=stream)
    async with service.stack.gateway() as other:
        urls = [service.stack.url, other.url] * 5
        answers = await asyncio.gather(*(service.send(tenant, body, url=url) for url in urls))
        again = [await service.send(tenant, body, url=url) for url in urls[:2]]
    ran = [answer for answer in answers if answer.status_code == 200 and "idempotency-replayed" not in answer.headers]
    assert len(ran) == 1
    for answer in answers:
        if answer.status_code != 200:
            check_error(answer, 409, "idempotency_in_progress", retry=True)
    assert {answer.content for answer in again} == {ran[0].content}
    (event,) = await service.stack.ledger(service.model, tenant)
    assert (event.request_id, event.completion_tokens) == (ran[0].headers["x-request-id"], 20)


async def test_each_tenant_has_keys_of_its_own(service: Service, tenant: Tenant) -> None:
    other = await service.stack.tenant()
    mine = await service.send(tenant, ask())
    theirs = await service.send(other, ask())
    assert "idempotency-replayed" not in theirs.headers
    assert mine.json()["id"] != theirs.json()["id"]
    check_error(await service.send(tenant, ask(tokens=5)), 409, "idempotency_mismatch")
    assert (await service.send(other, ask(tokens=5), "another")).status_code == 200
    for who in (tenant, other):
        assert (await service.send(who, ask())).headers["idempotency-replayed"] == "true"


async def test_after_a_day_the_request_runs_anew(service: Service, tenant: Tenant) -> None:
    first = await service.send(tenant, ask())
    await service.age(tenant, "23 hours 59 minutes")
    assert (await service.send(tenant, ask())).content == first.content
    await service.age(tenant, "2 minutes")
    second = await service.send(tenant, ask(tokens=4))  # the other body is forgotten
    assert "idempotency-replayed" not in second.headers
    assert (await service.send(tenant, ask(tokens=4))).content == second.content != first.content


@pytest.mark.parametrize("stream", [True, False])
async def test_what_the_engine_refused_is_kept(service: Service, tenant: Tenant, stream: bool) -> None:
    body = ask(stream=stream, messages=[{"role": "user", "content": "word " * 3000}])
    first = await service.send(tenant, body)
    check_error(first, 400, "context_length_exceeded")
    again = await service.send(tenant, body)
    assert (again.status_code, again.content, again.headers["x-should-retry"]) == (400, first.content, "false")
    assert again.headers["idempotency-replayed"] == "true"
    assert len(await service.stack.ledger(service.model, tenant)) == 1


async def test_what_failed_runs_anew(service: Service, tenant: Tenant) -> None:
    # Not accepted: no such model yet, a full queue, no capacity in time.
    check_error(await service.send(tenant, ask(model="soon")), 404, "model_not_found")
    assert await service.rows(tenant) == []
    await service.stack.adapter(tenant, "soon", service.model)
    assert (await service.send(tenant, ask(model="soon"))).status_code == 200
    busy = await service.stack.tenant(max_queued=1)
    waiting = asyncio.create_task(service.send(busy, ask(model="cold"), "first"))
    await service.running(busy)

    async def queued() -> bool:
        return bool((await service.stack.scheduler.stats(service.cold.id))["queued"] == 1)

    await until(queued, every_s=0.01)
    for _ in range(2):
        check_error(await service.send(busy, ask(model="cold"), "second"), 429, "queue_full", retry=True)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await service.free(busy)
    await service.stack.idle(service.cold)
    async with service.stack.gateway(queue_deadline_s=1.2) as gateway:
        for _ in range(2):
            check_error(await service.send(busy, ask(model="cold"), url=gateway.url), 503, "no_capacity", retry=True)
        stream = await service.send(busy, ask(model="cold", stream=True), url=gateway.url)
        assert (stream.status_code, '"no_capacity"' in stream.text) == (200, True)
    assert await service.rows(busy) == []
    await service.stack.idle(service.cold)


async def test_a_stream_that_an_engine_broke_off_runs_anew(service: Service, tenant: Tenant) -> None:
    pool = service.fragile
    replica = await service.stack.replica(pool, "--fake-token-ms 20")
    got = Stream()
    body = ask(model="fragile", tokens=100)
    task = asyncio.create_task(service.stack.stream(tenant, CHAT, body, got, headers={"idempotency-key": "k"}))
    await until(lambda: got.tokens >= 3)
    replica.kill()
    await task
    assert got.error is not None
    assert got.error["code"] == "engine_failed"
    assert await service.rows(tenant) == []  # before the client received the end
    await service.stack.replica(pool, "--fake-token-ms 1")
    again = await service.send(tenant, body | {"stream": True})
    assert (again.status_code, again.text.endswith("data: [DONE]\n\n")) == (200, True)
    events = await service.stack.ledger(pool, tenant)
    assert sorted((event.status, event.completion_tokens) for event in events if event.base_model == "fragile") == [
        ("completed", 100),
        ("failed", got.tokens),
    ]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_went_away_may_come_again(service: Service, tenant: Tenant, stream: bool) -> None:
    got = Stream()
    headers = {"idempotency-key": "k"}
    body = ask(tokens=LONG, stream=stream)
    task: asyncio.Task[Any] = asyncio.create_task(
        service.stack.stream(tenant, CHAT, body, got, headers=headers) if stream else service.send(tenant, body)
    )
    await service.running(tenant)

    async def works() -> bool:
        return await service.replica.running() > 0

    await until(works, every_s=0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await service.free(tenant)
    await service.stack.idle(service.model)
    again = await service.send(tenant, ask(tokens=7, stream=stream))
    assert again.status_code == 200
    assert "idempotency-replayed" not in again.headers
    events = await service.stack.ledger(service.model, tenant)
    assert sorted(event.status for event in events) == ["aborted", "completed"]


async def test_the_wait_for_an_engine_is_part_of_what_is_replayed(service: Service, tenant: Tenant) -> None:
    body, headers = ask(model="waking"), {"idempotency-key": "k"}
    first = Stream()
    task = asyncio.create_task(service.stack.stream(tenant, CHAT, body, first, headers=headers))
    await until(lambda: first.comments)
    check_error(await service.send(tenant, body | {"stream": True}), 409, "idempotency_in_progress", retry=True)
    await service.stack.replica(service.waking)
    await task
    assert first.done
    again = await service.stack.stream(tenant, CHAT, body, headers=headers)
    assert (again.comments, again.raw) == (first.comments, first.raw)


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_that_is_too_large_is_neither_kept_nor_made_again(service: Service, tenant: Tenant, stream: bool) -> None:
    small, large = ask(tokens=3, stream=stream), ask(tokens=40, n=4, stream=stream)
    size = len((await service.send(tenant, small, "how-much")).content)
    async with service.stack.gateway(max_kept_answer_bytes=size) as gateway:
        kept = await service.send(tenant, small, "small", url=gateway.url)
        assert len(kept.content) == size
        assert (await service.send(tenant, small, "small", url=gateway.url)).content == kept.content
        answer = await service.send(tenant, large, "large", url=gateway.url)
        assert answer.status_code == 200
        assert len(answer.content) > size
        check_error(await service.send(tenant, large, "large", url=gateway.url), 409, "idempotency_answer_too_large")
        check_error(await service.send(tenant, small, "large", url=gateway.url), 409, "idempotency_mismatch")
    assert sorted(await service.rows(tenant), key=str) == [("done", size), ("done", size), ("done", None)]


async def test_keys_that_are_none(service: Service, tenant: Tenant) -> None:
    async with service.stack.client(tenant) as http:
        keys: list[list[bytes]] = [[b""], [b"x" * 256], ["é".encode()], [b"a\tb"], [b"a", b"b"], [b"a", b"a"]]
        for given in keys:
            headers = [(b"idempotency-key", key) for key in given]
            response = await http.post(CHAT, json=ask(), headers=headers)
            check_error(response, 400, "invalid_idempotency_key")
            assert response.json()["error"]["param"] == "Idempotency-Key"
        for key in ("x" * 255, "'; DROP TABLE idempotency; --", "a b"):
            assert (await http.post(CHAT, json=ask(tokens=1), headers={"idempotency-key": key})).status_code == 200
    # Malformed requests, and those with an invalid API key, claim nothing.
    before = await service.rows(tenant)
    assert len(before) == 3
    check_error(await service.send(tenant, ask(n=129)), 400, "out_of_range")
    check_error(await service.send(tenant, {"model": "base"}), 400, "missing_parameter")
    check_error(await service.send(Tenant("", "sk-lmaas-nobody", ""), ask()), 401, "invalid_api_key")
    assert await service.rows(tenant) == before


async def test_a_deleted_tenants_answers_go(service: Service, tenant: Tenant) -> None:
    assert (await service.send(tenant, ask())).status_code == 200
    late = asyncio.create_task(service.send(tenant, ask(tokens=40), "late"))
    await service.running(tenant)
    await delete_tenant(service.stack.db, tenant.id)
    assert await service.rows(tenant) == []
    assert (await late).status_code == 200
    assert await service.rows(tenant) == []


@contextmanager
def _away(url: str) -> Iterator[None]:
    """Make Postgres refuse this database during the block, as when it is down."""
    admin = create_engine(driver_url(make_url(url).set(database="postgres").render_as_string(False)), isolation_level="AUTOCOMMIT")
    name = make_url(url).database
    try:
        with admin.connect() as connection:
            connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false"))
            connection.execute(text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"), {"name": name})
        yield
    finally:
        with admin.connect() as connection:
            connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"))
        admin.dispose()


async def test_without_postgres_such_requests_are_not_accepted_and_others_flow(service: Service, tenant: Tenant) -> None:
    stack = service.stack
    assert stack.settings.database_url is not None
    async with stack.client(tenant) as http:
        assert (await http.post(CHAT, json=ask())).status_code == 200
        kept = await service.send(tenant, ask(), "kept")
        failed = asyncio.create_task(service.send(tenant, ask(model="cold"), "failed"))
        runs = asyncio.create_task(service.send(tenant, ask(tokens=200), "runs"))
        await until(lambda: service.has(tenant, ["done", "running", "running"]), every_s=0.01)
        with _away(stack.settings.database_url):
            for key in ("new", "kept"):
                check_error(await service.send(tenant, ask(), key), 503, "database_unavailable", retry=True)
            assert (await http.post(CHAT, json=ask())).status_code == 200
            # The response still arrives, and is stored when Postgres is back; so is the failure of the other request.
            answer = await runs
            assert answer.status_code == 200
            failed.cancel()
            await asyncio.gather(failed, return_exceptions=True)
            await stack.idle(service.cold)
    await until(lambda: service.has(tenant, ["done", "done"]))
    assert (await service.send(tenant, ask(tokens=200), "runs")).content == answer.content
    assert (await service.send(tenant, ask(), "kept")).content == kept.content
    assert (await service.send(tenant, ask(), "new")).status_code == 200
    events = await stack.ledger(service.model, tenant)
    assert len([event for event in events if event.status == "completed"]) == 5


async def test_a_postgres_that_hangs_holds_up_no_answer(service: Service, tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmaas.web.idempotency.CLAIM_S", 0.3)
    monkeypatch.setattr("lmaas.web.idempotency.SETTLE_S", 0.3)
    body = ask(tokens=20, stream=True)
    running = asyncio.create_task(service.send(tenant, body))
    await service.running(tenant)
    async with service.stack.db.begin(SYSTEM) as connection:
        await connection.execute(text("LOCK TABLE idempotency"))
        answer = await asyncio.wait_for(running, 60)
        assert answer.text.endswith("data: [DONE]\n\n")
        check_error(await service.send(tenant, ask(), "new"), 503, "database_unavailable", retry=True)
    await until(lambda: service.has(tenant, ["done"]))
    assert (await service.send(tenant, body)).content == answer.content


async def test_a_killed_gateways_request_is_taken_over(service: Service, tenant: Tenant) -> None:
    port = free_port()
    environment = os.environ | service.stack.settings.environment() | {"LMAAS_PORT": str(port)}
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "lmaas", "gateway", env=environment)
    try:
        url = f"http://127.0.0.1:{port}"

        async def up() -> bool:
            assert process.returncode is None
            async with httpx.AsyncClient() as http:
                try:
                    return (await http.get(f"{url}/readyz")).status_code == 200
                except httpx.TransportError:
                    return False

        await until(up)
        got = Stream()
        headers = {"idempotency-key": "k"}
        task = asyncio.create_task(service.stack.stream(tenant, CHAT, ask(tokens=LONG), got, url, headers))
        await until(lambda: got.tokens >= 3)
    finally:
        process.kill()
        await process.wait()
    with pytest.raises(httpx.TransportError):
        await task
    body = ask(tokens=5, stream=True)
    check_error(await service.send(tenant, ask(tokens=LONG, stream=True)), 409, "idempotency_in_progress", retry=True)
    await service.age(tenant, "30 seconds")
    again = await service.send(tenant, body)
    assert (again.status_code, again.text.endswith("data: [DONE]\n\n")) == (200, True)
    assert (await service.send(tenant, body)).content == again.content


async def test_a_living_gateways_request_is_not_taken_over(service: Service, tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmaas.web.idempotency.SEEN_EVERY_S", 0.1)
    got = Stream()
    body = ask(tokens=400)
    task = asyncio.create_task(service.stack.stream(tenant, CHAT, body, got, headers={"idempotency-key": "k"}))
    await service.running(tenant)
    await service.age(tenant, "29 seconds")

    async def seen() -> bool:
        async with service.stack.db.begin(SYSTEM) as connection:
            query = text("SELECT seen_at > now() - interval '10 seconds' FROM idempotency WHERE tenant_id = :tenant")
            return bool((await connection.execute(query, {"tenant": tenant.id})).scalar_one())

    await until(seen)
    check_error(await service.send(tenant, body | {"stream": True}), 409, "idempotency_in_progress", retry=True)
    await task
    assert got.done


async def test_a_request_that_a_stopping_gateway_cut_runs_anew(service: Service, tenant: Tenant) -> None:
    body = ask(tokens=LONG)
    async with service.stack.gateway(drain_timeout_s=1) as gateway:
        plain = asyncio.create_task(service.send(tenant, body, "plain", url=gateway.url))
        stream = asyncio.create_task(service.send(tenant, body | {"stream": True}, "stream", url=gateway.url))
        await until(lambda: service.has(tenant, ["running"] * 2), every_s=0.01)
        gateway.stop()
        check_error(await plain, 503, "gateway_stopped", retry=True)
        assert '"gateway_stopped"' in (await stream).text
        assert await service.rows(tenant) == []
