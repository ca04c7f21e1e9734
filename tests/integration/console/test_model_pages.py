"""The pages of models and work, as a browser without JavaScript sees them: playground, adapters, files, batches, fleet."""

import dataclasses
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from lmaas.console.app import build_console
from lmaas.store.models import BaseModel
from lmaas.store.tenants import get_tenant
from tests.integration.console.conftest import ORIGIN, Browser, Console, alive, browser_of, found_in
from tests.integration.gateway.stack import Tenant

LINE = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "base", "messages": []}}
JSONL = json.dumps(LINE).encode() + b"\n"


@pytest.fixture(scope="module")
async def model(console: Console) -> BaseModel:
    """A base model with an engine."""
    model = await console.stack.model("base")
    await console.stack.replica(model, "--fake-token-ms 1")
    return model


@pytest.fixture(scope="module")
async def owner(console: Console, model: BaseModel) -> Tenant:
    """The tenant acme, with the adapter `robot` in two versions."""
    row = await get_tenant(console.stack.db, console.tenants["acme"])
    tenant = Tenant(row.id, console.keys["acme-inference"], "")
    for _ in range(2):
        await console.stack.adapter(tenant, "robot", model)
    return tenant


@pytest.fixture
async def admin(console: Console, owner: Tenant) -> AsyncIterator[Browser]:
    """The browser of acme's administrator."""
    browser = await console.signed_in("acme-admin")
    yield browser
    await browser.http.aclose()


@pytest.fixture
async def operator(console: Console, owner: Tenant) -> AsyncIterator[Browser]:
    """The browser of an operator."""
    browser = await console.signed_in("operator")
    yield browser
    await browser.http.aclose()


async def send(browser: Browser, path: str, fields: dict[str, str], files: Any) -> httpx.Response:
    """Send a form with files."""
    token = found_in((await browser.get("")).text, r'name="csrf" value="([0-9a-f]+)"')
    return await browser.http.post(f"/console{path}", data={"csrf": token, **fields}, files=files, headers={"origin": ORIGIN})


async def after(browser: Browser, response: httpx.Response) -> str:
    """Return the page that follows a change."""
    assert response.status_code == 303, response.text
    return (await browser.http.get(response.headers["location"])).text


def values(page: str, name: str) -> str:
    """Return the value that a field of a form shows."""
    return found_in(page, rf'name="{name}"[^>]* value="([^"]*)"')


# Adapters


async def test_adapters_are_listed_searched_and_shown(admin: Browser) -> None:
    page = (await admin.get("/adapters")).text
    assert "robot" in page
    assert "version 2" in page
    assert "robot" in (await admin.get("/adapters", params={"search": "obo"})).text
    nothing = (await admin.get("/adapters", params={"search": "<b>zzz"})).text
    assert "No adapter has “&lt;b&gt;zzz” in its name." in nothing
    shown = (await admin.get("/adapters/robot")).text
    assert "Roll back to this" in shown
    assert "lmaas adapter activate robot 2" in shown


async def test_an_older_version_is_activated_and_the_newest_again(admin: Browser) -> None:
    page = await after(admin, await admin.post("/adapters/robot/activate", {"version": "1"}))
    assert "Version 1 of robot is live." in page
    assert "version 1 is live" in page
    assert "version 2 is live" in await after(admin, await admin.post("/adapters/robot/activate", {"version": "2"}))


@pytest.mark.parametrize("version", ["0", "9", "-1", "", "x", "²", "9" * 40])
async def test_a_version_that_does_not_exist_is_not_found(admin: Browser, version: str) -> None:
    response = await admin.post("/adapters/robot/activate", {"version": version})
    assert response.status_code == 404
    assert "version" in response.text


async def test_an_upload_needs_both_files_and_keeps_what_was_typed(admin: Browser) -> None:
    fields = {"name": "poet", "base_model": "base"}
    for files in ({}, {"files": ("adapter_config.json", b"{}")}, {"files": ("weights.bin", b"x")}):
        response = await send(admin, "/upload-adapter", fields, files)
        assert response.status_code == 400
        assert "Choose two files together" in response.text
        assert values(response.text, "name") == "poet"


async def test_what_is_wrong_with_an_upload_stands_beside_its_field(admin: Browser) -> None:
    files = [("files", ("adapter_config.json", b"{}")), ("files", ("adapter_model.safetensors", b"nothing"))]
    for fields, field in (
        ({"name": "Bad Name", "base_model": "base"}, "name"),
        ({"name": "poet", "base_model": "none-such"}, "base_model"),
        ({"name": "poet", "base_model": "base"}, "files"),
        ({"base_model": "base"}, "name"),
    ):
        response = await send(admin, "/upload-adapter", fields, files)
        assert 400 <= response.status_code < 500
        assert found_in(response.text, rf'id="f-{field}-error">([^<]+)<')
        assert len(re.findall(r'id="f-\w+-error"', response.text)) == 1


