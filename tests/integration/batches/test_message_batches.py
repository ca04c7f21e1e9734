"""Message batches with Anthropic's client, with the steps of a runner done one by one."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import AsyncAnthropic
from anthropic.types.messages.batch_create_params import Request
from sqlalchemy import text

from lmaas.admission.tiers import TIERS, batch_limits
from lmaas.error_bodies import anthropic_body
from lmaas.errors import ModelNotFound, Unavailable
from lmaas.files.service import DOWNLOADS_AT_ONCE
from lmaas.states import Dialect
from lmaas.store.batches import NewBatch, create_batch
from lmaas.store.line_leases import stop_batch
from lmaas.store.models import BaseModel
from lmaas.store.objects import Objects
from lmaas.store.scopes import SYSTEM
from tests.integration.batches.conftest import Account, Steps, jsonl, line
from tests.integration.gateway.stack import CHAT, Stack
from tests.support.batches import line_rows
from tests.support.conditions import until

MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "base",
    "content": [{"type": "text", "text": "Hi 🦜"}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 1, "output_tokens": 2},
}


@pytest.fixture
async def messages(account: Account) -> AsyncIterator[AsyncAnthropic]:
    """Anthropic's client with the tenant's key."""
    async with AsyncAnthropic(base_url=account.stack.url, api_key=account.tenant.key, max_retries=0) as client:
        yield client


def requests(count: int, **params: Any) -> list[Request]:
    return [
        {
            "custom_id": f"id-{number}",
            "params": {"model": "base", "max_tokens": 5, "messages": [{"role": "user", "content": f"Grüße {number}"}], **params},
        }
        for number in range(count)
    ]


async def results(client: AsyncAnthropic, batch_id: str) -> dict[str, Any]:
    return {each.custom_id: each.result async for each in await client.messages.batches.results(batch_id)}


async def test_a_message_batch_from_its_creation_to_its_deletion(
    messages: AsyncAnthropic, account: Account, steps: Steps, base: BaseModel, stack: Stack
) -> None:
    batch = await messages.messages.batches.create(requests=requests(4))
    assert (batch.type, batch.processing_status, batch.results_url, batch.ended_at) == ("message_batch", "in_progress", None, None)
    assert (batch.expires_at - batch.created_at).total_seconds() == 86_400
    assert batch.request_counts.processing == 4
    with pytest.raises(anthropic.AnthropicError, match="No `results_url`"):
        await messages.messages.batches.results(batch.id)
    await steps.validate()
    one, two, three, four = await steps.lease(4)
    await steps.end([one], answer=json.dumps(MESSAGE).encode())
    await steps.end([two], state="failed", answer=json.dumps(anthropic_body(ModelNotFound("x"), "req_1")).encode())
    batch = await messages.messages.batches.retrieve(batch.id)
    assert batch.request_counts.to_dict() == {"processing": 4, "succeeded": 0, "errored": 0, "canceled": 0, "expired": 0}
    with pytest.raises(anthropic.ConflictError):
        await messages.messages.batches.delete(batch.id)
    await steps.end([three, four], answer=json.dumps(MESSAGE).encode())
    await steps.finalize()
    batch = await messages.messages.batches.retrieve(batch.id)
    assert (batch.processing_status, batch.archived_at) == ("ended", None)
    assert batch.ended_at is not None
    assert batch.request_counts.to_dict() == {"processing": 0, "succeeded": 3, "errored": 1, "canceled": 0, "expired": 0}
    assert batch.results_url == f"{stack.url}/v1/messages/batches/{batch.id}/results"
    async with httpx.AsyncClient(base_url=stack.url, headers=account.tenant.headers) as http:
        proxied = await http.get(f"/v1/messages/batches/{batch.id}", headers={"x-forwarded-proto": "https", "host": "api.example.com"})
        assert proxied.json()["results_url"] == f"https://api.example.com/v1/messages/batches/{batch.id}/results"
        response = await http.head(f"/v1/messages/batches/{batch.id}/results")
        assert (response.status_code, response.headers["content-type"]) == (200, "application/x-jsonl")
    found = await results(messages, batch.id)
    assert set(found) == {f"id-{number}" for number in range(4)}
    assert sorted(result.type for result in found.values()) == ["errored", "succeeded", "succeeded", "succeeded"]
    succeeded = next(result for result in found.values() if result.type == "succeeded")
    assert succeeded.message.content[0].text == "Hi 🦜"
    errored = next(result for result in found.values() if result.type == "errored")
    assert (errored.error.error.type, errored.error.request_id) == ("not_found_error", "req_1")
    assert await account.kept() == [f"{batch.id}_input.jsonl", f"{batch.id}_results.jsonl"]
    # OpenAI's API does not show this batch.
    assert (await account.client.batches.list()).data == []
    assert (await messages.messages.batches.delete(batch.id)).type == "message_batch_deleted"
    assert await account.kept() == []
    with pytest.raises(anthropic.NotFoundError):
        await messages.messages.batches.retrieve(batch.id)


async def test_what_is_wrong_with_params_comes_with_the_results(messages: AsyncAnthropic, steps: Steps, base: BaseModel) -> None:
    batch = await messages.messages.batches.create(requests=requests(2, model="nothing"))
    await steps.validate()
    await steps.finalize()
    batch = await messages.messages.batches.retrieve(batch.id)
    assert batch.request_counts.errored == 2
    for result in (await results(messages, batch.id)).values():
        assert result.error.error.type == "not_found_error"
        assert result.error.request_id.startswith("req_")


async def test_results_are_downloads_like_those_of_files(
    messages: AsyncAnthropic, account: Account, steps: Steps, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = await messages.messages.batches.create(requests=requests(2, model="nothing"))
    await steps.validate()
    await steps.finalize()
    path, may_read, waiting, read = f"/v1/messages/batches/{batch.id}/results", asyncio.Event(), 0, Objects.read

    async def waits(self: Objects, key: str, ranges: Any) -> list[bytes]:
        nonlocal waiting
        waiting += 1
        await may_read.wait()
        return await read(self, key, ranges)

    async def fails(self: Objects, key: str, ranges: Any) -> list[bytes]:
        raise Unavailable("The object store cannot be read now.", code="object_store_unavailable", retry_after_s=10)

    async def is_gone(self: Objects, key: str, ranges: Any) -> list[bytes]:
        raise FileNotFoundError

    async with httpx.AsyncClient(base_url=account.stack.url, headers=account.tenant.headers) as http:
        monkeypatch.setattr(Objects, "read", waits)
        downloads = [asyncio.create_task(http.get(path)) for _ in range(DOWNLOADS_AT_ONCE)]
        await until(lambda: waiting == DOWNLOADS_AT_ONCE)
        refused = await http.get(path)
        assert (refused.status_code, refused.json()["error"]["details"]["error_code"]) == (429, "too_many_downloads")
        may_read.set()
        assert {len((await download).content.splitlines()) for download in downloads} == {2}
        monkeypatch.setattr(Objects, "read", fails)
        response = await http.get(path)
        # Anthropic's status for an overloaded service is 529.
        assert (response.status_code, response.headers["retry-after"]) == (529, "10")
        monkeypatch.setattr(Objects, "read", is_gone)
        gone = await http.get(path)
        assert (gone.status_code, gone.json()["error"]["details"]["error_code"]) == (404, "results_not_found")


async def cancelled(messages: AsyncAnthropic, batch_id: str) -> None:
    batch = await messages.messages.batches.cancel(batch_id)
    assert batch.processing_status == "canceling"
    assert batch.cancel_initiated_at is not None
    assert batch.request_counts.processing == 3


@pytest.mark.parametrize("when", ["before validation", "while it runs"])
async def test_every_request_of_a_cancelled_batch_has_a_result(
    messages: AsyncAnthropic, account: Account, steps: Steps, base: BaseModel, when: str
) -> None:
    batch = await messages.messages.batches.create(requests=requests(3))
    if when == "while it runs":
        await steps.validate()
        await steps.end(await steps.lease(1), answer=json.dumps(MESSAGE).encode())
    await cancelled(messages, batch.id)
    await steps.finalize()
    batch = await messages.messages.batches.retrieve(batch.id)
    done = int(when == "while it runs")
    assert batch.request_counts.to_dict() == {"processing": 0, "succeeded": done, "errored": 0, "canceled": 3 - done, "expired": 0}
    assert sorted(result.type for result in (await results(messages, batch.id)).values()) == sorted(
        ["succeeded"] * done + ["canceled"] * (3 - done)
    )
    with pytest.raises(anthropic.ConflictError):
        await messages.messages.batches.cancel(batch.id)


@pytest.mark.parametrize("stop", ["deadline", "code"])
async def test_a_batch_that_stops_early(
    messages: AsyncAnthropic, account: Account, steps: Steps, base: BaseModel, stack: Stack, stop: str
) -> None:
    batch = await messages.messages.batches.create(requests=requests(3))
    await steps.validate()
    await steps.end(await steps.lease(1), answer=json.dumps(MESSAGE).encode())
    if stop == "code":
        await stop_batch(steps.db, account.tenant.id, batch.id, "insufficient_quota", "The budget is spent.")
    else:
        async with stack.db.begin(SYSTEM) as connection:
            await connection.execute(text("UPDATE batches SET expires_at = now() WHERE id = :id"), {"id": batch.id})
    await steps.finalize()
    found = await results(messages, batch.id)
    kind = "errored" if stop == "code" else "expired"
    assert sorted(result.type for result in found.values()) == sorted(["succeeded", kind, kind])
    counts = (await messages.messages.batches.retrieve(batch.id)).request_counts
    assert (counts.succeeded, getattr(counts, kind), counts.processing) == (1, 2, 0)


async def test_lists_in_pages_in_both_directions(messages: AsyncAnthropic, account: Account) -> None:
    created = [(await messages.messages.batches.create(requests=requests(1))).id for _ in range(5)]
    newest_first = created[::-1]
    listed = messages.messages.batches.list
    assert [batch.id async for batch in listed(limit=2)] == newest_first
    after = await listed(limit=2, after_id=newest_first[1])
    assert ([batch.id for batch in after.data], after.has_more) == (newest_first[2:4], True)
    assert (after.first_id, after.last_id) == (newest_first[2], newest_first[3])
    before = await listed(limit=2, before_id=newest_first[3])
    assert ([batch.id for batch in before.data], before.has_more) == (newest_first[1:3], True)
    assert [batch.id async for batch in listed(limit=2, before_id=newest_first[3])] == [*newest_first[1:3], newest_first[0]]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"after_id": "msgbatch_unknown"}, "invalid_cursor"),
        ({"before_id": "msgbatch_unknown"}, "invalid_cursor"),
        ({"after_id": created[0], "before_id": created[0]}, "invalid_cursor"),
        ({"limit": 0}, "out_of_range"),
    ]
    for query, code in wrong:
        with pytest.raises(anthropic.BadRequestError) as caught:
            await listed(**query)
        assert caught.value.response.json()["error"]["code"] == code
    assert account.tenant.id


async def test_refused_creations_leave_nothing(messages: AsyncAnthropic, account: Account, stack: Stack) -> None:
    same, spaced = requests(2), requests(1)
    same[1]["custom_id"] = same[0]["custom_id"]
    spaced[0]["custom_id"] = "with space"
    for wrong, path in ((same, "requests.1.custom_id"), (spaced, "requests.0.custom_id"), ([], "requests"), (requests(1, stream=True), "")):
        with pytest.raises(anthropic.BadRequestError) as caught:
            await messages.messages.batches.create(requests=wrong)
        body: Any = caught.value.body
        assert body["type"] == "error"
        assert body["error"]["type"] == "invalid_request_error"
        assert body["error"]["message"].startswith(path)
    async with httpx.AsyncClient(base_url=stack.url, headers=account.tenant.headers) as http:
        for content in (b"", b"{", b"[]", b'{"requests": [{}', b'{"requests": 5}', b"\xff", b'{"requests": [' + b"[" * 100_000):
            response = await http.post("/v1/messages/batches", content=content)
            assert (response.status_code, response.json()["type"]) == (400, "error"), content[:20]
        for path in ("msgbatch_" + "0" * 20, "nonsense", "msgbatch_" + "0" * 20 + "/results"):
            response = await http.get(f"/v1/messages/batches/{path}")
            assert (response.status_code, response.json()["error"]["type"]) == (404, "not_found_error")
        assert (await http.get("/v1/messages/batches", headers={"authorization": "Bearer no"})).json()["error"][
            "type"
        ] == "authentication_error"
    assert await account.kept() == []
    assert (await messages.messages.batches.list()).data == []


async def test_a_body_that_is_too_long(messages: AsyncAnthropic, account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmaas.api.message_batches.MAX_BODY_BYTES", 1000)
    with pytest.raises(anthropic.APIStatusError) as caught:
        await messages.messages.batches.create(requests=requests(20))
    assert (caught.value.status_code, caught.value.type) == (413, "request_too_large")
    assert await account.kept() == []


@pytest.mark.parametrize(
    ("tier", "status", "code"),
    [({"max_batches": 0}, 429, "batch_limit_exceeded"), ({"max_file_bytes": 5_000_000}, 413, "file_quota_exceeded")],
)
async def test_what_has_no_room_is_refused_before_it_is_sent(
    account: Account, stack: Stack, monkeypatch: pytest.MonkeyPatch, tier: dict[str, Any], status: int, code: str
) -> None:
    monkeypatch.setitem(TIERS, "standard", replace(TIERS["standard"], **tier))
    address = httpx.URL(stack.url)
    reader, writer = await asyncio.open_connection(address.host, address.port)
    head = (
        f"POST /v1/messages/batches HTTP/1.1\r\nhost: h\r\nauthorization: Bearer {account.tenant.key}\r\ncontent-length: 10000000\r\n\r\n"
    )
    writer.write(head.encode() + b'{"requests": [')
    async with asyncio.timeout(20):
        assert f" {status} ".encode() in await reader.readline()
        assert code.encode() in await reader.readuntil(code.encode())
    writer.close()
    await writer.wait_closed()


async def test_both_apis_create_batches_of_one_tenant_at_the_same_time(account: Account, stack: Stack) -> None:
    """Adding an input file with its batch locks the tenant's row first. Any other order would deadlock two creations."""
    limits = batch_limits("standard")

    def new(number: int) -> NewBatch:
        day = timedelta(days=1)
        return NewBatch(f"batch_{number:020}", Dialect.OPENAI, CHAT, "key_1", "file-1", "24h", b"{}", 60, day)

    async def create() -> None:
        async with stack.db.begin(account.tenant.id) as connection:
            await create_batch(connection, account.tenant.id, new(1), limits)

    async def waits() -> bool:
        async with stack.db.begin(SYSTEM) as connection:
            return bool((await connection.execute(text("SELECT count(*) FROM pg_locks WHERE NOT granted"))).scalar_one())

    async with asyncio.TaskGroup() as tasks, stack.db.begin(account.tenant.id) as connection:
        row = text("SELECT id FROM tenants WHERE id = :id FOR NO KEY UPDATE")
        await connection.execute(row, {"id": account.tenant.id})
        tasks.create_task(create())
        await until(waits)
        await create_batch(connection, account.tenant.id, new(2), limits)
    assert len((await account.client.batches.list()).data) == 2


