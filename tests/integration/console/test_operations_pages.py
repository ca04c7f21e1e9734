"""The overview, and the pages of operators: money and tenants."""

from datetime import UTC, datetime

import pytest

from lmaas.states import EnginePhase, UsageStatus
from lmaas.store.engine_time import record_engine_time
from lmaas.store.replicas import add_replica
from lmaas.store.tenants import get_tenant, update_tenant
from lmaas.store.usage import record_events
from tests.integration.console.conftest import Console, found_in
from tests.integration.store.build import usage_event


async def test_the_overview_shows_the_month_against_the_budget_and_what_failed(console: Console) -> None:
    acme = await get_tenant(console.stack.db, console.tenants["acme"])
    browser = await console.signed_in("acme-admin")
    assert "No requests yet" in (await browser.get()).text
    await update_tenant(console.stack.db, acme.id, {"budget_per_month": 2_500_000})
    now = datetime.now(UTC)
    events = [usage_event(f"req_{number}", acme.id, created_at=now, charge_picousd=1_000_000_000_000) for number in range(2)]
    events.append(usage_event("req_failed", acme.id, created_at=now, status=UsageStatus.FAILED, code="engine_failed"))
    await record_events(console.stack.db, events)
    for name, query in (("acme-admin", ""), ("operator", f"?tenant={acme.name}")):
        page = (await (await console.signed_in(name)).get(query)).text
        assert "$2.00 <small>of a budget of $2.50</small>" in page
        assert '<progress class="warn" value="2000000" max="2500000"' in page
        assert "req_failed" in page
        assert "engine_failed" in page
        assert "No batch runs." in page
    other = (await (await console.signed_in("globex-admin")).get()).text
    assert "No requests yet" in other
    assert "req_failed" not in other
    part = await browser.get("/running", headers={"hx-request": "true"})
    assert part.status_code == 200
    assert "<html" not in part.text


async def test_the_overview_of_an_operator(console: Console) -> None:
    page = (await (await console.signed_in("operator")).get()).text
    assert "There is no base model yet" in page


async def test_tenants_are_created_changed_and_deleted(console: Console) -> None:
    browser = await console.signed_in("operator")
    wrong = await browser.post("/tenants", {"name": "Acme Inc", "tier": "standard"})
    assert wrong.status_code == 400
    assert "lower-case" in found_in(wrong.text, r'id="f-name-error">([^<]+)<')
    assert 'value="Acme Inc"' in wrong.text
    taken = await browser.post("/tenants", {"name": console.tenants["acme"], "tier": "standard"})
    assert taken.status_code == 409
    assert "exists already" in found_in(taken.text, r'id="f-name-error">([^<]+)<')
    made = await browser.post("/tenants", {"name": "initech", "tier": "free"})
    assert made.headers["location"] == "/console/tenants/initech?tenant=initech"
    assert "was created" in (await browser.http.get(made.headers["location"])).text
    refused = await browser.post("/tenants/initech/change", {"tier": "premium", "max_queued": "0", "tokens_per_month": "1,000"})
    assert refused.status_code == 400
    assert "'max_queued' must be" in found_in(refused.text, r'id="f-max_queued-error">([^<]+)<')
    assert 'value="1,000"' in refused.text
    changed = await browser.post("/tenants/initech/change", {"tier": "premium", "max_queued": "5", "tokens_per_month": "1,000"})
    assert changed.status_code == 303
    row = await get_tenant(console.stack.db, "initech")
    assert (row.tier, row.max_queued, row.max_adapters, row.limits.tokens_per_month) == ("premium", 5, 20, 1000)
    kept = await browser.post("/tenants/initech/delete", {"confirmed": "acme"})
    assert kept.status_code == 400
    assert "Type the tenant" in kept.text
    gone = await browser.post("/tenants/initech/delete", {"confirmed": "initech"})
    assert gone.headers["location"] == "/console/tenants"
    assert (await browser.get("/tenants/initech")).status_code == 404


async def test_money_names_costs_margins_and_who_caused_idle_time(console: Console) -> None:
    stack = console.stack
    model = await stack.model("base")
    acme = await get_tenant(stack.db, console.tenants["acme"])
    await add_replica(stack.db, "rep_1", model.id)
    now = datetime.now(UTC)
    hour = 3_600_000
    spans = {(now.date(), phase, 1_000_000): ms for phase, ms in ((EnginePhase.BUSY, hour), (EnginePhase.IDLE, 3 * hour))}
    await record_engine_time(stack.db, "rep_1", model.id, spans)
    paid = usage_event("req_paid", acme.id, base_model="base", created_at=now, run_ms=hour, charge_picousd=2_000_000_000_000)
    await record_events(stack.db, [paid])
    browser = await console.signed_in("operator")
    frame = (await browser.get("/money")).text
    assert 'hx-get="/console/money?whole=1" hx-trigger="load"' in frame
    part = await browser.get("/money?whole=1", headers={"hx-request": "true"})
    assert part.text.lstrip().startswith('<div id="report"')
    page = (await browser.get("/money?whole=1")).text
    assert found_in(page, r"<dt>Cost</dt><dd>([^<]+)</dd>") == "$4.00"
    assert "4 h 0 min <small>3 h 0 min idle</small>" in page
    causes = page[page.index("Idle time, and who caused it") :]
    assert "$3.00" in causes
    assert console.tenants["acme"] in causes or "(no tenant)" in causes
    assert "The figures of the charts" not in page
    by_model = (await browser.get("/money", params={"by": "model", "whole": "1"})).text
    assert ">base<" in "".join(by_model.split())


@pytest.mark.parametrize("by", ["tenant", "tenant,adapter", "model", "day", "month", "work"])
async def test_money(console: Console, by: str) -> None:
    browser = await console.signed_in("operator")
    page = await browser.get("/money", params={"by": by, "whole": "1"})
    assert page.status_code == 200
    report = await browser.http.get(found_in(page.text, r'href="(/console/money\.csv[^"]*)"'))
    assert report.headers["content-type"].startswith("text/csv")
    wrong = await browser.get("/money", params={"since": "x", "whole": "1"})
    assert wrong.status_code == 400
    assert "'since' must be a day" in found_in(wrong.text, r'id="f-since-error">([^<]+)<')
    assert (await (await console.signed_in("acme-admin")).get("/money")).status_code == 403
