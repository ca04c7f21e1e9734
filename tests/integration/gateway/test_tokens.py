"""Counts of tokens: equal to the request's own, free, without an engine, and for the tenant's own models only."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

from lmaas.engine.grammars.verdict import INVALID, TOO_COMPLEX, UNKNOWN, Prompt, Tokens, Verdict, key_of
from lmaas.inference import checker_hosts
from lmaas.inference.recent_work import MAX_CPU_S
from lmaas.states import PoolKind
from lmaas.store.models import BaseModel, put_base_model
from tests.integration.gateway.checker import Checker, serving
from tests.integration.gateway.stack import CHAT, COMPLETION, Stack, Tenant, running
from tests.support.conditions import until

TOKENIZE, DETOKENIZE = "/v1/tokenize", "/v1/detokenize"
COUNT, INPUT = "/v1/messages/count_tokens", "/v1/responses/input_tokens"
MESSAGES: list[Any] = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": [{"type": "text", "text": "How is the weather in Zürich? 🌧️"}]},
    {"role": "assistant", "content": "It rains, and rains, and rains."},
    {"role": "user", "content": "ありがとう"},
]
BODIES: dict[str, dict[str, Any]] = {
    TOKENIZE: {"prompt": "Once upon a time"},
    DETOKENIZE: {"tokens": [5, 6]},
    COUNT: {"messages": [{"role": "user", "content": "Hi"}]},
    INPUT: {"input": "Hi"},
}
ALL = pytest.mark.parametrize("path", list(BODIES))


@dataclass(frozen=True)
class Service:
    """A stack with the model `base`, which has a replica, and `cold` and `embedder`, for which no engine runs."""

    stack: Stack
    base: BaseModel
    cold: BaseModel

    async def post(self, tenant: Tenant, path: str, **body: Any) -> httpx.Response:
        """Send a request."""
        async with self.stack.client(tenant) as http:
            return await http.post(path, json={"model": "base", **body})


@pytest.fixture(scope="module")
async def service(postgres_url: str, valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    async with running(postgres_url, valkey_url, tmp_path_factory.mktemp("stack")) as stack:
        base, cold = await stack.model("base"), await stack.model("cold")
        await put_base_model(stack.db, BaseModel("", "embedder", "no-model", "float32", {}, 16, 8, 8, 16, 2048, 2**28, "", PoolKind.EMBED))
        await stack.replica(base)
        yield Service(stack, base, cold)


@pytest.fixture
async def tenant(service: Service) -> Tenant:
    return await service.stack.tenant()


@pytest.fixture
async def checker(service: Service, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Checker]:
    """A host with the test's verdicts instead of the service's own, which publishes its address again afterwards."""
    monkeypatch.setattr(checker_hosts, "ADDRESS_S", -1.0)
    async with serving() as checker:
        await service.stack.redis.set(key_of(), checker.url)
        yield checker
        await service.stack.redis.delete(key_of())

    async def again() -> bool:
        return await service.stack.redis.get(key_of()) is not None

    await until(again)


async def test_a_chat_has_as_many_tokens_as_are_counted(service: Service, tenant: Tenant) -> None:
    counted = (await service.post(tenant, TOKENIZE, messages=MESSAGES, return_token_strs=True)).json()
    assert counted["count"] == len(counted["tokens"]) == len(counted["token_strs"]) > 20
    assert counted["max_model_len"] == service.base.max_model_len
    answer = (await service.post(tenant, CHAT, messages=MESSAGES, max_tokens=1)).json()
    assert answer["usage"]["prompt_tokens"] == counted["count"]
    text = (await service.post(tenant, TOKENIZE, prompt="Once upon a time")).json()
    assert text["token_strs"] is None
    answer = (await service.post(tenant, COMPLETION, prompt="Once upon a time", max_tokens=1)).json()
    assert answer["usage"]["prompt_tokens"] == text["count"]
    back = (await service.post(tenant, DETOKENIZE, tokens=text["tokens"])).json()
    assert list(back) == ["prompt"]
    assert len(back["prompt"].split()) == text["count"]


async def test_anthropics_client_counts(service: Service, tenant: Tenant) -> None:
    given: Any = {"model": "base", "system": "You are terse.", "messages": MESSAGES[1:]}
    async with AsyncAnthropic(base_url=service.stack.url, api_key=tenant.key, max_retries=0) as client:
        counted = await client.messages.count_tokens(**given)
        message = await client.messages.create(**given, max_tokens=1)
    assert counted.input_tokens == message.usage.input_tokens > 20


async def test_openais_client_counts_with_earlier_responses(service: Service, tenant: Tenant) -> None:
    async with AsyncOpenAI(base_url=f"{service.stack.url}/v1", api_key=tenant.key, max_retries=0) as client:
        first = await client.responses.create(model="base", input="Say something long.", max_output_tokens=9)
        given: Any = {"model": "base", "input": "And now?", "instructions": "You are terse.", "previous_response_id": first.id}
        counted = await client.responses.input_tokens.count(**given)
        second = await client.responses.create(**given, max_output_tokens=1)
    assert second.usage is not None
    assert counted.object == "response.input_tokens"
    assert counted.input_tokens == second.usage.input_tokens > 15
    stranger = await service.stack.tenant()
    refused = await service.post(stranger, INPUT, input="And now?", previous_response_id=first.id)
    unknown = await service.post(stranger, INPUT, input="And now?", previous_response_id="resp_none")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, unknown.json()["error"]["code"])


async def test_a_conversation_is_counted_with_its_items(service: Service, tenant: Tenant) -> None:
    async with AsyncOpenAI(base_url=f"{service.stack.url}/v1", api_key=tenant.key, max_retries=0) as client:
        said: Any = {"type": "message", "role": "user", "content": "My name is Ada, and I live in Zürich."}
        conversation = await client.conversations.create(items=[said])
        given: Any = {"model": "base", "input": "Who am I?", "conversation": conversation.id}
        counted = await client.responses.input_tokens.count(**given)
        alone = await client.responses.input_tokens.count(**given | {"conversation": None})
        answer = await client.responses.create(**given, max_output_tokens=1)
    assert answer.usage is not None
    assert counted.input_tokens == answer.usage.input_tokens > alone.input_tokens
    refused = await service.post(await service.stack.tenant(), INPUT, input="Who am I?", conversation=conversation.id)
    assert refused.status_code == 404


@ALL
async def test_a_count_costs_nothing_and_starts_no_engine(service: Service, tenant: Tenant, path: str) -> None:
    await service.stack.adapter(tenant, "robot", service.cold, files=False)
    for model, shown in (("cold", "cold"), ("robot", "robot@1"), ("robot@1", "robot@1")):
        answer = await service.post(tenant, path, **BODIES[path], model=model)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-lmaas-model"] == shown
        assert not any(name.startswith("x-ratelimit") for name in answer.headers)
    stats = await service.stack.scheduler.stats(service.cold.id)
    assert (stats["queued"], stats["replicas"]) == (0, {})
    assert await service.stack.ledger(service.cold, tenant) == []


@ALL
async def test_another_tenants_model_does_not_exist(service: Service, tenant: Tenant, path: str) -> None:
    other = await service.stack.tenant()
    await service.stack.adapter(other, "secret", service.base, files=False)
    refused = await service.post(tenant, path, **BODIES[path], model="secret")
    assert refused.status_code == 404
    assert (
        refused.text.replace("secret", "nothing").split("request_id")[0]
        in (await service.post(tenant, path, **BODIES[path], model="nothing")).text
    )
    async with service.stack.client() as http:
        assert (await http.post(path, json={"model": "base", **BODIES[path]})).status_code == 401


@ALL
async def test_an_embedding_model_has_texts_and_no_chats(service: Service, tenant: Tenant, path: str) -> None:
    answer = await service.post(tenant, path, **BODIES[path], model="embedder")
    if path in (TOKENIZE, DETOKENIZE):
        assert answer.status_code == 200
        answer = await service.post(tenant, TOKENIZE, messages=MESSAGES, model="embedder")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_model")


@ALL
@pytest.mark.parametrize(
    ("tokens", "status", "code"),
    [
        (Tokens(INVALID, "Conversation roles must alternate.", "messages"), 400, "invalid_prompt"),
        (Tokens(TOO_COMPLEX, "It is too long."), 400, "prompt_too_long"),
        (Tokens(UNKNOWN, ""), 503, "tokenizer_unavailable"),
    ],
)
async def test_what_the_host_cannot_read(
    service: Service, tenant: Tenant, checker: Checker, path: str, tokens: Tokens, status: int, code: str
) -> None:
    checker.read = lambda _: tokens
    refused = await service.post(tenant, path, **BODIES[path])
    error = refused.json()["error"]
    anthropic = path == COUNT
    assert refused.status_code == (529 if anthropic and status == 503 else status)
    assert error["code"] == code
    assert refused.json().get("type") == ("error" if anthropic else None)
    # Anthropic's clients show only the message, so it contains the field.
    assert error["message"].endswith(tokens.message)
    if tokens.param:
        assert error["param"] == {INPUT: "input"}.get(path, "messages")
    assert ("retry-after" in refused.headers) == (status == 503)


def sent_tools(prompt: Prompt) -> Any:
    return prompt.parameters["tools"]


async def test_tools_that_cannot_be_enforced_are_counted_as_they_are_sent_to_the_engine(
    service: Service, tenant: Tenant, checker: Checker
) -> None:
    seen: list[Prompt] = []

    def read(prompt: Prompt) -> Tokens:
        seen.append(prompt)
        return Tokens(count=7)

    checker.read = read
    tool: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    for number, strict in ((1, True), (2, False)):
        checker.verdicts["tools"] = Verdict(cpu_s=0.01) if strict else Verdict(INVALID, "It is bad.", "tools")
        changed = {**tool, "function": {**tool["function"], "name": f"f{number}"}}
        answer = await service.post(tenant, TOKENIZE, messages=MESSAGES, tools=[changed], tool_choice="required")
        assert answer.json()["count"] == 7
        (sent,) = sent_tools(seen[-1])
        assert bool(sent["function"].get("strict")) == strict


async def test_a_tenants_prompts_are_read_one_by_one_and_few_may_wait(service: Service, checker: Checker) -> None:
    tenant = await service.stack.tenant(max_queued=3)
    other = await service.stack.tenant()
    checker.open.clear()
    waiting = [asyncio.create_task(service.post(tenant, TOKENIZE, prompt="x")) for _ in range(3)]
    await until(lambda: len(checker.prompts) == 1)

    async def refused() -> bool:
        answer = await service.post(tenant, TOKENIZE, prompt="x")
        return answer.status_code == 429 and answer.json()["error"]["code"] == "queue_full"

    await until(refused)
    aside = asyncio.create_task(service.post(other, TOKENIZE, prompt="x"))
    await until(lambda: len(checker.prompts) == 2)
    checker.open.set()
    assert [(await task).status_code for task in [*waiting, aside]] == [200] * 4


async def test_a_prompt_whose_client_has_left_counts_for_its_tenant(service: Service, tenant: Tenant, checker: Checker) -> None:
    checker.read = lambda _: Tokens(count=1, cpu_s=MAX_CPU_S)
    checker.open.clear()
    leaving = asyncio.create_task(service.post(tenant, TOKENIZE, prompt="x"))
    await until(lambda: checker.prompts)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    checker.open.set()

    async def over() -> bool:
        answer = await service.post(tenant, TOKENIZE, prompt="x")
        return answer.status_code == 429 and answer.json()["error"]["code"] == "too_many_token_counts"

    await until(over)
    assert len(checker.prompts) == 1


async def test_without_a_host_there_are_no_tokens(service: Service, tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checker_hosts, "ADDRESS_S", -1.0)
    await service.stack.check_no_grammars()
    try:
        refused = await service.post(tenant, TOKENIZE, prompt="x")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "tokenizer_unavailable")
        assert "Send the model a request" in refused.json()["error"]["message"]
    finally:
        service.stack.check_grammars()

    async def again() -> bool:
        return (await service.post(tenant, TOKENIZE, prompt="x")).status_code == 200

    await until(again)