async def test_a_deleted_adapter_is_gone(admin: Browser, console: Console, owner: Tenant, model: BaseModel) -> None:
    await console.stack.adapter(owner, "short-lived", model)
    assert "short-lived was deleted" in await after(admin, await admin.post("/adapters/short-lived/delete"))
    assert (await admin.get("/adapters/short-lived")).status_code == 404


async def test_an_upload_by_a_script_is_told_where_to_lead(admin: Browser) -> None:
    token = found_in((await admin.get("")).text, r'name="csrf" value="([0-9a-f]+)"')
    headers = {"origin": ORIGIN, "x-lmaas-upload": "true"}
    form = {"csrf": token, "purpose": "user_data"}
    response = await admin.http.post("/console/upload-file", data=form, files={"file": ("x", b"x")}, headers=headers)
    assert response.status_code == 200
    assert "x was uploaded." in (await admin.http.get(response.headers["x-lmaas-redirect"])).text
    admin.http.cookies.clear()
    assert (await admin.http.post("/console/upload-file", data=form, files={"file": ("x", b"x")}, headers=headers)).status_code == 401


async def test_an_inference_key_sees_adapters_and_changes_none(console: Console, owner: Tenant) -> None:
    browser = await console.signed_in("acme-inference")
    page = (await browser.get("/adapters/robot")).text
    assert "Roll back" not in page
    assert "Delete" not in page
    assert (await browser.post("/adapters/robot/delete")).status_code == 403
    assert (await browser.get("/adapters/robot")).status_code == 200


# Playground


async def answered(browser: Browser, **asked: Any) -> list[str]:
    """Return the lines of one of the playground's streams."""
    token = found_in((await browser.get("")).text, r'name="csrf" value="([0-9a-f]+)"')
    response = await browser.http.post("/console/playground/answer", json=asked, headers={"origin": ORIGIN, "x-csrf-token": token})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return [line for line in response.text.splitlines() if line]


async def test_a_model_answers_as_a_stream(admin: Browser) -> None:
    lines = await answered(admin, model="robot@1", message="Hi", max_tokens=4)
    assert lines[0] == "event: head"
    assert json.loads(lines[1].removeprefix("data: "))["request_id"]
    assert lines[-1] == "data: [DONE]"
    usage = json.loads(lines[-2].removeprefix("data: "))["usage"]
    assert usage["completion_tokens"] == 4


@pytest.mark.parametrize(
    ("asked", "words"),
    [({"model": "none-such", "message": "Hi"}, "none-such"), ({"model": "base", "message": "Hi", "max_tokens": 0}, "max_tokens")],
)
async def test_the_error_of_a_request_is_an_event(admin: Browser, asked: dict[str, Any], words: str) -> None:
    [line] = await answered(admin, **asked)
    assert words in json.loads(line.removeprefix("data: "))["error"]["message"]


@pytest.mark.parametrize("body", [{}, {"model": "base"}, {"model": 1, "message": "x"}, {"model": "base", "message": "x", "tools": []}])
async def test_a_request_of_another_shape_is_refused(admin: Browser, body: dict[str, Any]) -> None:
    token = found_in((await admin.get("")).text, r'name="csrf" value="([0-9a-f]+)"')
    response = await admin.http.post("/console/playground/answer", json=body, headers={"origin": ORIGIN, "x-csrf-token": token})
    assert response.status_code == 400


async def test_without_a_token_nothing_is_asked(admin: Browser) -> None:
    response = await admin.http.post("/console/playground/answer", json={"model": "base", "message": "Hi"}, headers={"origin": ORIGIN})
    assert response.status_code == 403


async def test_without_javascript_two_models_answer_on_one_page(admin: Browser) -> None:
    fields = {"model": "robot", "second": "base", "message": "Tell <me>", "max_tokens": "5"}
    response = await admin.post("/playground", fields)
    assert response.status_code == 200
    texts = re.findall(r'aria-label="Answer of the [a-z ]+">([^<]+)</div>', response.text)
    assert len(texts) == 2
    assert texts[0] != texts[1]
    assert response.text.count("5 tokens") == 2
    assert "Tell &lt;me&gt;</textarea>" in response.text


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"message": "Hi"}, "model"),
        ({"model": "base"}, "message"),
        ({"model": "base", "message": "Hi", "max_tokens": "many"}, "max_tokens"),
        ({"model": "base", "message": "Hi", "temperature": "hot"}, "temperature"),
    ],
)
async def test_what_is_missing_stands_beside_its_field(admin: Browser, fields: dict[str, str], field: str) -> None:
    response = await admin.post("/playground", fields)
    assert response.status_code == 400
    assert found_in(response.text, rf'id="f-{field}-error">([^<]+)<')


