"""Prices, charges and the cost of goods sold over HTTP and in the CLI, from real requests on a fake engine."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from lmaas.metering.usage import UsageRecord
from lmaas.replica import timesheet
from lmaas.scheduling.client import Beat, Bounds, Ticket
from lmaas.states import EnginePhase, Observed, UsageStatus, WorkClass
from lmaas.store.engine_time import list_engine_time, record_engine_time
from lmaas.store.models import BaseModel, get_base_model
from lmaas.store.replicas import add_replica, desire_stop
from lmaas.store.usage import record_events
from lmaas.types import MAX_PRICE, TokenCounts
from tests.integration.gateway.stack import CHAT, Stack, Stream, Tenant, running
from tests.integration.store.build import usage_event
from tests.support.conditions import until
from tests.support.figures import add_to_figure

PRICES = {"prompt_price": 150_000, "cached_price": 15_000, "completion_price": 600_000, "engine_price": 3_600_000_000}


@pytest.fixture
async def stack(postgres_url: str, valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stack]:
    monkeypatch.setattr(timesheet, "WRITE_EVERY_S", 0.1)
    async with running(postgres_url, valkey_url, tmp_path) as stack:
        yield stack


async def priced(stack: Stack, operator: httpx.AsyncClient) -> BaseModel:
    await stack.model("base")
    answer = await operator.patch("/admin/v1/base-models/base", json=PRICES)
    assert answer.status_code == 200
    assert {name: answer.json()[name] for name in PRICES} == PRICES
    return await get_base_model(stack.db, "base")


def asked(model: str, tokens: int = 20, **more: Any) -> dict[str, Any]:
    words = " ".join(["word"] * 300)
    return {"model": model, "messages": [{"role": "user", "content": words}], "max_tokens": tokens, "ignore_eos": True, **more}


async def test_a_price_is_set(stack: Stack, operator: httpx.AsyncClient) -> None:
    await stack.model("base")
    for name in PRICES:
        (model,) = (await operator.get("/admin/v1/base-models")).json()["data"]
        assert model[name] == 0
        assert (await operator.patch("/admin/v1/base-models/base", json={name: MAX_PRICE})).json()[name] == MAX_PRICE


async def test_only_operators_see_what_things_cost(stack: Stack, operator: httpx.AsyncClient) -> None:
    acme = await stack.tenant()
    async with stack.client(acme) as http:
        assert (await http.get("/admin/v1/cogs")).status_code == 403
        assert (await http.get("/v1/cogs")).status_code == 404
    empty = (await operator.get("/admin/v1/cogs")).json()
    assert (empty["data"], empty["total"]["cost_microusd"], empty["total"]["margin_ratio"]) == ([], 0, None)
    assert empty["reconciliation"] == {"engine_ms": 0, "allocated_ms": 0, "unallocated_ms": 0}


async def test_the_ledgers_charge_is_tokens_times_price(stack: Stack, operator: httpx.AsyncClient) -> None:
    model = await priced(stack, operator)
    acme = await stack.tenant()
    replica = await stack.replica(model, "--fake-token-ms 5")
    async with stack.client(acme) as http:
        for _ in range(2):  # the second finds the prompt in the cache
            assert (await http.post(CHAT, json=asked("base"))).status_code == 200
    # One client disconnects and one engine fails: both tenants pay for the tokens that they received.
    left = Stream()
    leaving = asyncio.create_task(stack.stream(acme, CHAT, asked("base", 1500), left))
    await until(lambda: left.tokens > 3)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    cut = Stream()
    losing = asyncio.create_task(stack.stream(acme, CHAT, asked("base", 1500), cut))
    await until(lambda: cut.tokens > 3)
    replica.kill()
    await losing
    await stack.told_once(model, 4)
    events = [event for event in await stack.ledger(model) if event.status != UsageStatus.PROBE]
    assert sorted(event.status for event in events) == ["aborted", "completed", "completed", "failed"]
    assert any(event.cached_tokens > 0 for event in events)
    for event in events:
        assert event.completion_tokens > 0
        fresh = event.prompt_tokens - event.cached_tokens
        assert event.charge_picousd == fresh * 150_000 + event.cached_tokens * 15_000 + event.completion_tokens * 600_000
    in_all = sum(event.charge_picousd for event in events)
    async with stack.client(acme) as http:
        (line,) = (await http.get("/v1/usage")).json()["data"]
        shown = (await http.get("/v1/usage/events")).json()["data"]
    assert line["charge_microusd"] == round(in_all / 10**6)
    assert "charge_picousd" not in line
    assert sum(event["charge_picousd"] for event in shown) == in_all
    # Probes belong to no tenant.
    (probe,) = [event for event in await stack.ledger(model) if event.status == UsageStatus.PROBE]
    assert probe.charge_picousd == 0


async def test_a_request_pays_the_prices_of_its_acceptance(stack: Stack, operator: httpx.AsyncClient) -> None:
    model = await priced(stack, operator)
    acme = await stack.tenant()
    await stack.replica(model, "--fake-token-ms 5")
    got = Stream()
    running_ = asyncio.create_task(stack.stream(acme, CHAT, asked("base", 200), got))
    await until(lambda: got.tokens > 3)
    await operator.patch("/admin/v1/base-models/base", json=dict.fromkeys(PRICES, 0))
    await running_
    (event,) = await stack.ledger(model, acme)
    assert event.charge_picousd == event.prompt_tokens * 150_000 + 200 * 600_000


async def test_a_lost_gateways_request_is_charged_at_its_last_checkpoint(stack: Stack) -> None:
    model = await stack.model("base")
    acme = await stack.tenant()
    # The largest prices: the event passes through JSON in the scheduler's Lua library.
    record = UsageRecord(
        "r", acme.id, None, "base", "base", None, None, stream=True, prompt_price=MAX_PRICE, cached_price=MAX_PRICE - 1, completion_price=7
    )
    await stack.scheduler.heartbeat(model.id, "x", Beat("http://engine", 1, 1, Observed.READY, []))
    await stack.scheduler.submit(Ticket("r", model.id, acme.id, "gw_gone", "", "", 1, record.event()), Bounds(10, 10_000))
    await stack.scheduler.renew(model.id, [("r", TokenCounts(100, 20, 30))])
    await stack.redis.zadd(f"lmaas:{{{model.id}}}:expiry", {"r": 1})
    await add_to_figure(stack.redis, model.id, "calm", -60_000)  # makes the pool look as if no lease has expired
    await stack.scheduler.stats(model.id)
    (event,) = await stack.ledger(model, acme)
    assert (event.status, event.completion_tokens) == (UsageStatus.LOST, 30)
    assert event.charge_picousd == 80 * MAX_PRICE + 20 * (MAX_PRICE - 1) + 30 * 7


async def worked(stack: Stack, operator: httpx.AsyncClient) -> tuple[Tenant, Tenant]:
    """Two tenants' requests and two engines, one of which was idle; all of them have ended."""
    model = await priced(stack, operator)
    acme, globex = await stack.tenant(), await stack.tenant()
    await stack.adapter(acme, "bot", model)
    first = await stack.replica(model)
    for tenant, name in ((acme, "base"), (acme, "bot"), (acme, "bot@1"), (globex, "base")):
        async with stack.client(tenant) as http:
            assert (await http.post(CHAT, json=asked(name))).status_code == 200
    await desire_stop(stack.db, first.id)
    await first.task
    second = await stack.replica(model)
    await desire_stop(stack.db, second.id)
    await second.task
    await stack.told_once(model, 4)
    await stack.ledger(model)
    return acme, globex


