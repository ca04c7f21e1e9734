"""An engine that becomes ready already has the adapters for which requests wait."""

import asyncio
from pathlib import Path

import pytest

from lmaas.replica.residency import Residency
from tests.integration.gateway.stack import CHAT, Stream, running
from tests.support.conditions import until


async def test_awaited_adapters_are_loaded_before_the_replica_is_ready(
    postgres_url: str, valkey_url: str, tmp_path: Path, may_start: asyncio.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, prepared = Residency.prepare, set[str]()

    def noted(residency: Residency, awaited: dict[str, str]) -> None:
        prepared.update(awaited)
        prepare(residency, awaited)

    monkeypatch.setattr(Residency, "prepare", noted)
    async with running(postgres_url, valkey_url, tmp_path) as stack:
        model = await stack.model("cold", loras=2)
        tenant = await stack.tenant()
        names = [await stack.adapter(tenant, name, model) for name in ("a", "b", "c")]
        await stack.adapter(tenant, "broken", model, files=False)
        asked = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
        got = {name: Stream() for name in ("broken", "a", "b", "c")}
        waiting = []
        for name, into in got.items():
            waiting.append(asyncio.create_task(stack.stream(tenant, CHAT, asked | {"model": name}, into)))
            await until(lambda into=into: into.comments)
        coming = asyncio.create_task(stack.replica(model))
        await until(lambda: len(prepared) == 2)
        may_start.set()
        await coming
        await asyncio.gather(*waiting)
        assert [each.done for each in got.values()] == [False, True, True, True]
        events = {event.model: event for event in await stack.ledger(model, tenant)}
        # The start waits for as many adapters as can run at once. The first of them had no files, which does not affect the others.
        assert events["a"].load_ms == 0
        assert events["c"].adapter == names[2]
        assert events["broken"].code == "adapter_load_failed"
