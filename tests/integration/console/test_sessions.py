"""Signing in and out, and refused sign-ins."""

import dataclasses

import pytest

from lmaas.keys import hash_key
from lmaas.store.tenants import find_principal, revoke_key
from tests.integration.console.conftest import Console, browser_of, console_of, found_in
from tests.support.conditions import until

ROLES = ("operator", "acme-admin", "acme-inference")


@pytest.mark.parametrize("name", ROLES)
async def test_a_key_becomes_a_session_and_the_session_ends(console: Console, name: str) -> None:
    browser = console.browser()
    response = await browser.sign_in(console.keys[name])
    assert (response.status_code, response.headers["location"]) == (303, "/console")
    cookie = response.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert "Path=/console" in cookie
    assert "Secure" not in cookie
    assert console.keys[name] not in cookie
    session = browser.http.cookies["lmaas_session"]
    principal = await find_principal(console.stack.db, hash_key(session))
    key = await find_principal(console.stack.db, hash_key(console.keys[name]))
    assert principal is not None
    assert key is not None
    assert (principal.role, principal.tenant_id, principal.key_id) == (key.role, key.tenant_id, key.key_id)
    assert principal.session_id is not None
    assert (await browser.get()).status_code == 200
    out = await browser.post("/sign-out")
    assert (out.status_code, out.headers["location"]) == (303, "/console/sign-in")
    assert "lmaas_session" not in browser.http.cookies
    assert await find_principal(console.stack.db, hash_key(session)) is None
    browser.http.cookies.set("lmaas_session", session, domain="console.test", path="/console")

    async def over() -> bool:
        return (await browser.get()).status_code == 303

    await until(over)  # a gateway accepts a revoked key for half a second


async def test_over_tls_the_cookie_is_secure(console: Console) -> None:
    headers = {"origin": "https://console.test", "x-forwarded-proto": "https"}
    sent = await console.browser().http.post("/console/sign-in", data={"key": console.keys["acme-admin"]}, headers=headers)
    assert "Secure" in sent.headers["set-cookie"]


@pytest.mark.parametrize(
    ("key", "status", "says"),
    [
        ("", 400, "Type or paste an API key."),
        ("hunter2", 400, "begin with sk-lmaas-"),
        ("sk-lmaas-with space", 400, "Copy it again"),
        ("sk-lmaas-nö", 400, "Copy it again"),
        ("sk-lmaas-" + "unknown" * 6, 401, "is not valid"),
        ("sk-lmaas-" + "a" * 500, 401, "is not valid"),
    ],
)
async def test_a_wrong_key_is_explained_beside_its_field(console: Console, key: str, status: int, says: str) -> None:
    browser = console.browser()
    response = await browser.sign_in(key, "/console?x=1")
    assert response.status_code == status
    assert says in found_in(response.text, r'<p class="error" id="f-key-error">([^<]*)</p>')
    assert "/console/sign-in?next=/console%3Fx%3D1" in response.text
    assert "set-cookie" not in response.headers
    assert not key or key not in response.text


async def test_a_session_makes_no_session(console: Console) -> None:
    browser = await console.signed_in("acme-admin")
    response = await console.browser().sign_in(browser.http.cookies["lmaas_session"])
    assert response.status_code == 403
    assert "A session cannot make another session" in response.text


@pytest.mark.parametrize(
    "target", ["https://evil.test/", "//evil.test", "/console//evil.test", "/consolex", "/console\\evil", "/v1/keys", "/console/\nx", ""]
)
async def test_signing_in_leads_nowhere_else(console: Console, target: str) -> None:
    response = await console.browser().sign_in(console.keys["acme-admin"], target)
    assert response.headers["location"] == "/console"


async def test_an_ended_session_leads_to_the_sign_in_page_and_back(console: Console) -> None:
    browser = console.browser()
    response = await browser.get("?since=2026-11-01")
    assert (response.status_code, response.headers["location"]) == (303, "/console/sign-in?next=%2Fconsole%3Fsince%3D2026-11-01")
    page = await browser.http.get(response.headers["location"])
    assert 'action="/console/sign-in?next=/console%3Fsince%3D2026-11-01"' in page.text
    signed = await browser.sign_in(console.keys["acme-admin"], "/console?since=2026-11-01")
    assert signed.headers["location"] == "/console?since=2026-11-01"
    # A polled part of a page has no page to redirect to.
    assert (await console.browser().get(headers={"hx-request": "true"})).status_code == 401


