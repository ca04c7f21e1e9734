"""The main job of each page, as a person does it."""

import asyncio
import base64
import html
import json
import re
from pathlib import Path

from playwright.async_api import Browser, Locator, Route, expect

from lmaas.testing.generation import NATURAL_LENGTH
from tests.support.conditions import until
from tests.system.console.browsing import Visitor, visiting
from tests.system.console.conftest import SignedIn, batch_file
from tests.system.e2e.conftest import MODEL, ROOT, Stack

ADAPTER = ROOT / "tenants" / "adapters" / "acme-json"
FILES = (ADAPTER / "adapter_config.json", ADAPTER / "adapter_model.safetensors")

#: Presses the button as soon as the answer begins: a person is quick, and this machine may be slow.
STOP_AT_FIRST_TOKEN = """(answer) => {
    const observer = new MutationObserver(() => {
        if (!answer.textContent) return;
        observer.disconnect();
        document.querySelector("[data-stop]").click();
    });
    observer.observe(answer, {childList: true});
}"""
#: The label or the text of the element that has the focus.
FOCUSED = """() => {
    const element = document.activeElement;
    return (element.labels?.[0] ?? element).textContent.trim() || element.getAttribute("aria-label");
}"""


def side(visitor: Visitor, label: str) -> Locator:
    """Return one of the playground's two sides."""
    return visitor.page.get_by_role("region", name=label, exact=True)


def figure(part: Locator, label: str) -> Locator:
    """Return the figure of an answer with this label."""
    term = part.page.locator("dt").filter(has_text=re.compile(f"^{label}$"))
    return part.locator(".figures div").filter(has=term).locator("dd")


async def drop(area: Locator, paths: tuple[Path, ...]) -> None:
    """Drop files on an area, as from a file manager."""
    contents = [(path.name, base64.b64encode(path.read_bytes()).decode()) for path in paths]
    transfer = await area.page.evaluate_handle(
        """(files) => {
            const transfer = new DataTransfer();
            for (const [name, coded] of files) {
                transfer.items.add(new File([Uint8Array.from(atob(coded), (character) => character.charCodeAt(0))], name));
            }
            return transfer;
        }""",
        contents,
    )
    for event in ("dragover", "drop"):
        await area.dispatch_event(event, {"dataTransfer": transfer})


async def test_an_adapter_is_uploaded_and_compared_with_its_base_model(signed_in: SignedIn, stack: Stack) -> None:
    await asyncio.to_thread(stack.cool)
    async with signed_in("admin") as visitor:
        page = visitor.page
        await visitor.open("/adapters")
        await page.get_by_role("link", name="Upload an adapter").first.click()
        await page.get_by_label("Name").fill("my-bot")
        area = page.locator(".drop")
        # A single file is refused beside the field, and the typed values stay.
        visitor.expected = {400}
        await drop(area, FILES[:1])
        await page.get_by_role("button", name="Upload").click()
        await expect(page.locator("#f-files-error")).to_contain_text("Choose two files together")
        await expect(page.get_by_label("Name")).to_have_value("my-bot")
        await expect(page.locator("[data-files]")).to_contain_text("adapter_config.json")
        visitor.expected = set()
        await drop(page.locator(".drop"), FILES)
        await page.get_by_role("button", name="Upload").click()
        await expect(page.get_by_role("heading", level=1)).to_have_text("my-bot")
        await expect(page.get_by_text("my-bot has version 1")).to_be_visible()
        await page.get_by_role("link", name="Compare with the base model").click()
        # The engine is cold: the page shows the wait as it happens, and then the answers side by side.
        await page.get_by_label("Message").fill("What is the capital of France?")
        await page.get_by_role("button", name="Run").click()
        first, second = side(visitor, "Model"), side(visitor, "Second model")
        await expect(first.locator("[data-state]")).to_contain_text("in the queue, an engine starts", timeout=15_000)
        for part in (first, second):
            await expect(part.locator("[data-state]")).to_have_text("Done", timeout=30_000)
            await expect(figure(part, "First token after")).to_have_text(re.compile(r"^[\d.]+ m?s$"))
            await expect(figure(part, "Answer")).to_have_text(re.compile(r"^\d+ tokens$"))
            await expect(figure(part, "Price")).to_have_text(re.compile(r"^\$0\.0\d+$"))
        await visitor.shot("playground-answers")
        texts = [await part.locator("[data-answer]").inner_text() for part in (first, second)]
        assert all(texts)
        assert texts[0] != texts[1]
        await expect(page.locator("#code pre").first).to_contain_text("What is the capital of France?")


