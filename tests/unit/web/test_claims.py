"""Claims of idempotency keys, without a database."""

import asyncio
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest

from lmaas.store.idempotency import Claim
from lmaas.web import idempotency
from tests.support.conditions import until


async def test_a_flood_of_claims_waits_behind_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    gate = asyncio.Event()

    async def take(_: Any, claim: Claim) -> None:
        begun.append(claim.tenant_id)
        await gate.wait()

    monkeypatch.setattr(idempotency, "take", take)
    monkeypatch.setattr(idempotency, "give_up", AsyncMock())
    claims = idempotency.Idempotency(Mock(), Mock(), 1000)

    async def run(number: int, tenant: str) -> None:
        async with claims.claimed(Mock(), Claim(tenant, f"k{number}", b"", f"r{number}")) as first:
            assert first

    tasks = [asyncio.create_task(run(number, "flood")) for number in range(50)]
    await until(lambda: begun)
    tasks.append(asyncio.create_task(run(50, "other")))
    await until(lambda: "other" in begun)
    assert begun == ["flood", "other"]
    gate.set()
    await asyncio.gather(*tasks)
    assert len(begun) == 51