async def test_cost_charge_and_margin_reconcile(stack: Stack, operator: httpx.AsyncClient) -> None:
    acme, globex = await worked(stack, operator)
    found = (await operator.get("/admin/v1/cogs")).json()
    assert {(line["tenant_id"], line["base_model"], line["adapter"]) for line in found["data"]} == {
        (acme.id, "base", None),
        (acme.id, "base", "bot"),
        (globex.id, "base", None),
        (None, "base", None),
    }
    engine_ms = sum(row.ms for row in await list_engine_time(stack.db))
    books = found["reconciliation"]
    assert books["engine_ms"] == books["allocated_ms"] + books["unallocated_ms"] == engine_ms > 0
    assert min(books.values()) > 0
    # 1 $ per second is 1000 micro-dollars per millisecond.
    assert found["total"]["cost_microusd"] == engine_ms * 1000
    for by in ("day,tenant,adapter", "tenant", "day", "adapter", "tenant,day", "work", "day,tenant,work"):
        grouped = (await operator.get("/admin/v1/cogs", params={"by": by})).json()
        assert (grouped["total"], grouped["reconciliation"]) == (found["total"], books)
        for name in ("cost_microusd", "charge_microusd", "margin_microusd"):
            assert sum(line[name] for line in grouped["data"]) == found["total"][name]
        for phase in ("total", "starting", "loading", "busy", "background", "idle"):
            assert sum(line["engine_ms"][phase] for line in grouped["data"]) == found["total"]["engine_ms"][phase]
    for line in found["data"]:
        assert line["margin_microusd"] == line["charge_microusd"] - line["cost_microusd"]
        if line["tenant"] is None:
            assert (line["charge_microusd"], line["margin_ratio"], line["engine_ms"]["total"]) == (0, None, books["unallocated_ms"])
    bills = {line["tenant"]: line["charge_microusd"] for line in (await operator.get("/admin/v1/cogs?by=tenant")).json()["data"]}
    for tenant in (acme, globex):
        async with stack.client(tenant) as http:
            usage = (await http.get("/v1/usage?by=tenant,model,adapter")).json()["data"]
        assert abs(bills[usage[0]["tenant"]] - sum(line["charge_microusd"] for line in usage)) <= len(usage)
    assert (await operator.get("/admin/v1/cogs?since=2100-01-01")).json()["data"] == []
    assert (await operator.get("/admin/v1/cogs?by=day&until=2100-01-01")).json()["total"] == found["total"]
    by_adapter = (await operator.get("/admin/v1/cogs?by=adapter")).json()
    assert by_adapter["by"] == ["tenant", "adapter"]
    assert all("day" not in line and "tenant" in line for line in by_adapter["data"])


