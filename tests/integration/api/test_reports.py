"""Reports for finance over HTTP and in the CLI: access, filters, CSV, and labels for rows without a name."""

import csv
import io
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest

from lmaas.keys import hash_key, new_key, shown_prefix
from lmaas.states import UsageStatus, WorkClass
from lmaas.store.tenants import create_key
from lmaas.store.usage import record_events
from lmaas.types import Role
from tests.integration.api.test_cogs import command
from tests.integration.gateway.stack import Stack, running
from tests.integration.store.build import usage_event

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


@pytest.fixture
async def stack(postgres_url: str, valkey_url: str, tmp_path: Path) -> AsyncIterator[Stack]:
    async with running(postgres_url, valkey_url, tmp_path) as stack:
        yield stack


async def keys_of(stack: Stack, tenant_id: str) -> dict[Role, tuple[str, str]]:
    """A key of each role of a tenant: its id and its secret. A spreadsheet would take the keys' names for formulas."""
    found = {}
    for role in (Role.INFERENCE, Role.TENANT_ADMIN):
        key = new_key()
        row = await create_key(stack.db, tenant_id, role, f'=cmd("{role}"), "x"', hash_key(key), shown_prefix(key))
        found[role] = (row.id, key)
    return found


@pytest.fixture
async def ledger(stack: Stack) -> dict[Role, tuple[str, str]]:
    """Usage of two keys of a tenant, with an adapter under both of its names; of another tenant; and of a probe."""
    acme, globex = await stack.tenant(), await stack.tenant()
    keys = await keys_of(stack, acme.id)
    mine, other = keys[Role.INFERENCE][0], keys[Role.TENANT_ADMIN][0]
    robot = {"model": "robot", "adapter": "a-1", "key_id": mine, "created_at": NOON}
    await record_events(
        stack.db,
        [
            usage_event("r1", acme.id, **robot, charge_picousd=1_500_000),
            usage_event("r2", acme.id, **robot | {"model": "robot@1"}, charge_picousd=1),
            usage_event("r3", acme.id, key_id=other, created_at=NOON.replace(month=2), work=WorkClass.BACKGROUND),
            usage_event("r4", acme.id, key_id=other, created_at=NOON, status=UsageStatus.FAILED, code="-x"),
            usage_event("r5", globex.id, created_at=NOON),
            usage_event("p1", None, created_at=NOON, status=UsageStatus.PROBE),
        ],
    )
    return keys


def as_key(stack: Stack, key: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=stack.url, headers={"authorization": f"Bearer {key}"}, timeout=60)


async def data(http: httpx.AsyncClient, path: str) -> list[dict[str, Any]]:
    answer = await http.get(path)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