async def test_models_are_suggested_by_a_part_of_their_name(admin: Browser) -> None:
    found = (await admin.get("/playground/models", params={"model": "obo"})).text
    assert re.findall(r'value="([^"]+)"', found) == ["robot"]
    assert re.findall(r'value="([^"]+)"', (await admin.get("/playground/models")).text) == ["base", "robot"]
    assert re.findall(r'value="([^"]+)"', (await admin.get("/playground/models", params={"second": "robot@1"})).text) == ["robot"]


async def test_the_code_follows_the_form(admin: Browser) -> None:
    page = (await admin.post("/playground/code", {"model": "robot@1", "message": "What's up?"})).text
    assert f"{ORIGIN}/v1/chat/completions" in page
    assert "robot@1" in page
    assert (await admin.post("/playground/code", {"model": "robot", "max_tokens": "x"})).status_code == 204


async def test_the_price_of_an_answer_is_in_the_ledger(admin: Browser, console: Console, model: BaseModel) -> None:
    lines = await answered(admin, model="base", message="Hi", max_tokens=2)
    request_id = json.loads(lines[1].removeprefix("data: "))["request_id"]
    assert (await admin.get("/playground/cost", params={"request_id": request_id})).status_code == 202
    await console.stack.ledger(model)
    event = (await admin.get("/playground/cost", params={"request_id": request_id})).json()
    assert event["status"] == "completed"
    assert (event["charge_picousd"], event["is_priced"]) == (0, False)
    other = await console.signed_in("globex-admin")
    assert (await other.get("/playground/cost", params={"request_id": request_id})).status_code == 202
    assert (await admin.get("/playground/cost")).status_code == 202


# Files and batches


async def test_a_file_is_uploaded_downloaded_and_deleted(admin: Browser, console: Console) -> None:
    name, content = "my “data”; x=1 é.jsonl", bytes(range(256)) * 300
    page = await after(admin, await send(admin, "/upload-file", {"purpose": "user_data", "lifetime": "86400"}, {"file": (name, content)}))
    file_id = found_in(page, r"<code>(file-[\w-]+)</code>")
    download = await admin.get(f"/files/{file_id}/content")
    assert download.content == content
    assert download.headers["content-disposition"].startswith("attachment; filename*=UTF-8''my%20")
    assert download.headers["content-type"] == "application/octet-stream"
    assert file_id in (await admin.get("/files", params={"purpose": "user_data"})).text
    assert file_id not in (await admin.get("/files", params={"purpose": "batch"})).text
    other = await console.signed_in("globex-admin")
    for path in (f"/files/{file_id}", f"/files/{file_id}/content"):
        assert (await other.get(path)).status_code == 404
    assert "was deleted" in await after(admin, await admin.post(f"/files/{file_id}/delete"))
    assert (await admin.get(f"/files/{file_id}/content")).status_code == 404


async def test_a_form_without_a_file_says_so(admin: Browser) -> None:
    for path, fields in (("/upload-file", {"purpose": "batch"}), ("/new-batch", {"endpoint": "/v1/chat/completions", "name": "mine"})):
        response = await admin.post(path, fields)
        assert response.status_code == 400
        assert "Choose a file" in found_in(response.text, r'id="f-file-error">([^<]+)<')
    assert values(response.text, "name") == "mine"


async def test_a_batch_is_created_shown_and_cancelled(admin: Browser, console: Console) -> None:
    fields = {"endpoint": "/v1/chat/completions", "name": "night <shift>"}
    page = await after(admin, await send(admin, "/new-batch", fields, {"file": ("lines.jsonl", JSONL)}))
    assert "The batch was created." in page
    assert "night &lt;shift&gt;" in page
    batch = found_in(page, r"<code>(batch_[\w-]+)</code>")
    part = (await admin.get(f"/batches/{batch}", headers={"hx-request": "true"})).text
    assert part.lstrip().startswith('<div id="batch"')
    assert 'hx-trigger="every 2s"' in part
    assert batch in (await admin.get("/batches")).text
    # An operator sees the batch too, but no file of the tenant.
    operator = await console.signed_in("operator")
    shown = (await operator.get(f"/batches/{batch}", params={"tenant": console.tenants["acme"]})).text
    assert "/console/files/" not in shown
    assert f"lmaas --tenant {console.tenants['acme']} batches show {batch}" in shown
    other = await console.signed_in("globex-admin")
    assert (await other.get(f"/batches/{batch}")).status_code == 404
    assert "being cancelled" in await after(admin, await admin.post(f"/batches/{batch}/cancel"))


