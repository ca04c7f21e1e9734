"""The promises of every protocol that generates text, by the same tests for each: one usage event with exact tokens, limits, idempotency,
other tenants' models, refusals without cost, retries before the first byte, and failures in the middle."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from lmaas.states import UsageStatus
from lmaas.store.models import BaseModel
from lmaas.store.tenants import change_key
from tests.integration.gateway.stack import Replica, Stack, Tenant, running
from tests.support.anthropic_stream import check_stream
from tests.support.conditions import until
from tests.support.response_streams import check as check_response_stream


@dataclass(frozen=True)
class Protocol:
    """One endpoint: the shape of its requests and of its responses."""

    path: str
    prompt: dict[str, Any]
    limit: str
    #: The names in the usage of the prompt's and the completion's tokens.
    counts: tuple[str, str]
    #: A part of every event that has a piece of the completion.
    piece: bytes
    #: Checks a stream, and returns the code of the error with which it ended, or None.
    failure: Callable[[bytes], str | None]

    def body(self, model: str = "base", tokens: int = 6, **more: Any) -> dict[str, Any]:
        """Return a request."""
        return {"model": model, self.limit: tokens} | self.prompt | more

    def tokens(self, answer: dict[str, Any]) -> tuple[int, int]:
        """Return the tokens of the prompt and of the completion."""
        prompt, made = (answer["usage"][name] for name in self.counts)
        return prompt, made


def openai_failure(stream: bytes) -> str | None:
    """Return the code of OpenAI's error event. Without one, the stream ends with its mark."""
    events = [block.removeprefix(b"data: ") for block in stream.split(b"\n\n") if block.startswith(b"data: ")]
    if events[-1] == b"[DONE]":
        return None
    code: str = json.loads(events[-1])["error"]["code"]
    return code


def response_failure(stream: bytes) -> str | None:
    """Return the code of a failed response."""
    error = check_response_stream(stream).response["error"]
    return None if error is None else str(error["code"])


def message_failure(stream: bytes) -> str | None:
    """Return the type of the error event."""
    error = check_stream(stream).error
    return None if error is None else str(error["type"])


SAID = [{"role": "user", "content": "Say hi."}]
OPENAI = ("prompt_tokens", "completion_tokens")
OTHERS = ("input_tokens", "output_tokens")
PROTOCOLS = [
    Protocol("/v1/chat/completions", {"messages": SAID}, "max_tokens", OPENAI, b'"content":', openai_failure),
    Protocol("/v1/completions", {"prompt": "Say hi."}, "max_tokens", OPENAI, b'"text":', openai_failure),
    Protocol("/v1/responses", {"input": "Say hi."}, "max_output_tokens", OTHERS, b"output_text.delta", response_failure),
    Protocol("/v1/messages", {"messages": SAID}, "max_tokens", OTHERS, b"text_delta", message_failure),
]
EACH = pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.path)
STREAMS = pytest.mark.parametrize("stream", [False, True])


