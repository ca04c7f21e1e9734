"""Signing in with OIDC, at a real provider on a port of its own."""

import dataclasses
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest
from joserfc.jwk import RSAKey

from lmaas.console.app import build_console
from lmaas.errors import SettingsError
from lmaas.keys import hash_key
from lmaas.store.tenants import find_principal, list_keys, principal_of_key, revoke_key
from lmaas.types import Role
from tests.integration.console.conftest import ORIGIN, Browser, Console, browser_of, console_of, found_in, key_of
from tests.support.oidc_provider import CLIENT_ID, CLIENT_SECRET, Provider, made_key, provider


@dataclasses.dataclass
class Way:
    """A console with a provider."""

    console: Console
    provider: Provider
    app: Any

    def browser(self) -> Browser:
        return browser_of(self.app)

    async def begin(self, browser: Browser, target: str = "/console") -> httpx.Response:
        """Go to the provider, and return its response, which redirects back."""
        started = await browser.get("/sign-in/oidc", params={"next": target})
        assert started.status_code == 303, started.text
        async with httpx.AsyncClient() as http:
            return await http.get(started.headers["location"])

    async def sign_in(self, browser: Browser, target: str = "/console") -> httpx.Response:
        """Sign in, and return the console's last response."""
        return await browser.http.get((await self.begin(browser, target)).headers["location"])


@asynccontextmanager
async def way(console: Console, **changes: Any) -> AsyncIterator[Way]:
    acme, globex = console.tenants["acme"], console.tenants["globex"]
    async with AsyncExitStack() as exits:
        found = await exits.enter_async_context(provider())
        settings = dataclasses.replace(
            console.stack.settings,
            console_api_url=console.stack.url,
            console_key=console.keys["operator"],
            console_oidc_issuer=found.issuer,
            console_oidc_client_id=CLIENT_ID,
            console_oidc_client_secret=CLIENT_SECRET,
            console_oidc_label="Acme's directory",
            console_oidc_roles=f"platform=operator;acme=tenant_admin@{acme};globex=inference@{globex};team-*=inference@*",
        )
        app = await exits.enter_async_context(console_of(dataclasses.replace(settings, **changes)))
        yield Way(console, found, app)


@pytest.fixture
async def oidc(console: Console) -> AsyncIterator[Way]:
    async with way(console) as made:
        yield made


async def test_a_person_of_one_tenant_gets_a_session_and_comes_back(oidc: Way) -> None:
    oidc.provider.claims = {"groups": ["acme", "others"], "preferred_username": "ada"}
    browser = oidc.browser()
    page = await browser.get("/sign-in", params={"next": "/console?since=1"})
    link = found_in(page.text, r'<a class="button primary" href="([^"]+)">Sign in with Acme&#39;s directory</a>')
    assert link == "/console/sign-in/oidc?next=/console%3Fsince%3D1"
    response = await oidc.sign_in(browser, "/console?since=1")
    # The response is a page of the console: a redirect would come from the provider, and browsers would not send a strict cookie.
    assert response.status_code == 200
    assert 'content="0; url=/console?since=1"' in response.text
    cookies = [value for name, value in response.headers.multi_items() if name == "set-cookie"]
    assert any("lmaas_session=sk-lmaas-" in cookie and "SameSite=strict" in cookie for cookie in cookies)
    assert any(cookie.startswith('lmaas_oidc=""') for cookie in cookies)
    session = browser.http.cookies["lmaas_session"]
    principal = await find_principal(oidc.console.stack.db, hash_key(session))
    assert principal is not None
    assert (principal.role, principal.tenant_name) == (Role.TENANT_ADMIN, oidc.console.tenants["acme"])
    assert principal.key_id == principal.session_id
    shown = await browser.get()
    assert "ada, administrator" in " ".join(shown.text.split())
    # Work that the person has started continues after signing out. Revoking a key would end it.
    assert (await browser.post("/sign-out")).status_code == 303
    assert await find_principal(oidc.console.stack.db, hash_key(session)) is None
    assert principal.tenant_id is not None
    later = await principal_of_key(oidc.console.stack.db, principal.tenant_id, principal.key_id)
    assert later is not None
    assert later.expires_at is None