async def test_a_long_body_streams_to_the_store(
    messages: AsyncAnthropic, account: Account, steps: Steps, base: BaseModel, stack: Stack
) -> None:
    """The whole body exceeds the size limit of a request that is not streamed."""
    count, size = 200, 50_000
    assert count * size > stack.settings.max_body_bytes
    batch = await messages.messages.batches.create(requests=requests(count, system="x" * size))
    assert batch.request_counts.processing == count
    await steps.validate()
    rows = await line_rows(stack.db, batch.id)
    assert [row.state for row in rows] == ["pending"] * count
    assert all(row.byte_length > size for row in rows)


async def test_each_api_shows_its_own_batches(messages: AsyncAnthropic, account: Account, stack: Stack) -> None:
    theirs = await account.create(jsonl([line("a")]))
    ours = await messages.messages.batches.create(requests=requests(1))
    assert [batch.id async for batch in account.client.batches.list()] == [theirs.id]
    assert [batch.id async for batch in messages.messages.batches.list()] == [ours.id]
    # The library's beta client uses the same paths, with a query.
    assert [batch.id async for batch in messages.beta.messages.batches.list()] == [ours.id]
    assert (await messages.beta.messages.batches.retrieve(ours.id)).processing_status == "in_progress"
    async with httpx.AsyncClient(base_url=stack.url, headers=account.tenant.headers) as http:
        assert (await http.get(f"/v1/batches/{ours.id}")).status_code == 404
        assert (await http.get(f"/v1/messages/batches/{theirs.id}")).status_code == 404
