"""Requests of the management API that run at the same time as others, and requests that are repeated after a failure."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from lmaas.errors import Unavailable
from lmaas.store.pools import save_pool_state
from lmaas.store.replicas import add_replica
from lmaas.store.scopes import SYSTEM
from tests.integration.gateway.stack import Stack, running
from tests.integration.store.test_races import first, records

MODELS, TENANTS = "/admin/v1/base-models", "/admin/v1/tenants"


@pytest.fixture
async def stack(postgres_url: str, valkey_url: str, tmp_path: Path) -> AsyncIterator[Stack]:
    async with running(postgres_url, valkey_url, tmp_path) as stack:
        yield stack


@pytest.mark.parametrize(
    ("held", "sent", "status"),
    [
        ("max_cpu_loras = 4", {"max_loras": 8}, 400),
        ("max_loras = 8", {"max_cpu_loras": 4}, 400),
        ("max_replicas = 1", {"min_replicas": 4}, 400),
        ("max_cpu_loras = 6", {"max_loras": 6}, 200),
    ],
)
async def test_changes_of_a_base_model_at_once_fit_together(
    stack: Stack, operator: httpx.AsyncClient, held: str, sent: dict[str, int], status: int
) -> None:
    await stack.model("base")
    before = {"max_loras": 4, "max_cpu_loras": 8, "max_replicas": 5}
    assert (await operator.patch(f"{MODELS}/base", json=before)).status_code == 200
    async with first(stack.db) as change:
        await change.run(f"UPDATE base_models SET {held}")  # noqa: S608 (a value of this test)
        answering = await change.meets(operator.patch(f"{MODELS}/base", json=sent))
    answer = await answering
    assert answer.status_code == status, answer.text


async def test_one_change_has_one_record(stack: Stack, operator: httpx.AsyncClient) -> None:
    await stack.model("base")
    before = await records(stack.db)
    async with first(stack.db) as change:
        await change.run("UPDATE base_models SET prompt_price = 77")
        same = await change.meets(operator.patch(f"{MODELS}/base", json={"prompt_price": 77}))
    assert (await same).json()["prompt_price"] == 77
    assert await records(stack.db) == before
    answers = await asyncio.gather(*(operator.patch(f"{MODELS}/base", json={"prompt_price": 78}) for _ in range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["prompt_price"] for answer in answers} == {78}
    assert await records(stack.db) == before + 1


async def test_a_repeated_deletion_does_not_delete_the_next_tenant_of_the_name(
    stack: Stack, operator: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = (await operator.post(TENANTS, json={"name": "acme"})).json()
    weights = stack.settings.home / "weights"
    weights.write_bytes(b"weights")
    await stack.services.adapter_files.put(f"adapters/{made['id']}/{'0' * 64}", b"{}", weights)

    async def away(_: Iterable[str]) -> None:
        raise Unavailable("The adapter store cannot delete now.", code="object_store_unavailable", retry_after_s=10)

    with monkeypatch.context() as patch:
        patch.setattr(stack.services.adapter_files, "delete", away)
        for name in ("acme", "acme", made["id"]):
            answer = await operator.delete(f"{TENANTS}/{name}")
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "10")
            assert made["id"] in answer.json()["error"]["message"]
    other = (await operator.post(TENANTS, json={"name": "acme"})).json()
    refused = await operator.delete(f"{TENANTS}/acme")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "tenant_ambiguous")
    for known in (made["id"], other["id"]):
        assert known in refused.json()["error"]["message"]
    assert (await operator.get(f"{TENANTS}/acme")).json()["id"] == other["id"]
    assert (await operator.delete(f"{TENANTS}/{made['id']}")).json()["id"] == made["id"]
    assert (await operator.delete(f"{TENANTS}/acme")).json()["id"] == other["id"]
    # Deleted tenants without files do not make a name ambiguous.
    third = (await operator.post(TENANTS, json={"name": "acme"})).json()
    assert (await operator.delete(f"{TENANTS}/acme")).json()["id"] == third["id"]


async def test_a_tenants_name_does_not_look_like_an_id(operator: httpx.AsyncClient) -> None:
    answer = await operator.post(TENANTS, json={"name": "ten_x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_name")
    assert "not beginning with 'ten_'" in answer.json()["error"]["message"]


ODD = ["{}", '{"total_ms": 5}', '{"by": 5}', '{"by": "magic"}', '{"by": "plain", "total_ms": "x"}', "[]", "7", '"text"', "null"]


async def test_odd_records_of_other_releases_are_shown_without_their_parts(stack: Stack, operator: httpx.AsyncClient) -> None:
    model = await stack.model("base")
    for number, start in enumerate([*ODD, '{"by": "plain", "later_ms": 3, "total_ms": 5}']):
        await add_replica(stack.db, f"rep_{number}", model.id)
        async with stack.db.begin(SYSTEM) as connection:
            await connection.execute(
                text("UPDATE replicas SET start = CAST(:start AS jsonb) WHERE id = :id"), {"start": start, "id": f"rep_{number}"}
            )
    listed = await operator.get("/admin/v1/replicas")
    assert listed.status_code == 200, listed.text
    starts = {row["id"]: row["start"] for row in listed.json()["data"]}
    assert starts.pop(f"rep_{len(ODD)}") == {"by": "plain", "total_ms": 5}
    assert list(starts.values()) == [None] * len(ODD)
    odd: list[dict[str, Any]] = [
        {},
        {"wanted": "many"},
        {"wanted": 1, "idle": 5},
        {"idle": {"gaps": 3, "idle_engine_s": None}},
        {"backoff_s": []},
    ]
    for decision in odd:
        await save_pool_state(stack.db, model.id, decision, [])
        shown = await operator.get(f"{MODELS}/base")
        assert (shown.status_code, shown.json()["pool"]["wanted"]) == (200, 0), shown.text