@dataclass(frozen=True)
class Service:
    """A stack that serves the model `base`."""

    stack: Stack
    base: BaseModel
    replica: Replica

    async def post(self, tenant: Tenant, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> httpx.Response:
        """Send a request, and read its whole response."""
        async with self.stack.client(tenant) as http:
            return await http.post(path, json=body, headers=headers)

    async def read(self, tenant: Tenant, path: str, body: dict[str, Any], into: bytearray) -> None:
        """Read a stream."""
        sent = body | {"stream": True}
        async with self.stack.client(tenant) as http, http.stream("POST", path, json=sent) as response:
            async for chunk in response.aiter_bytes():
                into += chunk


@pytest.fixture(scope="module")
async def service(postgres_url: str, valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    async with running(postgres_url, valkey_url, tmp_path_factory.mktemp("stack")) as stack:
        base = await stack.model("base")
        yield Service(stack, base, await stack.replica(base, "--fake-token-ms 2"))


@pytest.fixture
async def tenant(service: Service) -> Tenant:
    return await service.stack.tenant()


@EACH
async def test_one_usage_event_with_the_engines_tokens(service: Service, tenant: Tenant, protocol: Protocol) -> None:
    before = await service.replica.counters()
    answer = await service.post(tenant, protocol.path, protocol.body())
    assert answer.status_code == 200
    streamed = await service.post(tenant, protocol.path, protocol.body(stream=True))
    assert protocol.failure(streamed.content) is None
    after = await service.replica.counters()
    events = await service.stack.ledger(service.base, tenant)
    assert [(event.status, event.prompt_tokens, event.completion_tokens) for event in events] == [
        (UsageStatus.COMPLETED, *protocol.tokens(answer.json()))
    ] * 2
    assert {event.request_id for event in events} == {each.headers["x-request-id"] for each in (answer, streamed)}
    assert sum(event.prompt_tokens for event in events) == after[0] - before[0]
    assert sum(event.completion_tokens for event in events) == after[1] - before[1] == 12


@EACH
@STREAMS
async def test_a_limit_is_exact(service: Service, tenant: Tenant, protocol: Protocol, stream: bool) -> None:
    await change_key(service.stack.db, tenant.id, tenant.key_id, {"requests_per_minute": 2})
    answers = await asyncio.gather(*(service.post(tenant, protocol.path, protocol.body(stream=stream)) for _ in range(5)))
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429, 429]
    for answer in answers:
        assert answer.headers["x-ratelimit-limit-requests"] == "2"
        assert ("retry-after" in answer.headers) is (answer.status_code == 429)
    assert len(await service.stack.ledger(service.base, tenant)) == 2


@EACH
@STREAMS
async def test_a_repeated_request_runs_once(service: Service, tenant: Tenant, protocol: Protocol, stream: bool) -> None:
    first, second = [await service.post(tenant, protocol.path, protocol.body(stream=stream), {"idempotency-key": "one"}) for _ in range(2)]
    assert first.status_code == second.status_code == 200
    assert first.content == second.content
    assert (first.headers.get("idempotency-replayed"), second.headers["idempotency-replayed"]) == (None, "true")
    other = await service.post(tenant, protocol.path, protocol.body(tokens=5), {"idempotency-key": "one"})
    assert other.status_code == 409
    assert len(await service.stack.ledger(service.base, tenant)) == 1


@EACH
@STREAMS
async def test_the_models_of_others_do_not_exist(service: Service, tenant: Tenant, protocol: Protocol, stream: bool) -> None:
    other = await service.stack.tenant()
    internal = await service.stack.adapter(other, "theirs", service.base)
    refused = [await service.post(tenant, protocol.path, protocol.body(name, stream=stream)) for name in ("theirs", internal, "nobodys")]
    assert [answer.status_code for answer in refused] == [404] * 3
    own = [
        answer.text.replace(answer.headers["x-request-id"], "").replace(name, "")
        for answer, name in zip(refused, ("theirs", internal, "nobodys"), strict=True)
    ]
    assert own[0] == own[2]
    mine = await service.post(other, protocol.path, protocol.body("theirs", stream=stream))
    assert mine.status_code == 200
    assert internal not in mine.text
    assert await service.stack.ledger(service.base, tenant) == []


@EACH
@STREAMS
async def test_a_refusal_costs_nothing_and_names_its_field(service: Service, tenant: Tenant, protocol: Protocol, stream: bool) -> None:
    for changes in ({"unknown_field": 1}, {"temperature": 3}, {protocol.limit: 0}, {next(iter(protocol.prompt)): None}):
        answer = await service.post(tenant, protocol.path, protocol.body(stream=stream) | changes)
        assert answer.status_code == 400, answer.text
        assert next(iter(changes)) in json.dumps(answer.json())
        assert answer.headers["x-should-retry"] == "false"
    assert await service.stack.ledger(service.base, tenant) == []


async def test_an_engine_lost_before_the_first_byte_costs_only_time(service: Service, tenant: Tenant) -> None:
    pool = await service.stack.model("frozen")
    lost = await service.stack.replica(pool)
    lost.freeze()
    cases = [(protocol, stream) for protocol in PROTOCOLS for stream in (False, True)]
    asked = [asyncio.create_task(service.post(tenant, protocol.path, protocol.body("frozen", stream=stream))) for protocol, stream in cases]

    async def granted() -> bool:
        return bool((await service.stack.scheduler.stats(pool.id))["load"] == len(cases))

    await until(granted)
    await service.stack.replica(pool)
    lost.kill()
    for (protocol, stream), answer in zip(cases, await asyncio.gather(*asked), strict=True):
        assert answer.status_code == 200
        assert protocol.failure(answer.content) is None if stream else protocol.tokens(answer.json())[1] == 6
    events = await service.stack.ledger(pool, tenant)
    assert [(event.status, event.completion_tokens) for event in events] == [(UsageStatus.COMPLETED, 6)] * len(cases)


async def test_an_engine_lost_in_the_middle_is_told_in_the_protocols_way(service: Service, tenant: Tenant) -> None:
    pool = await service.stack.model("dying")
    replica = await service.stack.replica(pool, "--fake-token-ms 20")
    received = [bytearray() for _ in PROTOCOLS]
    reading = [
        asyncio.create_task(service.read(tenant, protocol.path, protocol.body("dying", 1000), into))
        for protocol, into in zip(PROTOCOLS, received, strict=True)
    ]
    await until(lambda: all(into.count(protocol.piece) > 2 for protocol, into in zip(PROTOCOLS, received, strict=True)))
    replica.kill()
    await asyncio.gather(*reading)
    found = [protocol.failure(bytes(into)) for protocol, into in zip(PROTOCOLS, received, strict=True)]
    assert found == ["engine_failed", "engine_failed", "server_error", "api_error"]
    events = await service.stack.ledger(pool, tenant)
    assert [(event.status, event.code) for event in events] == [(UsageStatus.FAILED, "engine_failed")] * len(PROTOCOLS)
    assert all(event.completion_tokens > 0 for event in events)


async def test_clients_that_leave_are_charged_what_was_made(service: Service, tenant: Tenant) -> None:
    pool = await service.stack.model("left")
    replica = await service.stack.replica(pool, "--fake-token-ms 20")
    before = await replica.counters()
    received = [bytearray() for _ in PROTOCOLS]
    reading = [
        asyncio.create_task(service.read(tenant, protocol.path, protocol.body("left", 1000), into))
        for protocol, into in zip(PROTOCOLS, received, strict=True)
    ]
    await until(lambda: all(into.count(protocol.piece) > 2 for protocol, into in zip(PROTOCOLS, received, strict=True)))
    for task in reading:
        task.cancel()
    await asyncio.gather(*reading, return_exceptions=True)
    await service.stack.idle(pool)
    await service.stack.told_once(pool, len(PROTOCOLS))
    events = await service.stack.ledger(pool, tenant)
    assert {event.status for event in events} == {UsageStatus.ABORTED}
    after = await replica.counters()
    assert sum(event.completion_tokens for event in events) == after[1] - before[1]
    assert sum(event.prompt_tokens for event in events) == after[0] - before[0]
