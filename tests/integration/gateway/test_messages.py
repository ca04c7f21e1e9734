"""Anthropic's Messages protocol with its own SDK, and the promises that hold for every protocol."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from anthropic import APIStatusError, AsyncAnthropic

from lmaas.keys import new_key
from lmaas.states import UsageStatus
from lmaas.store.models import BaseModel
from lmaas.store.tenants import change_key
from tests.integration.gateway.stack import Stack, Tenant, running
from tests.support.anthropic_stream import Checked, check_error, check_message, check_stream
from tests.support.conditions import until

PATH = "/v1/messages"
HI: list[Any] = [{"role": "user", "content": "Say hi."}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city", "days"]}
WEATHER: Any = {"name": "weather", "description": "The weather.", "input_schema": CITY}
STREAMS = pytest.mark.parametrize("stream", [False, True])


@dataclass(frozen=True)
class Service:
    """A stack with the model `base`, and `cold` and `fragile`, for which no engine runs."""

    stack: Stack
    base: BaseModel
    cold: BaseModel
    fragile: BaseModel

    def anthropic(self, tenant: Tenant | None, **more: Any) -> AsyncAnthropic:
        """Anthropic's own client, without retries of its own."""
        return AsyncAnthropic(base_url=self.stack.url, api_key=tenant.key if tenant else new_key(), max_retries=0, **more)

    async def post(self, tenant: Tenant | None, path: str = PATH, **more: Any) -> httpx.Response:
        """Send a plain request."""
        async with self.stack.client(tenant) as http:
            return await http.post(path, json=body(**more))

    async def stream(self, tenant: Tenant, got: bytearray | None = None, url: str = "", **more: Any) -> Checked:
        """Read a stream until it ends or breaks off."""
        received = bytearray() if got is None else got
        async with self.stack.client(tenant, url) as http, http.stream("POST", PATH, json=body(stream=True, **more)) as response:
            assert response.status_code == 200, await response.aread()
            async for chunk in response.aiter_bytes():
                received += chunk
        return check_stream(bytes(received))


def body(**more: Any) -> dict[str, Any]:
    return {"model": "base", "max_tokens": 8, "messages": HI} | more


