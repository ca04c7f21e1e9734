"""A browser that visits the console, the faults that it must never report, and screenshots for people."""

import os
import shlex
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, BrowserContext, ConsoleMessage, Page, Response, ViewportSize

#: A folder for screenshots of all pages, if set.
SCREENSHOTS = "LMAAS_SCREENSHOTS"
WIDE, NARROW = ViewportSize(width=1280, height=800), ViewportSize(width=320, height=800)
#: axe's impacts that fail a test.
SERIOUS = ("serious", "critical")
Scheme = Literal["light", "dark"]


@dataclass
class Visitor:
    """One browser window, signed in or not, and the faults that it has seen."""

    page: Page
    root: str
    faults: list[str] = field(default_factory=list)
    #: Statuses that the test expects, beside those of success.
    expected: set[int] = field(default_factory=set)

    async def open(self, path: str = "") -> None:
        """Open a page of the console."""
        await self.page.goto(f"{self.root}/console{path}")

    async def sign_in(self, key: str) -> None:
        """Sign in with an API key."""
        await self.open("/sign-in")
        await self.page.get_by_label("API key").fill(key)
        await self.page.get_by_role("button", name="Sign in").click()
        await self.page.get_by_role("heading", level=1).wait_for()

    async def shot(self, name: str) -> None:
        """Save a screenshot of the whole page, if the environment requests it."""
        folder = os.environ.get(SCREENSHOTS)
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)  # noqa: ASYNC240 (only while a person looks at pages)
            await self.page.screenshot(path=Path(folder) / f"{name}.png", full_page=True, timeout=60_000)

    async def violations(self, *rules: str) -> list[str]:
        """Return axe's serious and critical findings on the page, by these rules or by all."""
        options: dict[str, Any] = {"resultTypes": ["violations"]}
        results = await Axe().run(self.page, options=options | ({"runOnly": list(rules)} if rules else {}))
        return [
            f"{found['impact']} {found['id']}: {found['help']}: {node['html'][:200]} {[check['message'] for check in node['any']]}"
            for found in results.response["violations"]
            if found["impact"] in SERIOUS
            for node in found["nodes"]
        ]

    async def overflow(self) -> int:
        """Return the number of pixels by which the page is wider than its window."""
        return int(await self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))

    def check(self) -> None:
        """Fail if the browser has reported errors: of scripts, of the content security policy, or of the server."""
        assert not self.faults, "\n".join(self.faults)


@asynccontextmanager
async def visiting(browser: Browser, root: str, scheme: Scheme = "light", **options: Any) -> AsyncIterator[Visitor]:
    """Open a window for a block. It fails at the end if the browser has reported errors."""
    context: BrowserContext = await browser.new_context(color_scheme=scheme, viewport=options.pop("viewport", WIDE), **options)
    try:
        page = await context.new_page()
        page.set_default_timeout(15_000)
        visitor = Visitor(page, root)
        page.on("console", lambda message: _note(visitor, message))
        page.on("pageerror", lambda error: visitor.faults.append(f"script: {error}"))
        page.on("response", lambda response: _note_status(visitor, response))
        yield visitor
        visitor.check()
    finally:
        await context.close()


def _note(visitor: Visitor, message: ConsoleMessage) -> None:
    # The browser writes a line for each response of an error, which `_note_status` judges.
    if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
        visitor.faults.append(f"console: {message.text}")


def _note_status(visitor: Visitor, response: Response) -> None:
    if response.status >= 400 and response.status not in visitor.expected:
        visitor.faults.append(f"{response.status} of {response.request.method} {response.url}")


def commands_of(texts: Iterable[str]) -> list[list[str]]:
    """Return the words of the commands in these texts, one command a line."""
    return [shlex.split(line) for text in texts for line in text.splitlines() if line.strip()]
