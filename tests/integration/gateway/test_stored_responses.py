"""Stored responses and conversations over HTTP, as OpenAI's client uses them."""

import asyncio
import json
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx
import openai
import pytest
from openai import AsyncOpenAI
from sqlalchemy import text

from lmaas.store import conversations
from lmaas.store.models import BaseModel
from lmaas.store.responses import save
from lmaas.store.scopes import SYSTEM
from lmaas.store.tenants import delete_tenant
from tests.integration.gateway.stack import Replica, Stack, Tenant, running
from tests.integration.protocols.responses.test_stored import HOSTILE, MONTH, away
from tests.integration.store.build import stored_response
from tests.support.conditions import until
from tests.support.processes import free_port

RESPONSES = "/v1/responses"


@dataclass(frozen=True)
class Service:
    stack: Stack
    model: BaseModel
    replica: Replica

    def client(self, tenant: Tenant, url: str = "") -> AsyncOpenAI:
        """Return OpenAI's client, which compares responses with the OpenAPI document."""
        http = self.stack.client(tenant, url)
        return AsyncOpenAI(base_url=f"{url or self.stack.url}/v1", api_key=tenant.key, max_retries=0, http_client=http)

    async def count(self, tenant: Tenant, table: str) -> int:
        async with self.stack.db.begin(SYSTEM) as connection:
            query = text(f"SELECT count(*) FROM {table} WHERE tenant_id = :tenant")  # noqa: S608 (our own names)
            return int((await connection.execute(query, {"tenant": tenant.id})).scalar_one())


@pytest.fixture(scope="module")
async def service(postgres_url: str, valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    async with running(postgres_url, valkey_url, tmp_path_factory.mktemp("stack")) as stack:
        model = await stack.model("base")
        yield Service(stack, model, await stack.replica(model))


@pytest.fixture
async def tenant(service: Service) -> Tenant:
    return await service.stack.tenant()


@pytest.fixture
async def client(service: Service, tenant: Tenant) -> AsyncIterator[AsyncOpenAI]:
    async with service.client(tenant) as client:
        yield client


async def ask(client: AsyncOpenAI, words: str, **more: Any) -> Any:
    return await client.responses.create(model="base", input=words, max_output_tokens=8, **more)


@pytest.mark.parametrize("stream", [True, False])
async def test_what_the_client_received_is_what_is_stored(client: AsyncOpenAI, stream: bool) -> None:
    if stream:
        events = [event async for event in await ask(client, "Say hi.", stream=True, metadata={"a": "b"})]
        made = events[-1].response
    else:
        made = await ask(client, "Say hi.", metadata={"a": "b"})
    assert made.output_text
    assert await client.responses.retrieve(made.id) == made
    [item] = (await client.responses.input_items.list(made.id)).data
    assert (item.role, item.content[0].text) == ("user", "Say hi.")
    await client.responses.delete(made.id)
    for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError) as caught:
            await call(made.id)
        assert caught.value.code == "response_not_found"
    with pytest.raises(openai.NotFoundError) as caught:
        await ask(client, "And?", previous_response_id=made.id)
    assert (caught.value.code, caught.value.param) == ("previous_response_not_found", "previous_response_id")


async def test_a_chain_reaches_the_model(service: Service, client: AsyncOpenAI) -> None:
    first = await ask(client, "one")
    second = await ask(client, "two", previous_response_id=first.id)
    third = await ask(client, "three", previous_response_id=second.id)
    assert first.usage.input_tokens < second.usage.input_tokens < third.usage.input_tokens
    assert [item.content[0].text async for item in await client.responses.input_items.list(third.id)] == ["three"]
    alone = await ask(client, "two")
    assert alone.usage.input_tokens == first.usage.input_tokens


async def test_nothing_is_stored_without_store(service: Service, tenant: Tenant, client: AsyncOpenAI) -> None:
    made = await ask(client, "Say hi.", store=False)
    assert await service.count(tenant, "responses") == 0
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        await ask(client, "And?", previous_response_id=made.id)