@pytest.fixture(scope="module")
async def service(postgres_url: str, valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    async with running(postgres_url, valkey_url, tmp_path_factory.mktemp("stack")) as stack:
        base, cold, fragile = [await stack.model(name) for name in ("base", "cold", "fragile")]
        await stack.replica(base, "--fake-token-ms 1")
        yield Service(stack, base, cold, fragile)


@pytest.fixture
async def tenant(service: Service) -> Tenant:
    return await service.stack.tenant()


async def test_a_message(service: Service, tenant: Tenant) -> None:
    async with service.anthropic(tenant) as client:
        raw = await client.messages.with_raw_response.create(model="base", max_tokens=8, messages=HI, system="Be brief.")
        message = await raw.parse()
    check_message(message.to_dict())
    assert raw.headers["request-id"] == message.id.replace("msg_", "req_")
    assert (message.model, message.stop_reason, message.usage.output_tokens) == ("base", "max_tokens", 8)
    assert message.content[0].type == "text"
    assert len(message.content[0].text.split()) == 8
    (event,) = await service.stack.ledger(service.base, tenant)
    assert (event.prompt_tokens, event.completion_tokens) == (message.usage.input_tokens, 8)
    assert (event.request_id, event.status) == (raw.headers["request-id"], UsageStatus.COMPLETED)


async def test_a_streamed_message(service: Service, tenant: Tenant) -> None:
    plain = (await service.post(tenant)).json()
    checked = await service.stream(tenant)
    async with service.anthropic(tenant) as client, client.messages.stream(model="base", max_tokens=8, messages=HI) as stream:
        pieces = [text async for text in stream.text_stream]
        message = await stream.get_final_message()
    assert "".join(pieces) == checked.text == plain["content"][0]["text"]
    assert message.to_dict() | {"id": ""} == checked.message | {"id": "", "stop_details": None}
    assert checked.message["usage"] == plain["usage"]
    assert [event.completion_tokens for event in await service.stack.ledger(service.base, tenant)] == [8, 8, 8]


@STREAMS
@pytest.mark.parametrize("choice", [None, {"type": "any"}, {"type": "tool", "name": "weather"}])
async def test_the_documented_tool_loop(service: Service, tenant: Tenant, choice: Any, stream: bool) -> None:
    more: Any = {} if choice is None else {"tool_choice": choice}
    asked: dict[str, Any] = {"model": "base", "max_tokens": 60, "tools": [WEATHER]}
    messages: list[Any] = [{"role": "user", "content": "Use the tool."}]
    async with service.anthropic(tenant) as client:
        if stream:
            async with client.messages.stream(messages=messages, **asked, **more) as events:
                message: Any = await events.get_final_message()
        else:
            message = await client.messages.create(messages=messages, **asked, **more)
        assert message.stop_reason == "tool_use"
        (call,) = [block for block in message.content if block.type == "tool_use"]
        assert (call.name, call.input) == ("weather", {"city": "x", "days": 1})
        assert call.id.startswith("toolu_")
        result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "Rain."}]}
        messages += [{"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
        answer = await client.messages.create(messages=messages, **asked)
    assert answer.stop_reason == "end_turn"
    assert answer.content[0].type == "text"


@STREAMS
async def test_a_stop_sequence(service: Service, tenant: Tenant, stream: bool) -> None:
    word = (await service.post(tenant)).json()["content"][0]["text"].split()[3]
    if stream:
        message = (await service.stream(tenant, stop_sequences=[word])).message
    else:
        message = (await service.post(tenant, stop_sequences=[word])).json()
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", word)
    assert word not in message["content"][0]["text"]


async def test_the_request_pattern_of_claude_code(service: Service, tenant: Tenant) -> None:
    """The request pattern has large system blocks with `cache_control`, many tools, and a growing conversation whose beginning is found in
    the cache."""
    cached = {"cache_control": {"type": "ephemeral"}}
    tools = [WEATHER | {"name": f"tool{number}", "description": "Does it. " * 50} | cached for number in range(150)]
    system = [{"type": "text", "text": "You are an agent. " * 80} | cached, {"type": "text", "text": "Be brief. " * 60} | cached]
    messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "Read it. " * 40} | cached]}]
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14"}
    async with service.anthropic(tenant) as client:
        for turn in range(3):
            async with client.beta.messages.stream(
                model="base",
                max_tokens=8,
                system=system,
                tools=tools,
                messages=messages,
                thinking={"type": "enabled", "budget_tokens": 1024},
                metadata={"user_id": "user_1"},
                extra_headers=headers,
                extra_query={"beta": "true"},
            ) as stream:
                message = await stream.get_final_message()
            assert (message.usage.cache_read_input_tokens or 0) > 0 or turn == 0
            messages += [{"role": "assistant", "content": message.content}, {"role": "user", "content": "Go on. " * 40}]


async def test_a_waiting_client_gets_pings(service: Service, tenant: Tenant) -> None:
    got = bytearray()
    waiting = asyncio.create_task(service.stream(tenant, got, model="cold"))
    await until(lambda: b"ping" in got)
    replica = await service.stack.replica(service.cold, "--fake-token-ms 1")
    checked = await waiting
    assert checked.pings >= 1
    assert checked.comments[0].startswith("queued position=1")
    assert checked.message["stop_reason"] == "max_tokens"
    replica.kill()


async def test_the_same_request_again_gets_the_same_answer(service: Service, tenant: Tenant) -> None:
    async with service.stack.client(tenant) as http:
        headers = {"idempotency-key": "k1"}
        for stream in (False, True):
            headers["idempotency-key"] = f"k{stream}"
            first, second = [await http.post(PATH, json=body(stream=stream), headers=headers) for _ in range(2)]
            assert first.content == second.content
            assert second.headers["idempotency-replayed"] == "true"
    assert len(await service.stack.ledger(service.base, tenant)) == 2


@pytest.mark.parametrize("header", ["x-api-key", "authorization", "both"])
async def test_each_credential_works(service: Service, tenant: Tenant, header: str) -> None:
    headers = {"x-api-key": tenant.key, "authorization": f"Bearer {tenant.key}"}
    sent = headers if header == "both" else {header: headers[header]}
    async with service.stack.client() as http:
        assert (await http.post(PATH, params={"beta": "true"}, json=body(), headers=sent)).status_code == 200


async def test_the_sdk_raises_its_own_errors(service: Service, tenant: Tenant) -> None:
    for given, model, messages, expected in (
        (None, "base", HI, (401, "authentication_error", "invalid_api_key")),
        (tenant, "other", HI, (404, "not_found_error", "model_not_found")),
        (tenant, "base", [], (400, "invalid_request_error", "empty_prompt")),
        (tenant, "base", [{"role": "user", "content": "word " * 3000}], (400, "invalid_request_error", "context_length_exceeded")),
    ):
        async with service.anthropic(given) as client:
            with pytest.raises(APIStatusError) as refused:
                await client.messages.create(model=model, max_tokens=8, messages=messages)
        found = refused.value
        assert (found.status_code, found.type, found.error_code) == expected
        assert found.request_id is not None
        check_error(found.body)


