"""The page of keys."""

from datetime import datetime, timedelta

import pytest

from lmaas.keys import hash_key
from lmaas.store.tenants import find_principal
from tests.integration.console.conftest import Console, found_in


async def test_a_key_is_created_shown_once_changed_and_revoked(console: Console) -> None:
    browser = await console.signed_in("acme-admin")
    made = await browser.post(
        "/keys", {"name": "The <b>shop</b>", "role": "inference", "expires_in_s": "86400", "requests_per_minute": "1,000"}
    )
    assert made.status_code == 200
    secret = found_in(made.text, r'id="new-key"><code>(sk-lmaas-[^<]+)</code>')
    principal = await find_principal(console.stack.db, hash_key(secret))
    assert principal is not None
    assert principal.tenant_name == console.tenants["acme"]
    assert principal.key_limits.requests_per_minute == 1000
    assert principal.expires_at is not None
    assert abs(principal.expires_at - (datetime.now().astimezone() + timedelta(days=1)).timestamp()) < 60
    listed = await browser.get("/keys")
    assert secret not in listed.text
    assert "The &lt;b&gt;shop&lt;/b&gt;" in listed.text
    assert "Requests per minute: 1,000" in listed.text
    changed = await browser.post(f"/keys/{principal.key_id}/change", {"tokens_per_month": "5", "expires_in_s": "0"})
    assert (changed.status_code, changed.headers["location"]) == (303, "/console/keys")
    shown = await browser.get("/keys")
    assert "was changed." in shown.text
    assert "was changed." not in (await browser.get("/keys")).text
    found = await find_principal(console.stack.db, hash_key(secret))
    assert found is not None
    assert (found.expires_at, found.key_limits.requests_per_minute, found.key_limits.tokens_per_month) == (None, None, 5)
    assert (await browser.post(f"/keys/{principal.key_id}/revoke")).status_code == 303
    assert await find_principal(console.stack.db, hash_key(secret)) is None


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"name": "x" * 101}, "name"),
        ({"role": "operator"}, "role"),
        ({"role": "inference", "tokens_per_minute": "many"}, "tokens_per_minute"),
        ({"role": "inference", "max_concurrent": "-1"}, "max_concurrent"),
        ({"role": "inference", "expires_in_s": "99999999999"}, "expires_in_s"),
    ],
)
async def test_what_is_wrong_stands_beside_its_field_and_what_was_typed_stays(console: Console, fields: dict[str, str], field: str) -> None:
    browser = await console.signed_in("acme-admin")
    sent = {"name": 'a "quoted" <name>', "role": "inference"} | fields
    response = await browser.post("/keys", sent)
    assert response.status_code == 400
    assert f"'{field}' must be" in found_in(response.text, rf'id="f-{field}-error">([^<]*)<')
    if field != "name":
        assert 'value="a &#34;quoted&#34; &lt;name&gt;"' in response.text
    if field in ("tokens_per_minute", "max_concurrent"):
        assert f'value="{fields[field]}"' in response.text


async def test_an_operator_sees_its_own_keys_and_those_of_a_tenant(console: Console) -> None:
    browser = await console.signed_in("operator")
    own = await browser.get("/keys")
    assert "Keys of operators" in own.text
    assert "acme&#39;s administrator" not in own.text
    acme = await browser.get("/keys", params={"tenant": console.tenants["acme"]})
    assert "acme&#39;s administrator" in acme.text
    assert "globex" not in acme.text
    assert f"lmaas --tenant {console.tenants['acme']} key list" in acme.text
    made = await browser.post(f"/keys?tenant={console.tenants['acme']}", {"name": "made by an operator", "role": "tenant_admin"})
    principal = await find_principal(console.stack.db, hash_key(found_in(made.text, r"<code>(sk-lmaas-[^<]{30,})</code>")))
    assert principal is not None
    assert principal.tenant_name == console.tenants["acme"]
    last = found_in(own.text, r'action="/console/keys/([^/"]+)/revoke"')
    refused = await browser.post(f"/keys/{last}/revoke")
    assert refused.status_code == 409
    assert "last key of an operator" in refused.text


async def test_another_tenants_key_does_not_exist(console: Console) -> None:
    globex = await find_principal(console.stack.db, hash_key(console.keys["globex-inference"]))
    assert globex is not None
    browser = await console.signed_in("acme-admin")
    for action in ("change", "revoke"):
        response = await browser.post(f"/keys/{globex.key_id}/{action}")
        assert response.status_code == 404
    assert await find_principal(console.stack.db, hash_key(console.keys["globex-inference"])) is not None
    assert (await (await console.signed_in("acme-inference")).get("/keys")).status_code == 403