async def test_a_request_that_fails_stores_nothing(service: Service, tenant: Tenant, client: AsyncOpenAI) -> None:
    conversation = await client.conversations.create()
    for wrong in (
        {"model": "none"},
        {"temperature": 9},
        {"max_output_tokens": 10**6},
        {"previous_response_id": "resp_x"},
        {"store": False},
    ):
        with pytest.raises(openai.APIStatusError):
            await client.responses.create(**{"model": "base", "input": "Hi", "conversation": conversation.id, **wrong})
    assert await service.count(tenant, "responses") == 0
    assert await service.count(tenant, "conversation_items") == 0


async def test_what_has_ended_cannot_be_cancelled_or_streamed(client: AsyncOpenAI) -> None:
    made = await ask(client, "Say hi.")
    with pytest.raises(openai.BadRequestError, match="Cannot cancel a synchronous response"):
        await client.responses.cancel(made.id)
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.retrieve(made.id, stream=True)
    assert (caught.value.code, caught.value.param) == ("events_not_kept", "stream")
    assert await client.responses.retrieve(made.id, include=["message.output_text.logprobs"]) == made


async def test_pages_of_input_items(service: Service, tenant: Tenant, client: AsyncOpenAI) -> None:
    await save(service.stack.db, tenant.id, [stored_response("resp_1", 45)], MONTH)
    names = [f"msg_{number}" for number in range(1, 46)]
    assert [item.id async for item in client.responses.input_items.list("resp_1")] == names[::-1]
    assert [item.id async for item in client.responses.input_items.list("resp_1", limit=7, order="asc")] == names
    page = await client.responses.input_items.list(
        "resp_1", limit=100, order="asc", after="msg_40", include=["message.output_text.logprobs"]
    )
    assert ([item.id for item in page.data], page.has_more) == (names[40:], False)
    for wrong in ({"limit": 0}, {"limit": 101}, {"limit": "x"}, {"order": "up"}, {"after": "msg_99"}):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.input_items.list("resp_1", **wrong)
        assert caught.value.param == next(iter(wrong))