async def test_a_prompt_that_is_too_long_is_told_in_anthropics_words(service: Service, tenant: Tenant) -> None:
    response = await service.post(tenant, messages=[{"role": "user", "content": "word " * 3000}], max_tokens=32_000)
    assert response.json()["error"]["message"].startswith("prompt is too long: at least 2049 tokens > 2048 maximum")


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "kind"),
    [
        ("POST", PATH, b"{", 400, "invalid_request_error"),
        ("POST", PATH, b"[]", 400, "invalid_request_error"),
        ("POST", PATH, b'{"messages": "\\ud83d"}', 400, "invalid_request_error"),
        ("GET", PATH, b"", 405, "invalid_request_error"),
        ("POST", f"{PATH}/other", b"{}", 404, "not_found_error"),
        ("POST", PATH, b" " * 20_000_000, 413, "request_too_large"),
    ],
)
async def test_errors_before_the_protocol_is_reached(
    service: Service, tenant: Tenant, method: str, path: str, content: bytes, status: int, kind: str
) -> None:
    async with httpx.AsyncClient(base_url=service.stack.url, headers=tenant.headers) as http:
        response = await http.request(method, path, content=content)
    assert response.status_code == status
    check_error(response.json())
    assert response.json()["error"]["type"] == kind
    assert response.json()["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    assert await service.stack.ledger(service.base, tenant) == []


async def test_every_path_has_anthropics_errors_for_its_clients(service: Service) -> None:
    async with httpx.AsyncClient(base_url=service.stack.url, headers={"anthropic-version": "2023-06-01"}) as http:
        for path in ("/v1/models", "/v1/other"):
            check_error((await http.get(path)).json())


@STREAMS
async def test_a_limit_that_is_reached(service: Service, tenant: Tenant, stream: bool) -> None:
    await change_key(service.stack.db, tenant.id, tenant.key_id, {"requests_per_minute": 1})
    served = await service.post(tenant)
    assert served.status_code == 200
    refused = await service.post(tenant, stream=stream)
    assert refused.status_code == 429
    check_error(refused.json())
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert int(refused.headers["retry-after"]) >= 1
    for response in (served, refused):
        assert response.headers["anthropic-ratelimit-requests-limit"] == response.headers["x-ratelimit-limit-requests"] == "1"
        assert response.headers["anthropic-ratelimit-requests-remaining"] == "0"
        assert datetime.fromisoformat(response.headers["anthropic-ratelimit-requests-reset"]) > datetime.now(UTC) - timedelta(minutes=2)


async def test_no_capacity_before_the_deadline(service: Service, tenant: Tenant) -> None:
    async with service.stack.gateway(queue_deadline_s=2) as gateway:
        async with service.stack.client(tenant, gateway.url) as http:
            plain = await http.post(PATH, json=body(model="cold"))
        checked = await service.stream(tenant, url=gateway.url, model="cold")
    assert plain.status_code == 529
    check_error(plain.json())
    assert plain.json()["error"]["type"] == "overloaded_error"
    assert checked.error is not None
    assert checked.error["type"] == "overloaded_error"
    assert checked.pings >= 1


async def test_what_is_refused_is_not_charged(service: Service, tenant: Tenant) -> None:
    for more in ({"max_tokens": 0}, {"unknown": 1}, {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, {"model": "x"}):
        response = await service.post(tenant, **more)
        assert response.status_code in (400, 404)
        assert next(iter(more)) in response.json()["error"]["message"]
    assert await service.stack.ledger(service.base, tenant) == []


async def test_an_engine_that_is_lost_in_the_middle_is_an_error_event(service: Service, tenant: Tenant) -> None:
    replica = await service.stack.replica(service.fragile, "--fake-token-ms 20")
    got = bytearray()
    stream = asyncio.create_task(service.stream(tenant, got, model="fragile", max_tokens=2000, temperature=1))
    await until(lambda: b"text_delta" in got or stream.done())
    replica.kill()
    checked = await stream
    assert checked.error is not None
    assert (checked.error["type"], checked.error["code"]) == ("api_error", "engine_failed")
    assert checked.events[-2]["type"] == "content_block_delta"
    (event,) = await service.stack.told_once(service.fragile, 1)
    assert event["status"] == UsageStatus.FAILED
    assert event["completion_tokens"] >= 1
