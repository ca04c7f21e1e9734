"""Every page, for every role and tenant: it shows nothing of another tenant and has the security headers."""

import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest

from lmaas.console.page import Page, PageRoute
from lmaas.console.registry import PAGES
from lmaas.keys import hash_key
from lmaas.store.adapters import list_adapters
from lmaas.store.tenants import find_principal
from lmaas.store.usage import record_events
from lmaas.types import Role
from tests.integration.console.conftest import Browser, Console
from tests.integration.gateway.stack import Tenant
from tests.integration.store.build import usage_event
from tests.support.batches import make_batch

ROLES = {"acme-admin": Role.TENANT_ADMIN, "acme-inference": Role.INFERENCE, "operator": Role.OPERATOR}
ROUTES = [(page, route) for page in PAGES for route in page.routes]
SECRET = "globex-secret"


@pytest.fixture(scope="module")
async def theirs(console: Console) -> dict[str, str]:
    """The ids and names of globex's things, by the names of the parameters of paths."""
    principal = await find_principal(console.stack.db, hash_key(console.keys["globex-admin"]))
    assert principal is not None
    assert principal.tenant_id is not None
    globex = Tenant(principal.tenant_id, console.keys["globex-admin"], principal.key_id)
    await console.stack.adapter(globex, f"{SECRET}-adapter", await console.stack.model("base"))
    await record_events(
        console.stack.db,
        [usage_event(f"req_{SECRET}", globex.id, key_id=globex.key_id, created_at=datetime.now(UTC), model=f"{SECRET}-adapter")],
    )
    batch = await make_batch(console.stack.db, globex.id, [], key_id=globex.key_id, file_id=f"file-{SECRET}")
    assert [adapter.name for adapter in await list_adapters(console.stack.db, globex.id)] == [f"{SECRET}-adapter"]
    return {
        "name": f"{SECRET}-adapter",
        "key": globex.key_id,
        "request": f"req_{SECRET}",
        "batch": batch,
        "file": f"file-{SECRET}",
        "tenant": globex.id,
    }


@pytest.fixture(scope="module")
async def browsers(console: Console) -> AsyncIterator[dict[str, Browser]]:
    found = {name: await console.signed_in(name) for name in ROLES}
    yield found
    for browser in found.values():
        await browser.http.aclose()


def filled(path: str, values: dict[str, str]) -> str:
    return re.sub(r"{(\w+)(?::\w+)?}", lambda found: values.get(found[1], "unknown"), path)


@pytest.mark.parametrize(("page", "route"), ROUTES, ids=lambda each: f"{each.method} {each.path}" if isinstance(each, PageRoute) else "")
async def test_no_page_shows_or_changes_what_is_anothers(
    console: Console, theirs: dict[str, str], browsers: dict[str, Browser], page: Page, route: PageRoute
) -> None:
    forbidden = [SECRET, theirs["key"], theirs["tenant"], console.tenants["globex"], console.keys["globex-admin"][:15]]
    for name, role in ROLES.items():
        path = filled(route.path, theirs)
        query = {"tenant": console.tenants["acme"]} if role is Role.OPERATOR else {"tenant": console.tenants["globex"]}
        options: dict[str, Any] = {"params": query}
        if route.method == "POST":
            response = await browsers[name].post(f"{path}?tenant={query['tenant']}")
        else:
            response = await browsers[name].get(path, **options)
        assert response.headers["content-security-policy"].startswith("default-src 'none'"), (name, path)
        if role not in page.roles:
            assert response.status_code == 403, (name, path)
        elif "{" in route.path and not (role is Role.OPERATOR and path.startswith(("/usage/requests/", "/tenants/", "/fleet/"))):
            assert response.status_code in (400, 403, 404), (name, path, response.status_code)
        if role is Role.OPERATOR and not page.of_tenant:
            continue  # operators may see all tenants
        text = response.text
        for address in (path, query["tenant"]):
            text = text.replace(address, "")  # links repeat the requested address
        for secret in forbidden:
            assert secret not in text, (name, path, secret)


@pytest.mark.parametrize("name", ROLES)
async def test_the_navigation_has_the_pages_of_the_role(browsers: dict[str, Browser], name: str) -> None:
    text = (await browsers[name].get()).text
    for page in PAGES:
        shown = f'<a href="/console{page.path}"' in text
        assert shown == (ROLES[name] in page.roles), page.title


async def test_no_page_has_scripts_or_styles_of_its_own(browsers: dict[str, Browser]) -> None:
    for page in PAGES:
        for name, role in ROLES.items():
            if role in page.roles:
                text = (await browsers[name].get(page.path)).text
                assert not re.findall(r"<script(?![^>]* src=)|<style| style=| on\w+=\"", text), (page.title, name)