async def test_a_conversation_as_openais_client_uses_it(service: Service, client: AsyncOpenAI) -> None:
    system = {"type": "message", "role": "system", "content": "Be brief."}
    made = await client.conversations.create(items=[system], metadata={"topic": "demo"})
    assert (made.object, made.metadata) == ("conversation", {"topic": "demo"})
    assert await client.conversations.retrieve(made.id) == made
    assert (await client.conversations.update(made.id, metadata={"topic": "other"})).metadata == {"topic": "other"}
    first = await ask(client, "one", conversation=made.id)
    second = await ask(client, "two", conversation={"id": made.id})
    assert second.conversation.id == made.id
    assert second.usage.input_tokens > first.usage.input_tokens
    items = [item async for item in client.conversations.items.list(made.id, order="asc")]
    assert [item.role for item in items] == ["system", "user", "assistant", "user", "assistant"]
    assert [items[2].id, items[4].id] == [first.output[0].id, second.output[0].id]
    assert [item.id async for item in client.conversations.items.list(made.id, limit=2)] == [item.id for item in reversed(items)]
    added = await client.conversations.items.create(
        made.id,
        items=[
            {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "call_1", "output": "4"},
            {"type": "item_reference", "id": items[1].id},
        ],
    )
    assert [item.type for item in added.data] == ["function_call", "function_call_output", "message"]
    assert (added.has_more, added.first_id, added.last_id) == (False, added.data[0].id, added.data[2].id)
    assert added.data[2].id != items[1].id
    one = await client.conversations.items.retrieve(added.data[0].id, conversation_id=made.id)
    assert one == added.data[0]
    assert await client.conversations.items.delete(one.id, conversation_id=made.id) == await client.conversations.retrieve(made.id)
    with pytest.raises(openai.NotFoundError) as caught:
        await client.conversations.items.retrieve(one.id, conversation_id=made.id)
    assert caught.value.code == "item_not_found"
    gone = await client.conversations.delete(made.id)
    assert (gone.id, gone.object, gone.deleted) == (made.id, "conversation.deleted", True)
    for call in (
        client.conversations.retrieve(made.id),
        ask(client, "three", conversation=made.id),
        client.conversations.items.list(made.id),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            await call
        assert caught.value.code == "conversation_not_found"
    assert await client.responses.retrieve(first.id) == first


WRONG_BODIES: list[tuple[dict[str, Any], str]] = [
    ({"items": [{"role": "user", "content": "x"}] * 21}, "items"),
    ({"items": "x"}, "items"),
    ({"items": [1]}, "items[0]"),
    ({"items": [{"type": "web_search_call", "id": "ws_1"}]}, "items[0].type"),
    ({"items": [{"role": "robot", "content": "x"}]}, "items[0].role"),
    ({"items": [{"type": "item_reference", "id": "msg_none"}]}, "items[0].id"),
    ({"metadata": {str(number): "x" for number in range(17)}}, "metadata"),
    ({"metadata": {"x" * 65: "x"}}, "metadata"),
    ({"metadata": {"x": "x" * 513}}, "metadata"),
    ({"metadata": {"x": 1}}, "metadata"),
    ({"metadata": [1]}, "metadata"),
    ({"metadata": {"x": "\0"}}, "metadata.x"),
    ({"name": "x"}, "name"),
]


@pytest.mark.parametrize(("body", "param"), WRONG_BODIES, ids=[f"{param}-{number}" for number, (_, param) in enumerate(WRONG_BODIES)])
async def test_wrong_bodies_are_refused_by_field(service: Service, tenant: Tenant, body: dict[str, Any], param: str) -> None:
    async with service.stack.client(tenant) as http:
        made = (await http.post("/v1/conversations", json={"items": None, "metadata": None})).json()
        paths = ["/v1/conversations", f"/v1/conversations/{made['id']}" + ("/items" if param.startswith("items") else "")]
        for path in paths:
            answer = await http.post(path, json=body)
            assert answer.status_code in (400, 404), answer.text
            assert answer.json()["error"]["param"] == param
    assert await service.count(tenant, "conversations") == 1
    assert await service.count(tenant, "conversation_items") == 0


async def test_odd_text_in_items_comes_back(service: Service, tenant: Tenant) -> None:
    odd = "a\0b \N{SNOWMAN} '\"\\ \N{GRINNING FACE} </s>" + "x" * 100_000
    async with service.stack.client(tenant) as http:
        made = (await http.post("/v1/conversations", json={"items": [{"role": "user", "content": odd}]})).json()
        [item] = (await http.get(f"/v1/conversations/{made['id']}/items")).json()["data"]
    assert item["content"] == [{"type": "input_text", "text": odd}]


async def test_the_things_of_others_are_the_same_404_as_nothing(service: Service, tenant: Tenant) -> None:
    other = await service.stack.tenant()
    async with service.client(other) as client:
        conversation = await client.conversations.create(items=[{"role": "user", "content": "secret"}])
        response = await ask(client, "secret", conversation=conversation.id)
        [item, *_] = (await client.conversations.items.list(conversation.id)).data

    async def answers(response_id: str, conversation_id: str, item_id: str) -> list[Any]:
        found = []
        async with service.stack.client(tenant) as http:
            for method, path, body in (
                ("GET", f"/v1/responses/{response_id}", None),
                ("GET", f"/v1/responses/{response_id}/input_items", None),
                ("POST", f"/v1/responses/{response_id}/cancel", None),
                ("DELETE", f"/v1/responses/{response_id}", None),
                ("GET", f"/v1/conversations/{conversation_id}", None),
                ("POST", f"/v1/conversations/{conversation_id}", {"metadata": {}}),
                ("GET", f"/v1/conversations/{conversation_id}/items", None),
                ("POST", f"/v1/conversations/{conversation_id}/items", {"items": [{"role": "user", "content": "x"}]}),
                ("GET", f"/v1/conversations/{conversation_id}/items/{item_id}", None),
                ("DELETE", f"/v1/conversations/{conversation_id}/items/{item_id}", None),
                ("DELETE", f"/v1/conversations/{conversation_id}", None),
            ):
                answer = await http.request(method, path, json=body)
                assert answer.status_code == 404, (path, answer.text)
                found.append(answer.json())
            for more in (
                {"previous_response_id": response_id},
                {"conversation": conversation_id},
                {"input": [{"type": "item_reference", "id": item_id}]},
            ):
                answer = await http.post(RESPONSES, json={"model": "base", "input": "x", **more})
                assert answer.status_code == 404, (more, answer.text)
                error = answer.json()["error"]
                found.append([error["code"], error["param"], error["type"]])
        return found

    theirs = await answers(response.id, conversation.id, item.id)
    assert "secret" not in repr(theirs)
    assert theirs == await answers("resp_none", "conv_none", "msg_none")
    assert theirs == await answers("resp_" + "0" * 24, "conv_" + "0" * 20, "msg_" + "0" * 28)
    async with service.client(other) as client:
        assert (await client.responses.retrieve(response.id)).id == response.id
        assert len((await client.conversations.items.list(conversation.id)).data) == 3


@pytest.mark.parametrize("name", [name for name in HOSTILE if name and "\0" not in name], ids=range(len(HOSTILE) - 3))
async def test_hostile_ids(service: Service, tenant: Tenant, name: str) -> None:
    async with service.stack.client(tenant) as http:
        segment = "/" + quote(name, safe="", errors="replace")
        made = (await http.post("/v1/conversations")).json()
        for path in (f"/v1/responses{segment}", f"/v1/conversations{segment}", f"/v1/conversations/{made['id']}/items{segment}"):
            for method in ("GET", "DELETE"):
                answer = await http.request(method, path)
                assert answer.status_code in (404, 405, 400, 414, 431), (path[:200], answer.text)
        for body in ({"previous_response_id": name}, {"conversation": name}, {"conversation": {"id": name}}):
            answer = await http.post(RESPONSES, content=json.dumps({"model": "base", "input": "x", **body}))
            assert answer.status_code in (400, 404), answer.text
        answer = await http.get(f"/v1/conversations/{made['id']}/items", params={"after": name.encode("utf-8", "replace").decode()})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "after"


async def test_two_of_everything_at_once(service: Service, client: AsyncOpenAI) -> None:
    conversation = await client.conversations.create()
    turns = await asyncio.gather(*(ask(client, f"q{number}", conversation=conversation.id) for number in range(6)))
    items = [item async for item in client.conversations.items.list(conversation.id, order="asc")]
    answers = {turn.output[0].id: f"q{number}" for number, turn in enumerate(turns)}
    pairs = list(zip(items[::2], items[1::2], strict=True))
    assert len(pairs) == 6
    assert all(answers[answer.id] == question.content[0].text for question, answer in pairs)
    made = turns[0].id
    deleted = await asyncio.gather(*(client.responses.delete(made) for _ in range(4)), return_exceptions=True)
    assert [type(each) for each in deleted].count(openai.NotFoundError) == 3
    ended = await asyncio.gather(
        client.conversations.delete(conversation.id),
        client.conversations.delete(conversation.id),
        ask(client, "late", conversation=conversation.id),
        client.conversations.items.create(conversation.id, items=[{"role": "user", "content": "x"}]),
        return_exceptions=True,
    )
    assert [type(each) for each in ended[:2]].count(openai.NotFoundError) == 1
    assert all(not isinstance(each, BaseException) or isinstance(each, openai.NotFoundError) for each in ended)


async def test_a_deleted_tenant_leaves_nothing(service: Service, tenant: Tenant, client: AsyncOpenAI) -> None:
    conversation = await client.conversations.create(items=[{"role": "user", "content": "x"}])
    await ask(client, "one", conversation=conversation.id)
    await delete_tenant(service.stack.db, tenant.id)
    for table in ("responses", "conversations", "conversation_items"):
        assert await service.count(tenant, table) == 0


async def test_without_postgres_an_answer_comes_and_is_stored_later(service: Service, tenant: Tenant, client: AsyncOpenAI) -> None:
    await ask(client, "Say hi.")
    assert service.stack.settings.database_url is not None
    with away(service.stack.settings.database_url):
        async with asyncio.timeout(20):
            made = await ask(client, "Say hi.")
        async with service.stack.client(tenant) as http:
            for answer in (
                await http.get(f"{RESPONSES}/{made.id}"),
                await http.post(RESPONSES, json={"model": "base", "input": "x", "previous_response_id": made.id}),
            ):
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "database_unavailable")

    async def stored() -> bool:
        return await service.count(tenant, "responses") == 2

    await until(stored)
    assert await client.responses.retrieve(made.id) == made


