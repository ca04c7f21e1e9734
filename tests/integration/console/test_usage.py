"""Usage and cost: reports, single requests, CSV."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from lmaas.keys import hash_key
from lmaas.store.tenants import find_principal
from lmaas.store.usage import record_events
from tests.integration.console.conftest import Console, found_in
from tests.integration.store.build import usage_event


@pytest.fixture(scope="module")
async def used(console: Console) -> Console:
    """The console after a few requests of both tenants, today and yesterday."""
    now = datetime.now(UTC)
    events = []
    for name in ("acme", "globex"):
        admin = await find_principal(console.stack.db, hash_key(console.keys[f"{name}-admin"]))
        worker = await find_principal(console.stack.db, hash_key(console.keys[f"{name}-inference"]))
        assert admin is not None
        assert worker is not None
        for number in range(4):
            changes: dict[str, Any] = {"created_at": now - timedelta(days=number % 2), "model": f"{name}-bot@1" if number else "base"}
            key = worker if number < 3 else admin
            events.append(usage_event(f"req_{name}_{number}", admin.tenant_id, key_id=key.key_id, **changes))
    events.append(usage_event("req_probe", None, created_at=now))
    await record_events(console.stack.db, events)
    return console


async def test_a_report_has_sums_charts_and_the_same_figures_in_tables(used: Console) -> None:
    page = (await (await used.signed_in("acme-admin")).get("/usage")).text
    assert "<dt>Requests</dt><dd>4</dd>" in page
    assert "<dt>Prompt tokens</dt><dd>40 <small>16 cached</small></dd>" in page
    assert "data-chart=" in page
    assert "The figures of the charts" in page
    assert "globex" not in page
    assert "no price" in page


@pytest.mark.parametrize("by", ["day", "month", "key", "work", "model,adapter", "nonsense"])
async def test_groups(used: Console, by: str) -> None:
    for name in ("acme-admin", "acme-inference", "operator"):
        response = await (await used.signed_in(name)).get("/usage", params={"by": by})
        assert response.status_code == 200
        assert "Export as CSV" in response.text


async def test_an_inference_key_sees_its_own_usage_only(used: Console) -> None:
    page = (await (await used.signed_in("acme-inference")).get("/usage")).text
    assert "<dt>Requests</dt><dd>3</dd>" in page


async def test_an_operator_sees_all_and_goes_down_to_a_tenant(used: Console) -> None:
    browser = await used.signed_in("operator")
    page = (await browser.get("/usage")).text
    assert "<dt>Requests</dt><dd>9</dd>" in page
    assert "(probes)" in page
    acme = (await browser.get("/usage", params={"tenant": used.tenants["acme"], "by": "day"})).text
    assert "<dt>Requests</dt><dd>4</dd>" in acme
    assert used.tenants["globex"] not in acme
    link = found_in(acme, r'<a href="(/console/usage/requests\?tenant=[^"]+)">\d')
    events = await browser.http.get(link)
    assert "req_acme_" in events.text
    assert "req_globex_" not in events.text


async def test_a_request_is_found_by_its_id(used: Console) -> None:
    browser = await used.signed_in("acme-admin")
    found = await browser.get("/usage/requests", params={"request_id": "req_acme_1"})
    assert found.text.count("<code>req_") == 1
    one = await browser.http.get(found_in(found.text, r'<a href="(/console/usage/requests/req_[^"]+)">'))
    assert "completed" in one.text
    assert "300 ms" in one.text
    assert (await browser.get("/usage/requests/req_globex_1")).status_code == 404
    assert "No such requests" in (await browser.get("/usage/requests", params={"request_id": "req_globex_1"})).text


@pytest.mark.parametrize("path", ["/usage", "/usage/requests"])
@pytest.mark.parametrize(
    ("query", "field"),
    [({"since": "2026-13-01"}, "since"), ({"since": "2026-11-02", "until": "2026-11-01"}, "since"), ({"until": "x"}, "until")],
)
async def test_a_wrong_day_is_explained_beside_its_field(used: Console, path: str, query: dict[str, str], field: str) -> None:
    response = await (await used.signed_in("acme-admin")).get(path, params=query)
    assert response.status_code == 400
    assert field in found_in(response.text, rf'id="f-{field}-error">([^<]+)<')
    assert f'value="{query[field]}"' in response.text


async def test_csv_is_the_whole_report(used: Console) -> None:
    browser = await used.signed_in("acme-admin")
    page = await browser.get("/usage", params={"by": "day"})
    report = await browser.http.get(found_in(page.text, r'href="(/console/usage\.csv[^"]*)"'))
    assert report.headers["content-type"].startswith("text/csv")
    assert "attachment" in report.headers["content-disposition"]
    assert len(report.text.strip().splitlines()) == 3
    events = await browser.get("/usage/requests.csv")
    assert len([line for line in events.text.splitlines() if "req_acme" in line]) == 4
    assert "globex" not in events.text


async def test_lists_have_pages(used: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmaas.console.pages.usage.PAGE_SIZE", 3)
    browser = await used.signed_in("acme-admin")
    first = await browser.get("/usage/requests")
    second = await browser.http.get(found_in(first.text, r'<a class="button small" href="([^"]+)" rel="next">'))
    assert (first.text.count("<code>req_"), second.text.count("<code>req_")) == (3, 1)
    assert "First page" in second.text
