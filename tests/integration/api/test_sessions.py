"""Sessions and keys that expire, through the API."""

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lmaas.keys import hash_key
from lmaas.store.tenants import find_principal
from tests.integration.gateway.stack import Stack, running


@pytest.fixture
async def stack(postgres_url: str, valkey_url: str, tmp_path: Path) -> AsyncIterator[Stack]:
    async with running(postgres_url, valkey_url, tmp_path) as stack:
        yield stack


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_a_key_and_its_sessions_end_exactly_when_they_expire(
    stack: Stack, operator: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = (await operator.post("/admin/v1/tenants", json={"name": "acme"})).json()["name"]
    made = (await operator.post(f"/admin/v1/tenants/{tenant}/keys", json={"role": "tenant_admin", "expires_in_s": 3600})).json()
    session = (await operator.post("/v1/sessions", json={}, headers=bearer(made["key"]))).json()
    # A session ends with its key, even if its own lifetime is longer.
    assert session["expires_at"] == made["expires_at"]
    short = (await operator.post("/v1/sessions", json={"expires_in_s": 60}, headers=bearer(made["key"]))).json()
    for key in (made["key"], session["key"], short["key"]):
        assert (await operator.get("/v1/keys", headers=bearer(key))).status_code == 200
    now = time.time()
    monkeypatch.setattr("lmaas.web.auth.time.time", lambda: now + 61)
    assert (await operator.get("/v1/keys", headers=bearer(short["key"]))).status_code == 401
    assert (await operator.get("/v1/keys", headers=bearer(session["key"]))).status_code == 200
    monkeypatch.setattr("lmaas.web.auth.time.time", lambda: now + 3700)
    for key in (made["key"], session["key"]):
        assert (await operator.get("/v1/keys", headers=bearer(key))).status_code == 401


async def test_sessions_are_no_part_of_lists_and_cannot_be_managed_as_keys(stack: Stack, operator: httpx.AsyncClient) -> None:
    own = (await operator.post("/admin/v1/sessions", json={})).json()
    assert own["tenant"] is None
    assert own["id"] not in {key["id"] for key in (await operator.get("/admin/v1/keys")).json()["data"]}
    assert (await operator.delete(f"/admin/v1/keys/{own['id']}", params={"force": "true"})).status_code == 404
    assert (await operator.get("/v1/sessions/current", headers=bearer(own["key"]))).status_code == 403
    assert (await operator.get("/admin/v1/sessions/current")).status_code == 404
    again = await operator.post("/admin/v1/sessions", json={}, headers=bearer(own["key"]))
    assert again.status_code == 403


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"role": "operator", "tenant": "acme"}, 400, "tenant"),
        ({"role": "tenant_admin"}, 400, "tenant"),
        ({"role": "tenant_admin", "tenant": "acme"}, 400, "subject"),
        ({"role": "tenant_admin", "tenant": "nowhere", "subject": "ada"}, 404, None),
        ({"role": "root"}, 400, "role"),
        ({"expires_in_s": 59}, 400, "expires_in_s"),
        ({"expires_in_s": 86_401}, 400, "expires_in_s"),
        ({"subject": "x" * 101}, 400, "subject"),
    ],
)
async def test_what_is_refused(stack: Stack, operator: httpx.AsyncClient, body: dict[str, Any], status: int, param: str | None) -> None:
    await operator.post("/admin/v1/tenants", json={"name": "acme"})
    response = await operator.post("/admin/v1/sessions", json=body)
    assert response.status_code == status
    if param is not None:
        assert response.json()["error"]["param"] == param


async def test_limits_of_a_key_hold_for_its_sessions(stack: Stack, operator: httpx.AsyncClient) -> None:
    await operator.post("/admin/v1/tenants", json={"name": "acme"})
    key = (await operator.post("/admin/v1/tenants/acme/keys", json={"requests_per_minute": 3})).json()
    session = (await operator.post("/v1/sessions", json={}, headers=bearer(key["key"]))).json()
    changed = await operator.patch(f"/admin/v1/tenants/acme/keys/{key['id']}", json={"requests_per_minute": 2, "expires_in_s": 120})
    assert changed.status_code == 200
    principal = await find_principal(stack.db, hash_key(session["key"]))
    assert principal is not None
    assert (principal.key_id, principal.key_limits.requests_per_minute) == (key["id"], 2)
    assert principal.expires_at is not None
    assert principal.expires_at <= time.time() + 121


async def test_of_one_key_and_person_the_last_sessions_are_kept(stack: Stack, operator: httpx.AsyncClient) -> None:
    await operator.post("/admin/v1/tenants", json={"name": "acme"})
    made = {}
    for person in ("ada", "bob"):
        body = {"role": "inference", "tenant": "acme", "subject": person}
        made[person] = [(await operator.post("/admin/v1/sessions", json=body)).json()["key"] for _ in range(22 if person == "ada" else 1)]
    found = [await find_principal(stack.db, hash_key(key)) is not None for key in made["ada"]]
    assert found == [False] * 2 + [True] * 20
    assert await find_principal(stack.db, hash_key(made["bob"][0])) is not None