async def test_what_a_client_saw_the_end_of_survives_the_gateways_death(service: Service, tenant: Tenant) -> None:
    port = free_port()
    environment = os.environ | service.stack.settings.environment() | {"LMAAS_PORT": str(port)}
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "lmaas", "gateway", env=environment)
    try:
        url = f"http://127.0.0.1:{port}"

        async def ready() -> bool:
            async with httpx.AsyncClient() as http:
                try:
                    return (await http.get(f"{url}/readyz")).status_code == 200
                except httpx.TransportError:
                    return False

        await until(ready, timeout_s=30)
        seen = []

        async def keep_asking(client: AsyncOpenAI, stream: bool) -> None:
            while True:
                try:
                    if stream:
                        async for event in await ask(client, secrets.token_hex(4), stream=True):
                            if event.type in ("response.completed", "response.incomplete"):
                                seen.append(event.response)
                    else:
                        seen.append(await ask(client, secrets.token_hex(4)))
                except (openai.APIError, httpx.TransportError):
                    return

        async with AsyncOpenAI(base_url=f"{url}/v1", api_key=tenant.key, max_retries=0) as client:
            asking = [asyncio.create_task(keep_asking(client, number % 2 == 0)) for number in range(6)]
            await until(lambda: len(seen) > 20, timeout_s=30)
            process.send_signal(signal.SIGKILL)
            await asyncio.gather(*asking)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
    async with service.client(tenant) as client:
        for response in seen:
            assert await client.responses.retrieve(response.id) == response