async def test_a_refused_batch_keeps_its_uploaded_file(admin: Browser) -> None:
    response = await send(admin, "/new-batch", {"endpoint": "/v1/nothing", "name": "mine"}, {"file": ("lines.jsonl", JSONL)})
    assert response.status_code == 400
    assert found_in(response.text, r'id="f-endpoint-error">([^<]+)<')
    assert values(response.text, "name") == "mine"
    assert "lines.jsonl" in found_in(response.text, r'<option value="file-[\w-]+" selected>([^<]+)<')


# Fleet


async def test_operators_see_pools_and_replicas(operator: Browser, admin: Browser) -> None:
    page = (await operator.get("/fleet")).text
    assert "base" in page
    assert "1 ready" in page
    assert (await admin.get("/fleet")).status_code == 403
    shown = (await operator.get("/fleet/base")).text
    assert "first token" in shown
    assert "Drain …" in shown
    part = (await operator.get("/fleet/base", headers={"hx-request": "true"})).text
    assert part.lstrip().startswith('<div id="pool"')


async def test_bounds_are_changed_and_refused_beside_their_field(operator: Browser) -> None:
    for fields, field in (
        ({"min_replicas": "5", "max_replicas": "2"}, "min_replicas"),
        ({"max_replicas": "none"}, "max_replicas"),
        ({"idle_timeout_s": "0"}, "idle_timeout_s"),
        ({"idle_timeout_s": "nan"}, "idle_timeout_s"),
    ):
        response = await operator.post("/fleet/base", fields)
        assert response.status_code == 400, fields
        assert found_in(response.text, rf'id="f-{field}-error">([^<]+)<')
        assert values(response.text, field) == fields[field]
    page = await after(operator, await operator.post("/fleet/base", {"min_replicas": "0", "max_replicas": "3", "idle_timeout_s": "7.5"}))
    assert values(page, "max_replicas") == "3"
    assert values(page, "idle_timeout_s") == "7.5"


async def test_replicas_that_do_not_exist_are_not_found(operator: Browser) -> None:
    assert (await operator.post("/fleet/base/stop", {"replica": "rep_none"})).status_code == 404
    assert (await operator.get("/fleet/none-such")).status_code == 404


# Errors of the gateway


class Broken(httpx.AsyncBaseTransport):
    """The network to the gateway, on which requests to some paths fail."""

    def __init__(self) -> None:
        self._network = httpx.AsyncHTTPTransport()
        self.paths: tuple[str, ...] = ()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, or fail."""
        if request.url.path in self.paths:
            raise httpx.ConnectError("refused", request=request)
        return await self._network.handle_async_request(request)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._network.aclose()


@pytest.mark.parametrize(
    ("who", "page", "broken", "shown"),
    [
        ("acme-admin", "/adapters?search=x", "/v1/adapters", 'href="/console/adapters?search=x">Try again'),
        ("acme-admin", "/adapters/robot", "/v1/adapters/robot/versions", "robot"),
        ("acme-admin", "/upload-adapter", "/v1/models", "cannot be read"),
        ("acme-admin", "/playground", "/v1/models", 'name="message"'),
        ("acme-admin", "/files", "/v1/files", "Try again"),
        ("acme-admin", "/batches", "/v1/batches", "Try again"),
        ("acme-admin", "/new-batch", "/v1/files", "The list of files cannot be read"),
        ("operator", "/fleet", "/admin/v1/base-models", "Replicas"),
        ("operator", "/fleet/base", "/admin/v1/replicas", "Change the bounds"),
    ],
)
async def test_a_page_says_what_it_cannot_read_and_shows_the_rest(
    console: Console, owner: Tenant, who: str, page: str, broken: str, shown: str
) -> None:
    network = Broken()
    app = build_console(dataclasses.replace(console.stack.settings, console_api_url=console.stack.url), network)
    async with alive(app):
        browser = browser_of(app)
        await browser.sign_in(console.keys[who])
        network.paths = (broken,)
        response = await browser.get(page)
        assert response.status_code == 200
        assert "The service cannot be reached." in response.text
        assert shown in response.text
        network.paths = ()
        assert "cannot be reached" not in (await browser.get(page)).text


@pytest.mark.parametrize(
    ("who", "part", "broken"), [("acme-admin", "/batches", "/v1/batches"), ("operator", "/fleet", "/admin/v1/base-models")]
)
async def test_a_part_that_cannot_be_read_is_an_error_so_that_the_page_keeps_what_it_has(
    console: Console, owner: Tenant, who: str, part: str, broken: str
) -> None:
    network = Broken()
    app = build_console(dataclasses.replace(console.stack.settings, console_api_url=console.stack.url), network)
    async with alive(app):
        browser = browser_of(app)
        await browser.sign_in(console.keys[who])
        network.paths = (broken,)
        assert (await browser.get(part, headers={"hx-request": "true"})).status_code == 503