async def test_a_link_on_another_site_does_not_ask_to_sign_in_again(console: Console) -> None:
    """Browsers send no cookie with a link on another site. The response is a page that loads the address again, with the cookie."""
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    response = await console.browser().get("?a=%22%3E", headers=headers)
    assert response.status_code == 200
    assert 'content="0; url=/console?a=%22%3E"' in response.text
    again = await console.browser().get("?a=b", headers=headers | {"sec-fetch-site": "same-origin"})
    assert again.status_code == 303


async def test_a_session_ends_with_its_key(console: Console) -> None:
    browser = await console.signed_in("globex-inference")
    assert (await browser.get()).status_code == 200
    principal = await find_principal(console.stack.db, hash_key(console.keys["globex-inference"]))
    assert principal is not None
    assert principal.tenant_id is not None
    await revoke_key(console.stack.db, principal.tenant_id, principal.key_id)
    assert await find_principal(console.stack.db, hash_key(browser.http.cookies["lmaas_session"])) is None


async def test_forms_need_the_sessions_token_and_the_consoles_origin(console: Console) -> None:
    browser = await console.signed_in("acme-admin")
    other = await console.signed_in("globex-admin")
    token = found_in((await other.get()).text, r'name="csrf" value="([0-9a-f]+)"')
    for fields, headers in (
        ({}, {}),
        ({"csrf": token}, {}),
        ({"csrf": "é"}, {}),
        ({"csrf": found_in((await browser.get()).text, r'name="csrf" value="([0-9a-f]+)"')}, {"origin": "https://evil.test"}),
        ({"csrf": found_in((await browser.get()).text, r'name="csrf" value="([0-9a-f]+)"')}, {"origin": "null"}),
    ):
        response = await browser.post("/sign-out", fields, token=False, headers=headers)
        assert response.status_code == 403
    assert (await browser.get()).status_code == 200
    foreign = await console.browser().http.post(
        "/console/sign-in", data={"key": console.keys["acme-admin"]}, headers={"origin": "https://evil.test"}
    )
    assert foreign.status_code == 403
    assert "set-cookie" not in foreign.headers


async def test_every_response_has_the_security_headers(console: Console) -> None:
    browser = await console.signed_in("operator")
    for path in ("", "/sign-in", "/nothing", "/static/app.js", "?tenant=unknown"):
        response = await browser.get(path)
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-frame-options"] == "DENY"
        assert response.headers["referrer-policy"] == "same-origin"
        if path != "/static/app.js":
            assert response.headers["cache-control"] == "no-store"


async def test_uploads_are_bounded_by_the_settings(console: Console) -> None:
    settings = dataclasses.replace(
        console.stack.settings, console_api_url=console.stack.url, max_adapter_bytes=1_000_000, max_file_bytes=500_000
    )
    async with console_of(settings) as app:
        browser = browser_of(app)
        assert (await browser.sign_in(console.keys["acme-admin"])).status_code == 303
        token = found_in((await browser.get()).text, r'name="csrf" value="([0-9a-f]+)"')
        response = await browser.http.post(
            "/console/upload-adapter",
            data={"csrf": token, "name": "bot"},
            files={"files": ("adapter_model.safetensors", b"x" * 6_000_000)},
            headers={"origin": "http://console.test"},
        )
        assert response.status_code == 413
        assert "exceeds 5194304 bytes" in response.text


async def test_an_unknown_address_is_not_found(console: Console) -> None:
    for path, says in (("/console/nothing", "There is no such page"), ("/", "The console is at /console.")):
        response = await console.browser().http.get(path)
        assert response.status_code == 404
        assert says in response.text
    assert (await console.browser().http.get("/healthz")).text == "ok"
    metrics = (await console.browser().http.get("/metrics")).text
    assert 'lmaas_console_requests_total{route="/console/sign-in",status="3xx"}' in metrics
    assert "acme" not in metrics


async def test_without_the_service_a_page_says_so_and_offers_to_try_again(console: Console) -> None:
    session = (await console.signed_in("acme-admin")).http.cookies["lmaas_session"]
    async with console_of(dataclasses.replace(console.stack.settings, console_api_url="http://127.0.0.1:9")) as app:
        browser = browser_of(app)
        browser.http.cookies.set("lmaas_session", session, domain="console.test", path="/console")
        response = await browser.get("?a=1")
        assert response.status_code == 503
        assert "cannot be reached" in response.text
        assert 'href="/console?a=1"' in response.text
        assert (await browser.sign_in(console.keys["acme-admin"])).status_code == 503