async def test_an_operator(oidc: Way) -> None:
    oidc.provider.claims = {"groups": "platform", "email": "root@acme.test"}
    browser = oidc.browser()
    assert (await oidc.sign_in(browser)).status_code == 200
    assert "root@acme.test" in (await browser.get()).text
    principal = await find_principal(oidc.console.stack.db, hash_key(browser.http.cookies["lmaas_session"]))
    assert principal is not None
    assert principal.role is Role.OPERATOR


async def test_a_person_of_several_tenants_chooses_one(oidc: Way) -> None:
    oidc.provider.claims = {"groups": ["acme", "globex"], "preferred_username": "ada"}
    browser = oidc.browser()
    page = await oidc.sign_in(browser, "/console?x=1")
    assert page.status_code == 200
    assert "lmaas_session" not in browser.http.cookies
    names = sorted(oidc.console.tenants.values())
    assert [page.text.index(name) for name in names] == sorted(page.text.index(name) for name in names)
    choice = found_in(page.text, r'name="choice" value="([^"]+)"')
    for sent, number in (
        (choice, "2"),
        (choice, "-1"),
        (choice, ""),
        (choice[:-1] + ("0" if choice[-1] != "0" else "1"), "0"),
        ("x.y", "0"),
    ):
        refused = await browser.post("/sign-in/oidc/choose", {"choice": sent, "grant": number}, token=False)
        assert refused.status_code == 400
    assert (
        await browser.post("/sign-in/oidc/choose", {"choice": choice, "grant": "0"}, token=False, headers={"origin": "https://evil.test"})
    ).status_code == 403
    chosen = await browser.post("/sign-in/oidc/choose", {"choice": choice, "grant": "1"}, token=False)
    assert 'url=/console?x=1"' in chosen.text
    principal = await find_principal(oidc.console.stack.db, hash_key(browser.http.cookies["lmaas_session"]))
    assert principal is not None
    assert principal.tenant_name == names[1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"nonce": "another"},
        {"nonce": None},
        {"aud": "another-client"},
        {"aud": [CLIENT_ID, "another-client"]},
        {"aud": [CLIENT_ID, "another-client"], "azp": "another-client"},
        {"azp": "another-client"},
        {"exp": 1_700_000_000},
        {"exp": None},
        {"iat": 9_000_000_000},
        {"iss": "https://evil.test"},
        {"sub": None},
    ],
    ids=str,
)
async def test_a_wrong_token_gives_no_session(oidc: Way, wrong: dict[str, Any]) -> None:
    oidc.provider.claims, oidc.provider.wrong = {"groups": ["acme"]}, wrong
    browser = oidc.browser()
    response = await oidc.sign_in(browser)
    assert response.status_code == 401
    assert "ID token is" in response.text
    assert "lmaas_session" not in browser.http.cookies


async def test_a_token_of_another_signer_gives_no_session(oidc: Way) -> None:
    oidc.provider.claims = {"groups": ["acme"]}
    oidc.provider.signing_key = RSAKey.generate_key(2048, {"kid": "first"})
    response = await oidc.sign_in(oidc.browser())
    assert response.status_code == 401


