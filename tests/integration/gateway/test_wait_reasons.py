"""The comments in the streams of waiting requests: the state of the wait, and the reason why an engine does not start, in words for
tenants."""

import re
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lmaas.errors import Unavailable
from lmaas.inference import serving
from lmaas.inference.wait_reasons import CAUSES, NO_MACHINE, WaitReasons
from lmaas.scheduling.states import WaitPhase
from lmaas.states import Observed
from lmaas.store.database import Database
from lmaas.store.pools import save_pool_state
from lmaas.store.replicas import add_replica, observe
from lmaas.store.rights import DatabaseRole
from tests.integration.gateway.stack import CHAT, Stack, running
from tests.integration.store.build import base_model
from tests.support.databases import login_url

BUSY, STARTING, ASKED = WaitPhase.BUSY, WaitPhase.STARTING, WaitPhase.ASKED
SECRET = "/home/operator/models: CUDA error on gpu-7.internal"


@pytest.fixture
async def stack(postgres_url: str, valkey_url: str, tmp_path: Path) -> AsyncIterator[Stack]:
    async with running(postgres_url, valkey_url, tmp_path) as stack:
        yield stack


async def fail(db: Database, model_id: str, number: int, reason: str) -> None:
    await add_replica(db, f"rep_{number}", model_id)
    await observe(db, f"rep_{number}", Observed.FAILED, reason=reason)


async def test_a_deadline_while_starts_fail_says_so(stack: Stack) -> None:
    model, acme = await stack.model("base"), await stack.tenant()
    for number in range(3):
        await fail(stack.db, model.id, number, f"the engine ended with code 1: {SECRET}")
    words = "the model's engine fails to start (3 times in a row): its process ended early"
    async with stack.gateway(queue_deadline_s=2.5) as gateway:
        body = {"model": "base", "messages": [{"role": "user", "content": "Hi"}]}
        async with stack.client(acme, gateway.url) as http:
            answer = await http.post(CHAT, json=body)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 30
        error = answer.json()["error"]
        assert error["code"] == "no_capacity"
        assert words in error["message"]
        got = await stack.stream(acme, CHAT, body, url=gateway.url)
    assert f": {words}" in got.comments
    assert any(comment.startswith(": queued position=1") for comment in got.comments)
    assert got.error is not None
    assert words in got.error["message"]
    assert not any("operator" in text or "gpu" in text for text in (answer.text, *got.raw, *got.comments))


async def test_the_first_comment_comes_after_a_second_and_the_next_ones_later(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first comment comes with the head and without an empty line, so no client takes it for an event."""
    monkeypatch.setattr(serving, "COMMENT_EVERY_S", 0.5)
    await stack.model("base")
    acme = await stack.tenant()
    body = {"model": "base", "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
    async with stack.gateway(queue_deadline_s=3) as gateway, stack.client(acme, gateway.url) as http:
        sent = time.monotonic()
        async with http.stream("POST", CHAT, json=body) as response:
            after_s = time.monotonic() - sent
            text = b"".join([chunk async for chunk in response.aiter_raw()])
    assert after_s >= 1.0
    assert 900 <= int(response.headers["openai-processing-ms"]) <= after_s * 1000
    before, _, event = text.partition(b"data: ")
    lines = before.splitlines(keepends=True)
    assert 2 <= len(lines) <= 5
    found = [re.fullmatch(rb": queued position=1 estimated_wait_s=(\d+) start=unknown cold_start=yes\n", line) for line in lines]
    waits = [int(each[1]) for each in found if each is not None]
    assert len(waits) == len(lines), "no empty line"
    assert waits == sorted(waits, reverse=True)
    assert waits[0] > waits[-1], "the estimate counts down"
    assert event.startswith(b'{"error"')
    assert event.count(b"\n\n") == 1


async def test_every_cause_has_words_and_nothing_of_the_reason(db: Database) -> None:
    model = await base_model(db)
    for number, begins in enumerate([*CAUSES, "something else entirely"]):
        await fail(db, model.id, number, f"{begins} 7: {SECRET}")
        why = await WaitReasons(db).why(model.id)
        assert CAUSES.get(begins, "an error on our side") in why
        assert "operator" not in why


@pytest.mark.parametrize("role", [DatabaseRole.GATEWAY, DatabaseRole.JOBS])
async def test_whoever_serves_requests_may_look_up_reasons(database_url: str, role: DatabaseRole) -> None:
    database = Database(login_url(database_url, role), role)
    try:
        assert await WaitReasons(database).why("mod_unknown") == ""
    finally:
        await database.close()


async def test_full_machines_are_a_reason_too(db: Database) -> None:
    model = await base_model(db)
    late = Unavailable("late", retry_after_s=5)
    assert await WaitReasons(db).explained(late, model.id) is late
    await save_pool_state(db, model.id, {"blocked": True}, [])
    assert await WaitReasons(db).why(model.id) == NO_MACHINE
    assert NO_MACHINE in (await WaitReasons(db).explained(late, model.id)).message
    await save_pool_state(db, model.id, {"blocked": False}, [])
    assert await WaitReasons(db).why(model.id) == ""