async def test_the_first_key_is_created_and_used(signed_in: SignedIn, stack: Stack) -> None:
    async with signed_in("admin") as visitor:
        page = visitor.page
        await visitor.open("/keys")
        await page.get_by_label("Name", exact=True).fill("my first program")
        await page.get_by_role("button", name="Create the key").click()
        shown = page.locator("#new-key")
        key = (await shown.inner_text()).strip()
        assert await visitor.violations() == []
        with stack.http(key) as client:
            assert client.get("/v1/models").status_code == 200
        row = page.get_by_role("row", name="my first program")
        await expect(row).to_contain_text(key[:8])
        # It is shown once.
        await visitor.open("/keys")
        await expect(page.get_by_role("row", name="my first program")).to_be_visible()
        assert key not in await page.content()
        await page.get_by_role("row", name="my first program").get_by_text("Revoke", exact=True).click()
        await page.get_by_role("button", name="Revoke the key").click()
        await expect(page.get_by_role("row", name="my first program")).to_contain_text("revoked")
        with stack.http(key) as client:
            await until(lambda: client.get("/v1/models").status_code == 401, timeout_s=10)


async def test_a_request_is_found_and_a_bill_is_exported(signed_in: SignedIn) -> None:
    async with signed_in("admin") as visitor:
        page = visitor.page
        await visitor.open("/playground?model=json-bot&message=Hi&max_tokens=7")
        await page.get_by_role("button", name="Run").click()
        request = figure(side(visitor, "Model"), "Request")
        await expect(request).to_be_visible(timeout=30_000)
        request_id = await request.inner_text()
        # From the sums of the month to the day's requests, and to the single one.
        await visitor.open("/usage?by=model,adapter")
        row = page.get_by_role("row", name="json-bot")
        await expect(row).to_contain_text("$")
        await visitor.shot("usage")
        async with page.expect_download() as download:
            await page.get_by_role("link", name="Export as CSV").click()
        bill = Path(await (await download.value).path()).read_text().splitlines()  # noqa: ASYNC240 (a few bytes)
        assert any("json-bot" in line for line in bill[1:])
        await page.get_by_role("link", name="Single requests").click()
        await page.get_by_label("Request id").fill(request_id)
        await page.get_by_role("button", name="Show", exact=True).click()
        await page.get_by_role("link", name=request_id).click()
        await expect(page.get_by_role("heading", level=1)).to_have_text(request_id)
        await expect(page.locator("main")).to_contain_text("Where its time went")
        assert await visitor.violations() == []
        assert "Hi" not in (await page.locator("main").inner_text()).split()