async def test_new_keys_of_the_provider_are_found_later(oidc: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    oidc.provider.claims = {"groups": ["acme"]}
    assert (await oidc.sign_in(oidc.browser())).status_code == 200
    oidc.provider.key = made_key("second")
    # An unknown key makes the console fetch the provider's keys again, at most once per interval.
    assert (await oidc.sign_in(oidc.browser())).status_code == 401
    assert len(oidc.provider.asked) == 1
    monkeypatch.setattr("lmaas.console.oidc.AGAIN_S", 0.0)
    assert (await oidc.sign_in(oidc.browser())).status_code == 200
    assert len(oidc.provider.asked) == 2


@pytest.mark.parametrize(
    ("claims", "says"),
    [
        ({"groups": ["unknown", "<b>"], "name": "Ada"}, "none of your groups has a role here: unknown, &lt;b&gt;"),
        ({"groups": [], "name": "Ada"}, "names no groups of yours"),
        ({"name": "Ada"}, "names no groups of yours"),
        ({"groups": ["team-nowhere"]}, "The tenant does not exist. The tenant is nowhere."),
    ],
)
async def test_a_person_without_a_role_learns_why(oidc: Way, claims: dict[str, Any], says: str) -> None:
    oidc.provider.claims = claims
    browser = oidc.browser()
    response = await oidc.sign_in(browser)
    assert response.status_code in (403, 404)
    assert says in response.text
    assert "lmaas_session" not in browser.http.cookies


async def test_groups_may_come_from_userinfo(oidc: Way) -> None:
    oidc.provider.userinfo = {"groups": ["acme"]}
    assert (await oidc.sign_in(oidc.browser())).status_code == 200
    oidc.provider.userinfo = {"groups": ["acme"], "sub": "person-2"}
    response = await oidc.sign_in(oidc.browser())
    assert response.status_code == 401
    assert "two different persons" in response.text


async def test_a_sign_in_of_another_browser_is_refused(oidc: Way) -> None:
    """A sign-in that another browser began is refused. Otherwise a link could sign a person in to another account."""
    oidc.provider.claims = {"groups": ["acme"]}
    back = (await oidc.begin(oidc.browser())).headers["location"]
    for browser in (oidc.browser(), oidc.browser()):
        response = await browser.http.get(back)
        assert response.status_code == 400
        assert "was not begun in this browser" in response.text
        await oidc.begin(browser)
        assert (await browser.http.get(back)).status_code == 400
        assert "lmaas_session" not in browser.http.cookies


async def test_what_the_provider_refuses_is_said(oidc: Way) -> None:
    browser = oidc.browser()
    back = httpx.URL((await oidc.begin(browser)).headers["location"])
    response = await browser.http.get(back.copy_merge_params({"code": "made-up"}))
    assert response.status_code == 401
    assert "did not accept" in response.text
    back = httpx.URL((await oidc.begin(browser)).headers["location"])
    response = await browser.http.get(back.copy_remove_param("code").copy_merge_params({"error": "access_denied<"}))
    assert response.status_code == 401
    assert "(access_denied&lt;)" in response.text


async def test_a_public_client_and_a_public_url(console: Console) -> None:
    async with way(console, console_oidc_client_secret=None, console_public_url="https://llm.test/") as made:
        made.provider.public, made.provider.claims = True, {"groups": ["acme"]}
        browser = made.browser()
        back = (await made.begin(browser)).headers["location"]
        assert back.startswith("https://llm.test/console/sign-in/oidc/callback?")
        assert (await browser.http.get(back.replace("https://llm.test", ORIGIN))).status_code == 200


async def test_providers_that_do_not_work(console: Console) -> None:
    async with way(console) as made:
        made.provider.metadata = {"issuer": "https://evil.test"}
        response = await made.browser().get("/sign-in/oidc")
        assert response.status_code == 502
        assert "names another issuer" in response.text
        made.provider.metadata = {"jwks_uri": f"{made.provider.issuer}/nothing"}
        response = await made.browser().get("/sign-in/oidc")
        assert response.status_code == 502
        assert "does not respond" in response.text
    async with way(console, console_oidc_issuer="http://127.0.0.1:9") as made:
        response = await made.browser().get("/sign-in/oidc")
        assert response.status_code == 502
        assert "does not respond" in response.text
        assert "API key" in response.text


async def test_sessions_of_persons_end_with_the_consoles_key(console: Console) -> None:
    db = console.stack.db
    key = await key_of(db, None, Role.OPERATOR, "the console's")
    async with way(console, console_key=key) as made:
        made.provider.claims = {"groups": ["acme"], "name": "ada"}
        browser = made.browser()
        assert (await made.sign_in(browser)).status_code == 200
        session = hash_key(browser.http.cookies["lmaas_session"])
        assert await find_principal(db, session) is not None
        assert "ada" not in {each.name for each in await list_keys(db, None)}
        mine = next(each for each in await list_keys(db, None) if each.name == "the console's")
        await revoke_key(db, None, mine.id)
        assert await find_principal(db, session) is None
        gone = await made.sign_in(made.browser())
        assert gone.status_code in (200, 503)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"console_oidc_client_id": None}, "LMAAS_CONSOLE_OIDC_CLIENT_ID"),
        ({"console_key": None}, "LMAAS_CONSOLE_KEY"),
        ({"console_oidc_issuer": "http://idp.test"}, "begins with https"),
        ({"console_oidc_roles": "x"}, "LMAAS_CONSOLE_OIDC_ROLES"),
    ],
)
async def test_settings_that_do_not_work(console: Console, changes: dict[str, Any], says: str) -> None:
    settings = dataclasses.replace(
        console.stack.settings, console_oidc_issuer="https://idp.test", console_oidc_client_id="x", console_key=console.keys["operator"]
    )
    with pytest.raises(SettingsError, match=says):
        build_console(dataclasses.replace(settings, **changes))