async def test_background_work_and_waste_are_kept_apart(stack: Stack, operator: httpx.AsyncClient, operator_key: str) -> None:
    model = await priced(stack, operator)
    acme = await stack.tenant()
    now = datetime.now(UTC)
    await add_replica(stack.db, "rep_1", model.id)
    spans = {EnginePhase.STARTING: 1000, EnginePhase.BUSY: 1000, EnginePhase.BACKGROUND: 3000, EnginePhase.IDLE: 5000}
    await record_engine_time(stack.db, "rep_1", model.id, {(now.date(), phase, 3_600_000_000): ms for phase, ms in spans.items()})
    of_lines = {"created_at": now, "key_id": acme.key_id, "work": WorkClass.BACKGROUND, "run_ms": 2000}
    await record_events(
        stack.db,
        [
            usage_event("r1", acme.id, key_id=acme.key_id, created_at=now, run_ms=1000, charge_picousd=4_000_000),
            usage_event("l1", acme.id, **of_lines, charge_picousd=2_000_000),
            usage_event("l2", acme.id, **of_lines, status=UsageStatus.WASTED, code="put_back"),
            usage_event("l3", acme.id, **of_lines, status=UsageStatus.WASTED, model="other@3", adapter="a"),
        ],
    )
    async with stack.client(acme) as http:
        mine = (await http.get("/v1/usage")).json()["data"]
        assert [(line["model"], line["work"], line["requests"], line["charge_microusd"]) for line in mine] == [
            ("base", "interactive", 1, 4),
            ("base", "background", 1, 2),
        ]
        assert not any(name.startswith("wast") for line in mine for name in line)
        events = (await http.get("/v1/usage/events")).json()["data"]
        assert {(event["request_id"], event["work"]) for event in events} == {("r1", "interactive"), ("l1", "background")}
    everything = (await operator.get("/admin/v1/usage")).json()["data"]
    assert [(line["model"], line["adapter"], line["work"], line["requests"], line["waste"]) for line in everything] == [
        ("base", None, "interactive", 1, {}),
        ("base", None, "background", 1, {"put_back": 15}),
        ("base", "other", "background", 0, {"unfinished": 15}),
    ]
    assert [line["wasted_tokens"] for line in everything] == [0, 15, 15]
    assert (await operator.get("/admin/v1/usage", params={"tenant": acme.id})).json()["data"] == everything
    assert len((await operator.get("/admin/v1/usage/events")).json()["data"]) == 4
    found = (await operator.get("/admin/v1/cogs?by=work")).json()
    # Background work ran for 6 s of slots, a quarter of it while the engine was busy.
    assert [(line["work"], line["engine_ms"], line["charge_microusd"]) for line in found["data"]] == [
        ("background", {"total": 3600, "starting": 0, "loading": 0, "busy": 600, "background": 3000, "idle": 0}, 2),
        ("interactive", {"total": 6400, "starting": 1000, "loading": 0, "busy": 400, "background": 0, "idle": 5000}, 4),
    ]
    assert found["idle_capacity"] == {"ms": 8000, "used_ms": 3000, "used_ratio": 0.375}
    shown = await command(stack, operator_key, "cogs")
    assert "Background work used 3 s of the 8 s in which engines had no other work (37.5%)." in shown
    assert "put_back 15" in await command(stack, operator_key, "usage")


async def command(stack: Stack, key: str, *args: str) -> str:
    """Return the output of an operator's command."""
    variables = os.environ | {"LMAAS_URL": f"{stack.url}/v1", "LMAAS_API_KEY": key, "COLUMNS": "250"}
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "lmaas", *args, env=variables, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert process.returncode == 0
    return output.decode()


async def test_the_command_prints_what_the_api_says(stack: Stack, operator: httpx.AsyncClient, operator_key: str) -> None:
    await worked(stack, operator)
    found = (await operator.get("/admin/v1/cogs")).json()
    lmaas = partial(command, stack, operator_key)

    assert json.loads(await lmaas("--json", "cogs")) == found
    lines = (await lmaas("cogs")).splitlines()
    assert lines[0].split()[:5] == ["day", "tenant", "base", "model", "adapter"]
    assert len(lines) == 1 + len(found["data"]) + 1
    assert "(no tenant)" in lines[-2]
    cost = found["total"]["cost_microusd"]
    assert lines[-1].startswith("total")
    assert f"{cost // 10**6}.{cost % 10**6:06d}" in lines[-1]
    assert f"-{(cost - found['total']['charge_microusd']) // 10**6}." in lines[-1]
    by_tenant = (await lmaas("cogs", "--by", "tenant", "--since", "2026-01-01")).splitlines()
    assert len(by_tenant) == 1 + 3 + 1
    model = json.loads(await lmaas("--json", "model", "change", "base", "--prompt-price", "0.000007", "--engine-price", "8"))
    assert (model["prompt_price"], model["cached_price"], model["engine_price"]) == (7, 15_000, 8_000_000)
    assert "charge $" in await lmaas("--tenant", found["data"][0]["tenant"], "usage")