async def test_a_chart_is_drawn_beside_its_table(signed_in: SignedIn) -> None:
    figures = {"x": ["2026-11-28", "2026-11-29", "2026-11-30"], "series": [{"label": "charge", "values": [0.5, 0, 2.25]}], "unit": "$"}

    async def with_chart(route: Route) -> None:
        """Add the parts of a page with charts to a page of the console, whose security policy stays."""
        response = await route.fetch()
        head = "".join(f'<script src="/console/static/{name}" defer></script>' for name in ("vendor/uplot.min.js", "charts.js"))
        head += '<link rel="stylesheet" href="/console/static/vendor/uplot.min.css">'
        data = html.escape(json.dumps(figures))
        chart = f'<figure class="chart" hidden data-chart="{data}"><figcaption>Charge by day</figcaption><div class="plot"></div></figure>'
        text = (await response.text()).replace("</head>", f"{head}</head>").replace("</main>", f"{chart}</main>")
        headers = {name: value for name, value in response.headers.items() if name not in ("content-length", "content-encoding")}
        await route.fulfill(status=response.status, headers=headers, body=text)

    async with signed_in("admin") as visitor:
        page = visitor.page
        await page.route("**/console/files", with_chart)
        await visitor.open("/files")
        chart = page.locator("figure.chart")
        await expect(chart.locator("canvas")).to_be_visible()
        await expect(chart.locator(".u-legend")).to_contain_text("charge")
        drawn = "(canvas) => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.some((value) => value > 0)"
        assert await chart.locator("canvas").evaluate(drawn)
        # It follows the window and the colours.
        before = await chart.locator("canvas").evaluate("(canvas) => getComputedStyle(canvas).width")
        await page.set_viewport_size({"width": 700, "height": 700})
        await page.emulate_media(color_scheme="dark")
        await expect(chart.locator("canvas")).not_to_have_css("width", before)
        assert await visitor.overflow() <= 0
        await visitor.shot("chart")


async def test_a_running_answer_is_stopped(signed_in: SignedIn, stack: Stack) -> None:
    async with signed_in("inference") as visitor:
        page = visitor.page
        await visitor.open(f"/playground?model={MODEL}&message=Hi&max_tokens=1500")
        part = side(visitor, "Model")
        await part.locator("[data-answer]").evaluate(STOP_AT_FIRST_TOKEN)
        await page.get_by_role("button", name="Run").click()
        await expect(part.locator("[data-state]")).to_contain_text("Stopped", timeout=30_000)
        request = figure(part, "Request")
        await expect(request).to_be_visible(timeout=20_000)
        request_id = await request.inner_text()
        with stack.http(stack.key("acme")) as client:
            events = client.get("/v1/usage/events", params={"limit": 20}).json()["data"]
        [event] = [event for event in events if event["request_id"] == request_id]
        assert event["status"] == "aborted"
        assert 1 <= event["completion_tokens"] < NATURAL_LENGTH


async def test_a_batch_is_started_and_its_failed_lines_are_read(signed_in: SignedIn) -> None:
    async with signed_in("admin") as visitor:
        page = visitor.page
        await visitor.open("/batches")
        await page.get_by_role("link", name="New batch").first.click()
        await page.get_by_label("New file").set_input_files(
            {"name": "night.jsonl", "mimeType": "application/jsonl", "buffer": batch_file()}
        )
        await page.get_by_label("Name").fill("night shift")
        await page.get_by_role("button", name="Start the batch").click()
        await expect(page.get_by_role("heading", level=1)).to_have_text("night shift")
        # The page follows the batch by itself until it has ended.
        await expect(page.locator(".badge").first).to_have_text("completed", timeout=45_000)
        table = page.get_by_role("region", name="Lines that failed")
        await expect(table.locator("tbody tr")).to_have_count(2)
        await expect(table.get_by_role("row", name="typo")).to_contain_text("no-such-model")
        await expect(table.get_by_role("row", name="hot")).to_contain_text("temperature")
        await visitor.shot("batch-failed-lines")
        async with page.expect_download() as download:
            await page.get_by_role("link", name="Download the answers").click()
        assert '"good"' in Path(await (await download.value).path()).read_text()  # noqa: ASYNC240 (a few bytes)


