"""`lmaas up` with fake engines and a real Chromium for all browser tests, and windows that have signed in."""

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest
from playwright.async_api import Browser, async_playwright

from tests.support.debian import program
from tests.system.console.browsing import Visitor, visiting
from tests.system.e2e.conftest import MODEL, Stack, start, stop

#: Engines generate a token every 30 ms, and open their port so late that people see a cold start.
SETTINGS = {
    "LMAAS_ENGINE_MODULE": "lmaas.testing.fake_engine",
    "LMAAS_ENGINE_ARGS": "--fake-token-ms 30 --fake-start-ms 1500",
    "LMAAS_EMBEDDING_MODEL": "none",
    "LMAAS_BACKGROUND_MAX_WAIT_S": "1",
}
PRICES = {"prompt_price": 150_000, "cached_price": 75_000, "completion_price": 600_000, "engine_price": 1_200_000}
#: One line of a batch that succeeds, one for a model that does not exist, and one that is not valid for its endpoint.
LINES = (
    {"custom_id": "good", "body": {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}},
    {"custom_id": "typo", "body": {"model": "no-such-model", "messages": [{"role": "user", "content": "Hi"}]}},
    {"custom_id": "hot", "body": {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "temperature": 9}},
)


class SignedIn(Protocol):
    """Opens a window with a session of one of the stack's keys: `admin`, `inference` or `operator`."""

    def __call__(self, who: str, **options: Any) -> AbstractAsyncContextManager[Visitor]:
        """Open the window for a block."""


def batch_file() -> bytes:
    """Return the input file of a batch, two of whose requests fail."""
    return b"".join(json.dumps({"method": "POST", "url": "/v1/chat/completions", **line}).encode() + b"\n" for line in LINES)


@pytest.fixture(scope="package")
def stack(chromium: str, tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Iterator[Stack]:
    """A stack with fake engines, prices, and the tenant acme with an adapter."""
    assert model_folder.exists()
    folder = tmp_path_factory.mktemp("console")
    running = start(folder / "home", folder / "up.log", **SETTINGS)
    with running.operator() as operator:
        assert operator.patch(f"/admin/v1/base-models/{MODEL}", json=PRICES).status_code == 200
    yield running
    stop(running)


@pytest.fixture(scope="package")
def chromium() -> str:
    """The path of Chromium. Without one, the tests are skipped before they start anything."""
    return program("chromium", ("chromium", "fonts-dejavu-core"), "the pages of the console")


@pytest.fixture(scope="package")
async def browser(chromium: str) -> AsyncIterator[Browser]:
    """A browser without windows."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        await browser.close()


@pytest.fixture(scope="package")
def keys(stack: Stack) -> dict[str, str]:
    """A key of each role."""
    return {"admin": stack.key("acme", "admin_key"), "inference": stack.key("acme"), "operator": stack.credentials["operator_key"]}


@pytest.fixture(scope="package")
def sessions() -> dict[str, Any]:
    """The cookies of the roles that have signed in."""
    return {}


@pytest.fixture
def signed_in(browser: Browser, stack: Stack, keys: dict[str, str], sessions: dict[str, Any]) -> SignedIn:
    """Opens windows. Each role signs in once for all tests."""

    @asynccontextmanager
    async def window(who: str, **options: Any) -> AsyncIterator[Visitor]:
        if who not in sessions:
            async with visiting(browser, stack.root) as visitor:
                await visitor.sign_in(keys[who])
                sessions[who] = await visitor.page.context.storage_state()
        async with visiting(browser, stack.root, storage_state=sessions[who], **options) as visitor:
            yield visitor

    return window
