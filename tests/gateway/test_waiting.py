"""What requests that wait in vain are told: why their engine does not start, in words for tenants."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lmaas.errors import Unavailable
from lmaas.gateway.waiting import CAUSES, NO_MACHINE, Waiting
from lmaas.states import Observed
from lmaas.store.database import Database
from lmaas.store.pools import save_pool_state
from lmaas.store.replicas import add_replica, observe
from tests.gateway.stack import CHAT, Stack, running
from tests.store.build import base_model

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


async def test_every_cause_has_words_and_nothing_of_the_reason(db: Database) -> None:
    model = await base_model(db)
    for number, begins in enumerate([*CAUSES, "something else entirely"]):
        await fail(db, model.id, number, f"{begins} 7: {SECRET}")
        why = await Waiting(db).why(model.id)
        assert CAUSES.get(begins, "an error on our side") in why
        assert "operator" not in why


async def test_full_machines_are_a_reason_too(db: Database) -> None:
    model = await base_model(db)
    late = Unavailable("late", retry_after_s=5)
    assert await Waiting(db).explained(late, model.id) is late
    await save_pool_state(db, model.id, {"blocked": True}, [])
    assert await Waiting(db).why(model.id) == NO_MACHINE
    assert NO_MACHINE in (await Waiting(db).explained(late, model.id)).message
    await save_pool_state(db, model.id, {"blocked": False}, [])
    assert await Waiting(db).why(model.id) == ""


async def test_without_a_database_there_is_no_explanation_and_no_wait() -> None:
    away = Database("postgresql://nobody@127.0.0.1:1/none")
    assert await Waiting(away).why("mod_1") == ""
    await away.close()