async def table_of(http: httpx.AsyncClient, path: str, **headers: str) -> list[dict[str, str]]:
    """Return the rows of a CSV response."""
    answer = await http.get(path, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert answer.headers["content-disposition"].startswith("attachment; filename=")
    return list(csv.DictReader(io.StringIO(answer.text, newline=""), strict=True))


async def test_a_key_for_inference_sees_only_its_own_usage(stack: Stack, ledger: dict[Role, tuple[str, str]]) -> None:
    (mine, inference), (other, admin) = ledger[Role.INFERENCE], ledger[Role.TENANT_ADMIN]
    async with as_key(stack, inference) as http:
        assert [(row["key_id"], row["requests"]) for row in await data(http, "/v1/usage?by=key")] == [(mine, 2)]
        assert {event["request_id"] for event in await data(http, "/v1/usage/events")} == {"r1", "r2"}
        assert {row["request_id"] for row in await table_of(http, "/v1/usage/events?format=csv")} == {"r1", "r2"}
        assert await data(http, "/v1/usage/events?request_id=r3") == []
        assert (await http.get("/v1/usage", params={"key": other})).status_code == 403
    async with as_key(stack, admin) as http:
        rows = await data(http, "/v1/usage?by=key")
        assert {row["key_id"]: row["requests"] for row in rows} == {mine: 2, other: 2}
        assert all(row["key"].startswith("=cmd") for row in rows)
        assert [row["requests"] for row in await data(http, f"/v1/usage?by=tenant&key={mine}")] == [2]


async def test_versions_of_an_adapter_are_one_adapter(
    stack: Stack, ledger: dict[Role, tuple[str, str]], operator: httpx.AsyncClient
) -> None:
    async with as_key(stack, ledger[Role.TENANT_ADMIN][1]) as http:
        rows = await data(http, "/v1/usage?by=adapter")
        assert [(row["adapter"], row["requests"]) for row in rows] == [(None, 2), ("robot", 2)]
        assert set(rows[0]) == {
            *("object", "adapter", "requests", "failed_requests", "unpriced_requests", "prompt_tokens", "cached_tokens"),
            *("completion_tokens", "run_ms", "charge_microusd"),
        }
        events = await data(http, "/v1/usage/events?adapter=robot")
        assert {(event["model"], event["adapter"]) for event in events} == {("robot", "robot"), ("robot@1", "robot")}
        assert await data(http, "/v1/usage/events?adapter=robot@1") == []
    # An adapter's name is unique only within its tenant.
    assert [row["tenant_id"] is not None for row in await data(operator, "/admin/v1/usage?by=adapter")] == [True, True, True, False]


EVENT_FILTERS = {
    "since=2026-01-02&until=2026-01-02": {"r1", "r2", "r4", "r5", "p1"},
    "since=2026-01-03": {"r3"},
    "until=2026-01-01": set(),
    "until=9999-12-31": {"r1", "r2", "r3", "r4", "r5", "p1"},
    "status=failed": {"r4"},
    "status=probe": {"p1"},
    "work=background": {"r3"},
    "model=base&adapter=robot": {"r1", "r2"},
    "model=small": set(),
    "request_id=r5": {"r5"},
    "key=none": set(),
}


@pytest.mark.usefixtures("ledger")
async def test_events_are_filtered(operator: httpx.AsyncClient) -> None:
    for query, expected in EVENT_FILTERS.items():
        assert {event["request_id"] for event in await data(operator, f"/admin/v1/usage/events?{query}")} == expected, query
        # With filters, the pages together are still the whole list.
        found, after = set(), ""
        for _ in range(10):
            page = (await operator.get(f"/admin/v1/usage/events?{query}&limit=2{after}")).json()
            found |= {event["request_id"] for event in page["data"]}
            if not page["has_more"]:
                break
            after = f"&after={page['last_id']}"
        assert found == expected, query


async def test_csv_is_the_whole_report(stack: Stack, ledger: dict[Role, tuple[str, str]], operator: httpx.AsyncClient) -> None:
    rows = await table_of(operator, "/admin/v1/usage?by=month,tenant,key,adapter&format=csv&limit=1")
    assert list(rows[0]) == [
        *("month", "tenant_id", "tenant", "key_id", "key", "adapter", "requests", "failed_requests", "unpriced_requests"),
        *("prompt_tokens", "cached_tokens", "completion_tokens", "run_ms", "charge_usd", "wasted_tokens", "waste"),
    ]
    assert [row["month"] for row in rows] == ["2026-02", *["2026-01"] * 4]
    assert sum(Decimal(row["charge_usd"]) for row in rows) == Decimal("0.000001500001")
    [probes] = [row for row in rows if not row["tenant_id"]]
    assert (probes["tenant"], probes["key"], probes["requests"]) == ("(probes)", "", "1")
    # A name that looks like a formula is escaped for spreadsheets, and its quotes and commas stay in its cell.
    assert {row["key"] for row in rows if row["key"]} == {'\'=cmd("inference"), "x"', '\'=cmd("tenant_admin"), "x"'}
    events = await table_of(operator, "/admin/v1/usage/events?until=2026-01-31", accept="text/csv")
    assert {row["request_id"] for row in events} == {"r1", "r2", "r4", "r5", "p1"}
    assert {(row["code"], row["charge_usd"]) for row in events if row["request_id"] in ("r1", "r4")} == {
        ("", "0.000001500000"),
        ("'-x", "0.000000000000"),
    }
    async with as_key(stack, ledger[Role.TENANT_ADMIN][1]) as http:
        assert not {"wasted_tokens", "engine_adapter"} & set((await table_of(http, "/v1/usage?format=csv"))[0])
    costs = await table_of(operator, "/admin/v1/cogs?by=month,model&format=csv")
    assert [(row["month"], row["base_model"], row["charge_usd"], row["unpriced_requests"]) for row in costs] == [
        ("2026-02", "base", "0.000000", "1"),
        ("2026-01", "base", "0.000002", "2"),
    ]
    head = await operator.head("/admin/v1/usage?format=csv&since=2026-01-01&until=2026-01-31")
    assert (head.text, head.headers["content-disposition"]) == ("", 'attachment; filename="usage-2026-01-01-2026-01-31.csv"')


async def test_csv_has_more_rows_than_a_page(stack: Stack, operator: httpx.AsyncClient) -> None:
    acme = await stack.tenant()
    await record_events(stack.db, [usage_event(f"r{number:04}", acme.id) for number in range(1203)])
    rows = await table_of(operator, "/admin/v1/usage/events?format=csv")
    assert [row["request_id"] for row in rows] == [f"r{number:04}" for number in reversed(range(1203))]
    empty = await operator.get("/admin/v1/usage?format=csv&since=2100-01-01")
    assert empty.text.count("\r\n") == 1


async def test_a_report_that_cannot_be_read_to_its_end_breaks_off(
    stack: Stack, operator: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmaas.errors import Unavailable
    from lmaas.store import usage

    acme = await stack.tenant()
    await record_events(stack.db, [usage_event(f"r{number}", acme.id) for number in range(600)])
    whole, calls = usage.list_events, 0

    async def once(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise Unavailable("The database is not available.", code="database_unavailable", retry_after_s=2)
        return await whole(*args, **kwargs)

    monkeypatch.setattr(usage, "list_events", once)
    with pytest.raises(httpx.RemoteProtocolError):
        await operator.get("/admin/v1/usage/events?format=csv")
    # A failure before the first row is an error like any other.
    assert (await operator.get("/admin/v1/usage/events?format=csv")).status_code == 503


async def test_the_commands_print_reports(stack: Stack, ledger: dict[Role, tuple[str, str]], operator_key: str) -> None:
    async def lmaas(*args: str) -> str:
        return await command(stack, operator_key, *args)

    lines = (await lmaas("usage", "--by", "month,tenant")).splitlines()
    assert lines[0].split()[:4] == ["month", "tenant", "requests", "charge"]
    assert [line.split()[:2] for line in lines[1:5]][-1] == ["2026-01", "(probes)"]
    assert "no price" in lines[1]
    assert lines[-1].startswith("3 requests used tokens and cost nothing, because their model had no price.")
    events = json.loads(await lmaas("--json", "usage", "--events", "--since", "2026-02-01", "--until", "2026-02-28"))
    assert [event["request_id"] for event in events] == ["r3"]
    assert len(json.loads(await lmaas("--json", "usage", "--events", "--limit", "4"))) == 4
    mine = ledger[Role.INFERENCE][0]
    [row] = json.loads(await lmaas("--json", "usage", "--key", mine, "--by", "key,adapter", "--work", "interactive"))
    assert (row["key_id"], row["adapter"], row["requests"]) == (mine, "robot", 2)
    shown = list(csv.DictReader(io.StringIO(await lmaas("usage", "--csv", "--by", "day,tenant"))))
    assert [row["day"] for row in shown] == ["2026-02-02", *["2026-01-02"] * 3]
    assert (await lmaas("cogs", "--csv", "--by", "tenant")).splitlines()[0].startswith("tenant_id,tenant,engine_ms,")
    assert await lmaas("usage", "--check", "--since", "2026-01-01", "--until", "2026-01-31") == (
        "The sums of 2026-01-01 to 2026-01-31 agree with the ledger's 5 events.\n"
    )