async def test_a_postgres_that_hangs_is_an_error(
    service: Service, tenant: Tenant, client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, made = await ask(client, "x"), await client.conversations.create(items=[{"role": "user", "content": "x"}])
    monkeypatch.setattr("lmaas.protocols.responses.turns.READ_S", 0.3)
    paths = [f"{RESPONSES}/{first.id}", f"{RESPONSES}/{first.id}/input_items"]
    paths += [f"/v1/conversations/{made.id}", f"/v1/conversations/{made.id}/items", f"/v1/conversations/{made.id}/items/msg_1"]
    async with service.stack.db.begin(SYSTEM) as connection, service.stack.client(tenant) as http:
        await connection.execute(text("LOCK TABLE responses, conversations"))
        for path in paths:
            answer = await http.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "database_unavailable"), path
        for body in ({"previous_response_id": first.id}, {"conversation": made.id}):
            for path in (RESPONSES, f"{RESPONSES}/input_tokens"):
                answer = await http.post(path, json={"model": "base", "input": "x"} | body)
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "database_unavailable"), path


async def test_a_full_conversation(service: Service, client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await client.conversations.create(items=[{"role": "user", "content": "x"}] * 3)
    monkeypatch.setattr(conversations, "MAX_ITEMS", 3)
    for call in (
        ask(client, "x", conversation=made.id),
        client.conversations.items.create(made.id, items=[{"role": "user", "content": "x"}]),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            await call
        assert caught.value.code == "conversation_full"
