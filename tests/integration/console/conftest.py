"""A console in front of a gateway, and browsers that have signed in to it."""

import asyncio
import dataclasses
import html
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp

from lmaas.config import Settings
from lmaas.console.app import build_console
from lmaas.keys import hash_key, new_key, shown_prefix
from lmaas.store.database import Database
from lmaas.store.tenants import create_key, create_tenant
from lmaas.types import Role
from tests.integration.gateway.stack import Stack, running

ORIGIN = "http://console.test"


async def key_of(db: Database, tenant_id: str | None, role: Role, name: str = "") -> str:
    """Create a key and return its secret."""
    key = new_key()
    await create_key(db, tenant_id, role, name, hash_key(key), shown_prefix(key))
    return key


@dataclass
class Browser:
    """A client that keeps cookies and sends the headers of a browser."""

    http: httpx.AsyncClient

    async def get(self, path: str = "", **options: Any) -> httpx.Response:
        """Open a page."""
        return await self.http.get(f"/console{path}", **options)

    async def post(self, path: str, fields: dict[str, Any] | None = None, *, token: bool = True, **options: Any) -> httpx.Response:
        """Send a form, by default with the session's token."""
        sent = dict(fields or {})
        if token:
            page = await self.get("")
            sent["csrf"] = found_in(page.text, r'name="csrf" value="([0-9a-f]+)"')
        return await self.http.post(f"/console{path}", data=sent, headers={"origin": ORIGIN} | options.pop("headers", {}), **options)

    async def sign_in(self, key: str, target: str = "/console") -> httpx.Response:
        """Sign in with a key."""
        return await self.http.post("/console/sign-in", params={"next": target}, data={"key": key}, headers={"origin": ORIGIN})


def found_in(text: str, pattern: str) -> str:
    """Return the first group of the first match. Fail if there is none."""
    found = re.search(pattern, text)
    assert found is not None, text
    return html.unescape(found[1])


@asynccontextmanager
async def alive(app: ASGIApp) -> AsyncIterator[None]:
    """Run the lifespan of an application, as its server does."""
    told: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    said: asyncio.Queue[Any] = asyncio.Queue()

    async def run() -> None:
        await app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, told.get, said.put)

    task = asyncio.create_task(run(), name="lifespan")
    await told.put({"type": "lifespan.startup"})
    assert (await said.get())["type"] == "lifespan.startup.complete"
    try:
        yield
    finally:
        await told.put({"type": "lifespan.shutdown"})
        assert (await said.get())["type"] == "lifespan.shutdown.complete"
        await task


@asynccontextmanager
async def console_of(settings: Settings) -> AsyncIterator[ASGIApp]:
    """A running console."""
    app = build_console(settings)
    async with alive(app):
        yield app


def browser_of(app: ASGIApp) -> Browser:
    """Return a browser without a session."""
    return Browser(httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=ORIGIN, timeout=30))


@dataclass
class Console:
    """A console, its service, and two tenants with keys of each role."""

    stack: Stack
    app: ASGIApp
    tenants: dict[str, str]
    keys: dict[str, str]

    def browser(self) -> Browser:
        """Return a browser without a session."""
        return browser_of(self.app)

    async def signed_in(self, name: str) -> Browser:
        """Return a browser with a session of one of `keys`."""
        browser = self.browser()
        response = await browser.sign_in(self.keys[name])
        assert response.status_code == 303, response.text
        return browser


@pytest.fixture(scope="module")
async def console(postgres_url: str, valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Console]:
    """A console whose tenants are `acme` and `globex`."""
    home: Path = tmp_path_factory.mktemp("console")
    async with AsyncExitStack() as exits:
        stack = await exits.enter_async_context(running(postgres_url, valkey_url, home))
        app = await exits.enter_async_context(console_of(dataclasses.replace(stack.settings, console_api_url=stack.url)))
        keys = {"operator": await key_of(stack.db, None, Role.OPERATOR, "operator")}
        tenants = {}
        for name in ("acme", "globex"):
            tenant = await create_tenant(stack.db, f"{name}-{secrets.token_hex(3)}", "standard", 10, 10)
            tenants[name] = tenant.name
            keys[f"{name}-admin"] = await key_of(stack.db, tenant.id, Role.TENANT_ADMIN, f"{name}'s administrator")
            keys[f"{name}-inference"] = await key_of(stack.db, tenant.id, Role.INFERENCE, f"{name}'s application")
        yield Console(stack, app, tenants, keys)
