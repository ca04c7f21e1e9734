"""Responses to clients while a new grammar of theirs is checked."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from lmaas.engine.grammars.verdict import INVALID, Question, Verdict, key_of
from lmaas.store.models import BaseModel
from tests.integration.gateway.checker import Checker, serving
from tests.integration.gateway.stack import CHAT, Stack, Tenant, running
from tests.support.conditions import until

HI = [{"role": "user", "content": "Say hi."}]


@dataclass(frozen=True)
class Service:
    """A stack with one replica, and the host that checks for it."""

    stack: Stack
    model: BaseModel
    checker: Checker


@pytest.fixture(scope="module")
async def service(postgres_url: str, valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    folder: Path = tmp_path_factory.mktemp("stack")
    async with running(postgres_url, valkey_url, folder, queue_deadline_s=5) as stack, serving() as checker:
        await stack.check_no_grammars()
        await stack.redis.set(key_of(), checker.url)
        model = await stack.model("base")
        await stack.replica(model, "--fake-token-ms 2")
        yield Service(stack, model, checker)


@pytest.fixture
async def tenant(service: Service) -> AsyncIterator[Tenant]:
    service.checker.asked.clear()
    yield await service.stack.tenant()
    service.checker.open.set()


def ask(schema: str, **more: Any) -> dict[str, Any]:
    """Return a request with a schema of this name."""
    form = {"type": "json_schema", "json_schema": {"name": schema, "schema": {"title": schema}}}
    return {"model": "base", "max_tokens": 4, "messages": HI, "response_format": form} | more


async def test_a_refusal_has_its_own_status_also_for_a_stream(service: Service, tenant: Tenant) -> None:
    service.checker.verdicts["bad"] = Verdict(INVALID, "It is bad.", "response_format")
    async with service.stack.client(tenant) as http:
        for _ in range(2):  # new, and known
            refused = await http.post(CHAT, json=ask("bad", stream=True))
            assert refused.status_code == 400
            assert refused.json()["error"] == {
                "message": "It is bad.", "type": "invalid_request_error", "param": "response_format", "code": INVALID
            }  # fmt: skip
    assert service.checker.asked == ["bad"]
    assert await service.stack.ledger(service.model, tenant) == []


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_uses_nothing(service: Service, tenant: Tenant, stream: bool) -> None:
    service.checker.open.clear()
    async with service.stack.client(tenant) as http:
        asking = asyncio.create_task(http.post(CHAT, json=ask(f"left {stream}", stream=stream)))
        await until(lambda: service.checker.asked)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    service.checker.open.set()
    async with service.stack.client(tenant) as http:
        assert (await http.post(CHAT, json=ask(f"left {stream}"))).status_code == 200
    assert len(service.checker.asked) == 1  # the verdict of the earlier request is known
    assert len(await service.stack.told(service.model)) >= 1
    assert len(await service.stack.ledger(service.model, tenant)) == 1


async def test_a_check_ends_at_the_deadline_of_the_queue(service: Service, tenant: Tenant) -> None:
    service.checker.open.clear()
    async with service.stack.client(tenant) as http:
        late = await http.post(CHAT, json=ask("never"))
    assert (late.status_code, late.json()["error"]["code"]) == (503, "grammar_check_unavailable")
    assert "retry-after" in late.headers


def required(**function: Any) -> dict[str, Any]:
    """Return a request that requires a call of a tool which the grammar library cannot enforce."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "items": [{}]}} | function}
    return {"model": "base", "max_tokens": 4, "messages": HI, "tools": [tool], "tool_choice": "required"}


def no_strict_tools(question: Question) -> Verdict:
    """Refuse strict tools."""
    tools: Any = question.parameters.get("tools", [])
    strict = any(tool["function"].get("strict") for tool in tools)
    return Verdict(INVALID, "The tools' parameters cannot be used: no.", "tools") if strict else Verdict()


async def test_tools_that_are_not_strict_are_no_reason_to_refuse(service: Service, tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.checker, "judge", no_strict_tools)

    async def post(body: dict[str, Any]) -> httpx.Response:
        async with service.stack.client(tenant) as http:
            return await http.post(CHAT, json=body)

    answer = await post(required())
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["tool_calls"]
    refused = await post(required(strict=True))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tools")
    legacy = required(strict=True)
    functions = [tool["function"] for tool in legacy.pop("tools")]
    legacy |= {"functions": functions, "function_call": {"name": "f"}}
    del legacy["tool_choice"]
    error = (await post(legacy)).json()["error"]
    assert error["param"] == "functions"
    assert error["message"].startswith("The functions'")


@pytest.mark.parametrize("name", ["guided_json", "structured_outputs"])
async def test_a_schema_that_came_as_a_string_is_parsed_as_strictly(service: Service, tenant: Tenant, name: str) -> None:
    for text in (r'{"const": "\ud800"}', '{"a": 1, "a": 2}', r'{"const": "\u0000"}', "{", "[" * 5000):
        value: Any = text if name == "guided_json" else {"json": text}
        body = {"model": "base", "max_tokens": 4, "messages": HI, name: value}
        async with service.stack.client(tenant) as http:
            refused = await http.post(CHAT, content=json.dumps(body))
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_schema"), refused.text
