"""The request path over HTTP: responses, names, usage, waiting and refusals."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from lmaas.keys import new_key
from lmaas.states import UsageStatus
from lmaas.store.models import BaseModel
from lmaas.store.tenants import revoke_key
from tests.integration.gateway.stack import CHAT, COMPLETION, Replica, Stack, Stream, Tenant, running
from tests.support.conditions import until, within

HI = [{"role": "user", "content": "Say hi."}]
PATHS = pytest.mark.parametrize("path", [CHAT, COMPLETION])


@dataclass(frozen=True)
class Service:
    """A stack with the models `base`, which is served, `cold`, which has no engine, and `warming-up`, whose engine is expected."""

    stack: Stack
    base: BaseModel
    cold: BaseModel
    warming_up: BaseModel
    replica: Replica

    def openai(self, tenant: Tenant) -> AsyncOpenAI:
        """Return OpenAI's own client, without retries of its own."""
        return AsyncOpenAI(base_url=f"{self.stack.url}/v1", api_key=tenant.key, max_retries=0)

    async def post(self, tenant: Tenant | None, path: str, body: object, headers: dict[str, str] | None = None) -> httpx.Response:
        """Send a plain request."""
        async with self.stack.client(tenant) as http:
            return await http.post(path, json=body, headers=headers)