async def test_an_operator_reads_a_cold_start_and_changes_bounds(signed_in: SignedIn, stack: Stack) -> None:
    await asyncio.to_thread(stack.warm)
    async with signed_in("operator", viewport={"width": 1280, "height": 900}) as visitor:
        page = visitor.page
        await visitor.open("/fleet")
        await expect(page.get_by_role("region", name="Pools")).to_contain_text("1 ready")
        await page.get_by_role("region", name="Pools").get_by_role("link", name=MODEL).click()
        starts = page.get_by_role("region", name="Cold starts")
        await expect(starts).to_contain_text("first token")
        await visitor.shot("pool")
        await page.get_by_label("Replicas, at least").fill("7")
        visitor.expected = {400}
        await page.get_by_role("button", name="Change the bounds").click()
        await expect(page.locator("#f-min_replicas-error")).to_contain_text("max_replicas")
        await expect(page.get_by_label("Replicas, at least")).to_have_value("7")
        visitor.expected = set()
        await page.get_by_label("Replicas, at least").fill("0")
        await page.get_by_label("Idle time").fill("500")
        await page.get_by_role("button", name="Change the bounds").click()
        await expect(page.get_by_role("status").filter(has_text="were changed")).to_be_visible()
        # A part that is fetched again keeps open what a person has opened.
        await page.get_by_text("Drain …").click()
        async with page.expect_response(lambda response: response.request.headers.get("hx-request") == "true"):
            pass
        await page.get_by_role("button", name="Drain and stop").click()
        await expect(page.get_by_role("region", name="Replicas that have ended")).to_be_visible(timeout=20_000)


async def test_the_keyboard_alone_signs_in_and_runs_a_message(browser: Browser, stack: Stack, keys: dict[str, str]) -> None:
    async with visiting(browser, stack.root) as visitor:
        page, keyboard = visitor.page, visitor.page.keyboard

        async def tab_to(name: str) -> None:
            """Press Tab until the focus is on the element with this label or text."""
            for _ in range(40):
                await keyboard.press("Tab")
                focused = await page.evaluate(FOCUSED)
                if focused == name:
                    # The focused element shows its focus.
                    assert await page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle") != "none"
                    return
            raise AssertionError(f"Tab never reaches {name!r}")

        await visitor.open("/playground")
        await tab_to("API key")
        await keyboard.type(keys["inference"])
        await keyboard.press("Enter")
        await expect(page.get_by_role("heading", level=1)).to_have_text("Playground")
        await tab_to("Skip to the content")
        await keyboard.press("Enter")
        await tab_to("Message")
        await keyboard.type("Hello")
        await tab_to("Second model")
        await keyboard.type("json-bot")
        await keyboard.press("Control+Enter")
        for label in ("Model", "Second model"):
            await expect(side(visitor, label).locator("[data-state]")).to_have_text("Done", timeout=30_000)
        await tab_to("Copy")
        await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        await keyboard.press("Enter")
        await expect(page.get_by_text("Copied")).to_be_visible()
        assert "Hello" in str(await page.evaluate("navigator.clipboard.readText()"))


async def test_without_javascript_a_message_is_answered(signed_in: SignedIn) -> None:
    async with signed_in("inference", java_script_enabled=False) as visitor:
        page = visitor.page
        await visitor.open("/playground?model=json-bot&message=Hi")
        await page.get_by_role("button", name="Run").click()
        await expect(page.get_by_role("region", name="Answer of the model")).not_to_be_empty(timeout=30_000)


async def test_a_session_that_has_ended_leads_back_to_where_one_was(browser: Browser, stack: Stack, keys: dict[str, str]) -> None:
    async with visiting(browser, stack.root) as visitor:
        page = visitor.page
        await visitor.sign_in(keys["operator"])
        await visitor.open("/fleet")
        visitor.expected = {401}
        cookies = {cookie["name"]: cookie["value"] for cookie in await page.context.cookies() if cookie["name"] == "lmaas_session"}
        with stack.http(cookies["lmaas_session"]) as client:
            assert client.delete("/admin/v1/sessions/current").status_code == 200
        # The part that is fetched every two seconds notices it.
        await page.get_by_label("API key").fill(keys["operator"], timeout=20_000)
        visitor.expected = set()
        await page.get_by_role("button", name="Sign in").click()
        await expect(page.get_by_role("heading", level=1)).to_have_text("Fleet")
