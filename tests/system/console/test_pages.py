"""Every page: axe's findings in light and dark, its width in a narrow window, and the existence of its commands."""

from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from lmaas.cli.commands import cli
from lmaas.console.registry import PAGES
from lmaas.types import Role
from tests.system.console.browsing import NARROW, WIDE, commands_of
from tests.system.console.conftest import SignedIn, batch_file
from tests.system.e2e.conftest import MODEL, Stack

#: The widths of the windows in which a page must fit.
WIDTHS = (NARROW["width"], 768, WIDE["width"])
#: Pages about one object, by the role that opens them. `{…}` is an object of the fixture `objects`.
OBJECTS = {
    "admin": ["/adapters/json-bot", "/files/{file}", "/batches/{batch}", "/playground?model=json-bot&second={model}&message=Hi"],
    "operator": [
        "/fleet/{model}",
        "/adapters?tenant=acme",
        "/adapters/json-bot?tenant=acme",
        "/tenants/acme",
        "/keys?tenant=acme",
        "/usage?tenant=acme",
    ],
}
ROLES = {"admin": Role.TENANT_ADMIN, "operator": Role.OPERATOR}


@pytest.fixture(scope="module")
def objects(stack: Stack) -> dict[str, str]:
    """A file, a batch and a model."""
    with stack.http(stack.key("acme")) as client:
        file = client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("requests.jsonl", batch_file())}).json()["id"]
        body = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        batch = client.post("/v1/batches", json=body).json()["id"]
    return {"file": file, "batch": batch, "model": MODEL}


def addresses(who: str, objects: dict[str, str]) -> Iterator[str]:
    """Return the addresses of all pages that this role may see."""
    for page in PAGES:
        if ROLES[who] in page.roles:
            yield from (route.path for route in page.routes if route.method == "GET" and "{" not in route.path and ".csv" not in route.path)
    yield from (path.format(**objects) for path in OBJECTS[who])


def unknown(command: list[str]) -> str | None:
    """Return the part of a command that the command line does not know, or None. The command does not run, because `--help` is added."""
    assert command[0] == "lmaas"
    result = CliRunner().invoke(cli, [*command[1:], "--help"])
    return None if result.exit_code == 0 else result.output


@pytest.mark.parametrize("who", list(ROLES))
async def test_every_page_is_for_everyone(who: str, signed_in: SignedIn, objects: dict[str, str]) -> None:
    faults: list[str] = []
    async with signed_in(who) as visitor:
        page = visitor.page
        for address in addresses(who, objects):
            await page.emulate_media(color_scheme="light")
            await page.set_viewport_size(WIDE)
            await page.goto(f"{visitor.root}/console{address}")
            if await page.locator("main").count() == 0:
                continue  # what scripts fetch
            name = f"{who}{address.partition('?')[0].replace('/', '-')}"
            await visitor.shot(f"{name}-light")
            faults += [f"{address}: {found}" for found in await visitor.violations()]
            await page.emulate_media(color_scheme="dark")
            # Rules that depend on the colours.
            faults += [f"{address}, dark: {found}" for found in await visitor.violations("color-contrast", "link-in-text-block")]
            await visitor.shot(f"{name}-dark")
            for width in WIDTHS:
                await page.set_viewport_size({"width": width, "height": 800})
                if (over := await visitor.overflow()) > 0:
                    faults.append(f"{address}: {over} px wider than a window of {width} px")
                if width == NARROW["width"]:
                    await visitor.shot(f"{name}-narrow")
            for command in commands_of(await page.locator("details.command pre").all_text_contents()):
                if (fault := unknown(command)) is not None:
                    faults.append(f"{address}: {' '.join(command)}: {fault}")
    assert faults == []