@pytest.fixture(scope="module")
async def service(postgres_url: str, valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    async with running(postgres_url, valkey_url, tmp_path_factory.mktemp("stack")) as stack:
        base, cold, warming_up = [await stack.model(name) for name in ("base", "cold", "warming-up")]
        yield Service(stack, base, cold, warming_up, await stack.replica(base, "--fake-token-ms 2"))


@pytest.fixture
async def tenant(service: Service) -> Tenant:
    return await service.stack.tenant()


def ask(path: str, model: str = "base", *, tokens: int = 6, **more: Any) -> dict[str, Any]:
    prompt = {"messages": HI} if path == CHAT else {"prompt": "Say hi."}
    return {"model": model, "max_tokens": tokens, **prompt, **more}


def check_error(response: httpx.Response, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    """Check the shape of an error and its retry headers; return the error."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"].startswith("req_")
    body = response.json()
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert (error["code"], error["param"]) == (code, param)
    retry = status in (429, 502, 503)
    assert response.headers["x-should-retry"] == ("true" if retry else "false")
    assert ("retry-after" in response.headers) is retry
    if retry:
        assert 1 <= int(response.headers["retry-after"]) <= 120
    return error


async def test_a_plain_chat(service: Service, tenant: Tenant) -> None:
    response = await service.post(tenant, CHAT, ask(CHAT, temperature=0), {"x-request-id": "mine"})
    assert response.status_code == 200
    request_id = response.headers["x-request-id"]
    assert request_id.startswith("req_")
    answer = response.json()
    assert answer["id"] == f"chatcmpl-{request_id}"
    assert answer["model"] == "base"
    assert answer["choices"][0]["message"]["content"]
    (event,) = await service.stack.ledger(service.base, tenant)
    assert (event.request_id, event.status, event.code, event.stream) == (request_id, UsageStatus.COMPLETED, None, False)
    assert (event.model, event.base_model, event.adapter, event.key_id) == ("base", "base", None, tenant.key_id)
    usage = answer["usage"]
    assert (event.prompt_tokens, event.completion_tokens, event.cached_tokens) == (usage["prompt_tokens"], 6, 0)
    assert event.replica_id == service.replica.id


async def test_openais_client_reads_plain_and_streamed_chats(service: Service, tenant: Tenant) -> None:
    async with service.openai(tenant) as client:
        plain = await client.chat.completions.create(model="base", messages=HI, max_tokens=20)
        parts, models, usages = [], set(), []
        options = {"include_usage": True}
        async for chunk in await client.chat.completions.create(
            model="base", messages=HI, max_tokens=20, stream=True, stream_options=options
        ):
            models.add(chunk.model)
            usages += [chunk.usage] if chunk.usage is not None else []
            parts += [choice.delta.content or "" for choice in chunk.choices]
    assert "".join(parts) == plain.choices[0].message.content
    assert models == {plain.model} == {"base"}
    assert [usage.completion_tokens for usage in usages] == [20]
    assert plain.usage.completion_tokens == 20


async def test_openais_client_reads_plain_and_streamed_completions(service: Service, tenant: Tenant) -> None:
    prompts = ["One two", "Three four five"]
    async with service.openai(tenant) as client:
        plain = await client.completions.create(model="base", prompt=prompts, max_tokens=5, n=2)
        texts: dict[int, str] = {}
        async for chunk in await client.completions.create(model="base", prompt=prompts, max_tokens=5, n=2, stream=True):
            assert chunk.model == "base"
            assert chunk.usage is None
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert texts == {choice.index: choice.text for choice in plain.choices}
    assert sorted(texts) == [0, 1, 2, 3]
    assert (plain.usage.prompt_tokens, plain.usage.completion_tokens) == (5, 20)
    events = await service.stack.ledger(service.base, tenant)
    assert {(event.prompt_tokens, event.completion_tokens) for event in events} == {(5, 20)}


@PATHS
async def test_a_stream_has_usage_only_if_asked_for(service: Service, tenant: Tenant, path: str) -> None:
    async def stream(**options: bool) -> Stream:
        more: dict[str, Any] = {"stream_options": options} if options else {}
        got = await service.stack.stream(tenant, path, ask(path, tokens=5, **more))
        assert got.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert got.done
        assert got.tokens == 5
        assert got.events[0]["id"].endswith(got.headers["x-request-id"])
        return got

    assert all("usage" not in event for event in (await stream()).events)
    assert all(event["choices"] for event in (await stream(include_usage=False, continuous_usage_stats=True)).events)
    *rest, last = (await stream(include_usage=True)).events
    assert all("usage" not in event for event in rest)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 5
    every = (await stream(include_usage=True, continuous_usage_stats=True)).events
    assert all("usage" in event for event in every)
    assert every[-1]["usage"] == last["usage"]
    assert {event.completion_tokens for event in await service.stack.ledger(service.base, tenant)} == {5}


async def test_each_choice_of_a_stream_is_whole(service: Service, tenant: Tenant) -> None:
    got = await service.stack.stream(tenant, CHAT, ask(CHAT, tokens=7, n=3))
    texts = got.texts()
    assert {index: len(tokens) for index, tokens in texts.items()} == {0: 7, 1: 7, 2: 7}
    plain = (await service.post(tenant, CHAT, ask(CHAT, tokens=7, n=3))).json()
    assert ["".join(texts[index]) for index in range(3)] == [choice["message"]["content"] for choice in plain["choices"]]
    assert {event.completion_tokens for event in await service.stack.ledger(service.base, tenant)} == {21}


@PATHS
async def test_tenants_see_the_name_that_they_asked_for_and_never_the_engines(service: Service, tenant: Tenant, path: str) -> None:
    internal = await service.stack.adapter(tenant, "support-bot", service.base)
    texts = {}
    for model in ("base", "support-bot", "support-bot@1"):
        body = ask(path, model, tokens=5)
        plain = await service.post(tenant, path, body)
        got = await service.stack.stream(tenant, path, body | {"stream_options": {"include_usage": True}})
        assert plain.json()["model"] == model
        assert {event["model"] for event in got.events} == {model}
        everything = plain.text + str(plain.headers) + "".join(got.raw) + str(got.headers)
        assert internal not in everything
        assert tenant.id not in everything
        choice = plain.json()["choices"][0]
        texts[model] = choice["message"]["content"] if path == CHAT else choice["text"]
        assert "".join(got.texts()[0]) == texts[model]
    assert texts["support-bot"] == texts["support-bot@1"] != texts["base"]
    # Another upload becomes live; the pinned name keeps the first version.
    await service.stack.adapter(tenant, "support-bot", service.base)

    async def text(model: str) -> str:
        choice = (await service.post(tenant, path, ask(path, model, tokens=5))).json()["choices"][0]
        return str(choice["message"]["content"] if path == CHAT else choice["text"])

    async with within(5):
        await until(lambda: _is_new(text, texts["support-bot"]))
    assert await text("support-bot@1") == texts["support-bot@1"]
    assert await text("support-bot@2") == await text("support-bot")
    events = await service.stack.ledger(service.base, tenant)
    assert {(event.model, event.adapter_version) for event in events} >= {("base", None), ("support-bot@1", 1), ("support-bot@2", 2)}
    assert {event.adapter for event in events if event.model == "support-bot@1"} == {internal}


async def _is_new(text: Any, old: str) -> bool:
    return bool(await text("support-bot") != old)


async def test_models_are_listed_by_their_plain_names(service: Service, tenant: Tenant) -> None:
    await service.stack.adapter(tenant, "mine", service.base)
    other = await service.stack.tenant()
    await service.stack.adapter(other, "theirs", service.base)
    async with service.openai(tenant) as client:
        listed = [model.id async for model in client.models.list()]
        assert listed == ["base", "cold", "warming-up", "mine"]
        mine, base = await client.models.retrieve("mine@1"), await client.models.retrieve("base")
        assert (mine.id, base.id) == ("mine@1", "base")
        assert min(mine.created, base.created) > 1_700_000_000
        assert (mine.max_model_len, base.max_model_len) == (2048, 2048)
    check_error(await _get(service, tenant, "/v1/models/theirs"), 404, "model_not_found", "model")


async def _get(service: Service, tenant: Tenant | None, path: str) -> httpx.Response:
    async with service.stack.client(tenant) as http:
        return await http.get(path)


async def test_a_stream_hears_of_the_queue_while_no_engine_is_ready(service: Service, tenant: Tenant) -> None:
    pool = service.warming_up
    first, second = Stream(), Stream()
    tasks = []
    for got in (first, second):
        tasks.append(asyncio.create_task(service.stack.stream(tenant, CHAT, ask(CHAT, "warming-up"), got)))
        await until(lambda got=got: got.comments)
    plain = asyncio.create_task(service.post(tenant, COMPLETION, ask(COMPLETION, "warming-up")))
    assert first.comments[0].startswith(": queued position=1 estimated_wait_s=")
    assert second.comments[0].startswith(": queued position=2 estimated_wait_s=")
    assert re.fullmatch(r": queued position=1 estimated_wait_s=[1-9]\d*( start=unknown)? cold_start=yes", first.comments[0])
    assert not first.raw
    await service.stack.replica(pool)
    await asyncio.gather(*tasks)
    assert first.done
    assert second.done
    assert first.tokens == second.tokens == 6
    assert (await plain).status_code == 200
    events = await service.stack.ledger(pool, tenant)
    assert all(event.queue_ms > 0 for event in events)
    assert len(events) == 3


async def test_past_its_deadline_a_request_is_told_to_come_again(service: Service, tenant: Tenant) -> None:
    async with service.stack.gateway(queue_deadline_s=1.2) as gateway:
        async with service.stack.client(tenant, gateway.url) as http:
            plain, stream = await asyncio.gather(
                http.post(COMPLETION, json=ask(COMPLETION, "cold")),
                service.stack.stream(tenant, CHAT, ask(CHAT, "cold"), url=gateway.url),
            )
        check_error(plain, 503, "no_capacity")
        assert stream.comments
        assert stream.error is not None
        assert (stream.error["code"], stream.done) == ("no_capacity", False)
        assert list(stream.error) == ["message", "type", "param", "code"]
    events = await service.stack.ledger(service.cold, tenant)
    assert {(event.status, event.code, event.prompt_tokens, event.replica_id) for event in events} == {
        (UsageStatus.EXPIRED, "no_capacity", 0, None)
    }
    assert all(event.queue_ms >= 1000 for event in events)
    await service.stack.idle(service.cold)


async def test_a_tenants_queue_is_bounded(service: Service) -> None:
    tenant, other = await service.stack.tenant(max_queued=1), await service.stack.tenant(max_queued=1)
    got = Stream()
    waiting = asyncio.create_task(service.stack.stream(tenant, CHAT, ask(CHAT, "cold"), got))
    await until(lambda: got.comments)
    check_error(await service.post(tenant, CHAT, ask(CHAT, "cold", stream=True)), 429, "queue_full")
    check_error(await service.post(tenant, COMPLETION, ask(COMPLETION, "cold")), 429, "queue_full")
    # Its other models and the other tenants are not affected.
    assert (await service.post(tenant, CHAT, ask(CHAT))).status_code == 200
    assert (await service.post(other, CHAT, ask(CHAT))).status_code == 200
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await service.stack.idle(service.cold)
    assert [event.status for event in await service.stack.ledger(service.cold, tenant)] == [UsageStatus.ABORTED]


async def test_what_is_refused_is_not_in_the_ledger(service: Service, tenant: Tenant) -> None:
    odd = b'{"model": "base", "max_tokens": 2, "messages": [{"role": "user", "content": "a\\u0000b \\udfff"}]}'
    async with service.stack.client(tenant) as http:
        assert (await http.post(CHAT, content=odd)).status_code == 200
        check_error(await http.post(CHAT, content=b"{"), 400, "invalid_json")
    check_error(await service.post(tenant, CHAT, ask(CHAT, tokens=5000)), 400, "out_of_range", "max_tokens")
    check_error(await service.post(tenant, CHAT, ask(CHAT, chat_template="x")), 400, "unsupported_parameter", "chat_template")
    assert len(await service.stack.ledger(service.base, tenant)) == 1


@PATHS
@pytest.mark.parametrize("stream", [True, False])
async def test_what_the_engine_refuses_is_the_clients_error(service: Service, tenant: Tenant, path: str, stream: bool) -> None:
    param = "messages" if path == CHAT else "prompt"
    long = "word " * 3000
    body = {"messages": [{"role": "user", "content": long}]} if path == CHAT else {"prompt": long}
    internal = await service.stack.adapter(tenant, "named", service.base)
    error = check_error(
        await service.post(tenant, path, {"model": "named", "stream": stream} | body), 400, "context_length_exceeded", param
    )
    assert internal not in error["message"]
    if path == COMPLETION:
        check_error(await service.post(tenant, path, ask(path, prompt=[7] * 2048, stream=stream)), 400, "context_length_exceeded", param)
        check_error(await service.post(tenant, path, ask(path, prompt=[7] * 2049, stream=stream)), 400, "context_length_exceeded", param)
    events = await service.stack.ledger(service.base, tenant)
    assert {(event.status, event.prompt_tokens, event.completion_tokens) for event in events} == {(UsageStatus.FAILED, 0, 0)}
    await service.stack.idle(service.base)


async def test_a_key_that_is_not_valid_says_nothing_more(service: Service, tenant: Tenant) -> None:
    assert (await service.post(tenant, CHAT, ask(CHAT))).status_code == 200

    async def refused() -> bool:
        return (await service.post(tenant, CHAT, ask(CHAT))).status_code == 401

    async with within(1):
        await revoke_key(service.stack.db, tenant.id, tenant.key_id)
        await until(refused)
    bodies = {(await service.post(tenant, CHAT, ask(CHAT))).text}
    credentials = ["", "Bearer", "Bearer x", f"Bearer {new_key()}", "Bearer ' OR '1'='1", "Bearer sk-lmaas-" + "a" * 5000]
    for authorization in [*credentials, f"Basic {tenant.key}", f"Bearer sk-lmaas-{'é' * 10}"]:
        async with service.stack.client() as http:
            response = await http.post(CHAT, json=ask(CHAT), headers={b"authorization": authorization.encode()})
        check_error(response, 401, "invalid_api_key")
        bodies.add(response.text)
    check_error(await service.post(None, COMPLETION, ask(COMPLETION)), 401, "invalid_api_key")
    assert len(bodies) == 1


@PATHS
async def test_what_is_somebody_elses_is_like_what_does_not_exist(service: Service, tenant: Tenant, path: str) -> None:
    other = await service.stack.tenant()
    internal = await service.stack.adapter(other, "secret-bot", service.base)
    assert (await service.post(other, path, ask(path, "secret-bot"))).status_code == 200  # now the engine has it
    own = await service.stack.adapter(tenant, "own-bot", service.base)
    assert (await service.post(tenant, path, ask(path, "own-bot"))).status_code == 200
    bodies = set()
    names = ["secret-bot", "secret-bot@1", "made-up", internal, own, f"{own}@1", "own-bot@2", "own-bot@01", "own-bot@", "base@1", "../base"]
    for name in [*names, "BASE", "bаse", "base\n", " base", "b" * 3000, "x'; DROP TABLE adapters; --"]:  # noqa: RUF001 (one is Cyrillic)
        response = await service.post(tenant, path, ask(path, name))
        check_error(response, 404, "model_not_found", "model")
        shown = name if len(name) <= 100 else name[:100] + "..."
        bodies.add(response.text.replace(json.dumps(shown, ensure_ascii=False)[1:-1], "…"))
        names_of_headers = {"date", "content-length", "content-type", "x-should-retry", "x-request-id", "openai-processing-ms"}
        assert response.headers.keys() == names_of_headers
    assert len(bodies) == 1


async def test_many_tenants_at_once_are_answered_once_each(service: Service) -> None:
    stack = service.stack
    await stack.idle(service.base)
    await stack.ledger(service.base)
    before = await service.replica.counters()
    tenants = [await stack.tenant() for _ in range(4)]
    for tenant in tenants:
        await stack.adapter(tenant, "bot", service.base)

    async def one(number: int) -> tuple[str, int]:
        tenant, path = tenants[number % 4], (CHAT, COMPLETION)[number // 4 % 2]
        body = ask(path, ("base", "bot")[number // 8 % 2], tokens=5 + number % 7, ignore_eos=True, user=str(number))
        if number % 3:
            got = await stack.stream(tenant, path, body)
            assert got.done
            assert got.tokens == body["max_tokens"]
            return got.headers["x-request-id"], got.tokens
        response = await service.post(tenant, path, body)
        assert response.status_code == 200
        return response.headers["x-request-id"], response.json()["usage"]["completion_tokens"]

    answers = dict(await asyncio.gather(*(one(number) for number in range(64))))
    told = await stack.told_once(service.base, 64)
    assert {event["request_id"]: event["completion_tokens"] for event in told} == answers
    assert {event["status"] for event in told} == {UsageStatus.COMPLETED}
    after = await service.replica.counters()
    assert sum(event["completion_tokens"] for event in told) == after[1] - before[1]
    assert sum(event["prompt_tokens"] for event in told) == after[0] - before[0]
    events = [event for tenant in tenants for event in await stack.ledger(service.base, tenant)]
    assert {event.request_id: event.completion_tokens for event in events} == answers
    await stack.idle(service.base)


async def test_no_engine_gets_a_grammar_that_was_not_checked(service: Service, tenant: Tenant) -> None:
    body = ask(CHAT, response_format={"type": "json_object"})
    await service.stack.check_no_grammars()
    refused = await service.post(tenant, CHAT, body)
    assert refused.status_code == 503, refused.text
    assert refused.json()["error"]["code"] == "grammar_check_unavailable"
    assert (await service.post(tenant, CHAT, ask(CHAT))).status_code == 200
    service.stack.check_grammars()

    async def checked() -> bool:
        return (await service.post(tenant, CHAT, body)).status_code == 200

    await until(checked)
    await service.stack.check_no_grammars()
    assert await checked()  # it is known by now
    service.stack.check_grammars()
