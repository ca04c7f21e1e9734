"""The API reference at `/docs` has every operation, links that resolve, and examples that are valid and equal in both languages."""

import ast
import json
import re
import shlex
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from starlette.applications import Starlette

from lmaas.api.decoding import decode
from lmaas.api.operation import Place
from lmaas.api.table import PLACES
from lmaas.app import openapi_document
from lmaas.reference.fields import Field, Treatment, field_of, fields_of
from lmaas.reference.pages import Reference
from lmaas.reference.resources import Call, Resource, resources, slug_of

SPEC = openapi_document()
SCHEMAS = SPEC["components"]["schemas"]
RESOURCES = resources(SPEC)
CALLS = [call for resource in RESOURCES for call in resource.calls]
REFERENCE = Reference(SPEC)


class Page(HTMLParser):
    """The ids, the links and the loaded files of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.tags: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        assert "style" not in given
        assert not any(name.startswith("on") for name in given)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if tag == "a" else []
        self.loaded += [given["href"]] if tag == "link" else []
        self.loaded += [given["src"]] if "src" in given else []


PAGES = {"/docs": REFERENCE.index()} | {f"/docs/{each.slug}": REFERENCE.resource(each.slug) for each in RESOURCES}
PARSED = {address: Page(html) for address, html in PAGES.items()}


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    app = Starlette(routes=REFERENCE.routes())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://service") as client:
        yield client


def test_every_operation_is_on_a_page() -> None:
    described = {(method.upper(), path) for path, item in SPEC["paths"].items() for method in item}
    shown = {(call.method, path) for call in CALLS for path in (call.path, call.operator_path) if path is not None}
    assert shown == described
    assert all(call.summary and call.answers and (call.errors or not call.example.needs_key) for call in CALLS)


@pytest.mark.parametrize("address", PAGES)
def test_links_resolve(address: str) -> None:
    page = PARSED[address]
    assert len(page.ids) == len(set(page.ids))
    for link in page.links:
        path, _, anchor = link.partition("#")
        assert (path or address) in PAGES or path == "/openapi.json", link
        if anchor:
            assert anchor in PARSED[path or address].ids, link


@pytest.mark.parametrize("address", PAGES)
def test_pages_load_nothing_but_their_style_and_run_nothing(address: str) -> None:
    page = PARSED[address]
    assert page.loaded == ["/docs/style.css"]
    # Elements that may be wider than the window can be scrolled with the keyboard.
    assert len(re.findall(r'<div class="wide"|<pre', PAGES[address])) == len(
        re.findall(r'<div class="wide" tabindex="0"|<pre tabindex="0"', PAGES[address])
    )
    assert not page.tags & {"script", "style", "iframe", "img", "form"}
    assert "url(" not in (Path(__file__).parents[3] / "lmaas" / "reference" / "static" / "style.css").read_text()


BODIES = [
    pytest.param(described["schema"], call.example.body, id=call.id)
    for call in CALLS
    for described in SPEC["paths"][call.path][call.method.lower()].get("requestBody", {}).get("content", {}).values()
]


@pytest.mark.parametrize(("schema", "body"), BODIES)
def test_examples_are_valid(schema: dict[str, Any], body: dict[str, Any]) -> None:
    """If this fails for a new operation, give its fields values in lmaas/reference/examples.py."""
    jsonschema.Draft202012Validator({**schema, "components": SPEC["components"]}).validate(body)
    assert body


@pytest.mark.parametrize(
    "place", [place for place in PLACES if place.operation.body is not None and not place.operation.files], ids=lambda place: place.id
)
def test_the_api_reads_the_examples(place: Place) -> None:
    call = next(each for each in CALLS if place.path in (each.path, each.operator_path) and each.method == place.operation.method)
    assert place.operation.body is not None
    assert call.example.body is not None
    decode(place.operation.body, call.example.body)


@dataclass
class Sent:
    """A request that an example makes."""

    method: str = ""
    path: str = ""
    has_key: bool = False
    body: Any = None
    form: dict[str, str] = field(default_factory=dict)


def sent_by_curl(command: str) -> Sent:
    [program, *words] = shlex.split(command.replace("\\\n", ""))
    assert program == "curl"
    sent = Sent()
    remaining = iter(words)
    for word in remaining:
        match word:
            case "-X":
                sent.method = next(remaining)
            case "-H":
                sent.has_key |= next(remaining) == "Authorization: Bearer $KEY"
            case "-d":
                sent.body = json.loads(next(remaining))
            case "-F":
                name, _, value = next(remaining).partition("=")
                sent.form[name] = value
            case _:
                sent.path = word.removeprefix("$SERVER")
    sent.method = sent.method or ("POST" if sent.body is not None or sent.form else "GET")
    return sent


def sent_by_python(program: str) -> Sent:
    [call] = [node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Call) and ast.unparse(node).startswith("httpx.")]
    address = ast.unparse(call.args[0])
    assert address.startswith("os.environ['SERVER'] + ")
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    form = {name: str(value) for name, value in ast.literal_eval(given["data"]).items()} if "data" in given else {}
    if isinstance(files := given.get("files"), ast.Dict):
        for key, opened in zip(files.keys, files.values, strict=True):
            assert isinstance(key, ast.Constant)
            assert isinstance(opened, ast.Call)
            form[str(key.value)] = "@" + ast.literal_eval(opened.args[0])
    return Sent(
        ast.unparse(call.func).removeprefix("httpx.").upper(),
        ast.literal_eval(address.removeprefix("os.environ['SERVER'] + ")),
        "headers" in given and ast.unparse(given["headers"]) == "{'Authorization': 'Bearer ' + os.environ['KEY']}",
        ast.literal_eval(given["json"]) if "json" in given else None,
        form,
    )


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.id)
def test_both_examples_are_the_same_request(call: Call) -> None:
    sent = sent_by_curl(call.example.curl)
    assert sent == sent_by_python(call.example.python)
    assert (sent.method, sent.has_key) == (call.method, call.example.needs_key)
    assert re.fullmatch(re.sub(r"{\w+}", "[^/{}]+", call.path), sent.path)


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (
            {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100},
            Field("x", "integer", (), "1 to 1,000; default: 100", "", True),
        ),
        ({"type": ["string", "null"], "maxLength": 5}, Field("x", "string or null", (), "at most 5 characters", "", True)),
        ({"enum": ["a", None]}, Field("x", '"a" or null', (), "", "", True)),
        ({"const": "file"}, Field("x", '"file"', (), "", "", True)),
        ({}, Field("x", "any value", (), "", "", True)),
        ({"type": "array", "items": {"$ref": "#/components/schemas/Key"}}, Field("x", "list of: object", ("Key",), "", "", True)),
        (
            {"anyOf": [{"type": "string", "description": "A\n  day."}, {"type": "null"}]},
            Field("x", "string or null", (), "", "A day.", True),
        ),
        ({"$ref": "#/components/schemas/Role"}, Field("x", '"inference" or "operator" or "tenant_admin"', (), "", "", True)),
        (
            {"enum": [None], "description": "Refused, except for values that ask for nothing: it has no effect here."},
            Field("x", "null", (), "", "Refused, except for values that ask for nothing: it has no effect here.", True, Treatment.REFUSED),
        ),
        ({"type": "string", "contentMediaType": "application/json"}, Field("x", "file", (), "", "", True)),
    ],
)
def test_fields_in_words(schema: dict[str, Any], expected: Field) -> None:
    assert field_of("x", schema, SCHEMAS, required=True) == expected


def test_required_fields_come_first() -> None:
    rows = fields_of(SCHEMAS["NewBatch"], SCHEMAS)
    assert [row.name for row in rows if row.required] == [row.name for row in rows][:3]


@pytest.mark.parametrize(
    ("path", "slug"),
    [
        ("/v1/keys/{key}", "keys"),
        ("/admin/v1/keys", "keys"),
        ("/admin/v1/tenants", "tenants"),
        ("/admin/v1/tenants/{tenant}", "tenants"),
        ("/admin/v1/tenants/{tenant}/batches/{batch}", "batches"),
        ("/v1/messages", "messages"),
        ("/v1/messages/batches/{batch}/results", "message-batches"),
        ("/v1/messages/count_tokens", "messages"),
        ("/readyz", "health"),
        ("/v1/something-new", "something-new"),
    ],
)
def test_resources_by_path(path: str, slug: str) -> None:
    assert slug_of(path) == slug


def test_a_resource_without_a_title_has_its_name() -> None:
    spec = SPEC | {"paths": {"/v1/blue-things": {"get": SPEC["paths"]["/v1/keys"]["get"]}}}
    [resource] = resources(spec)
    assert isinstance(resource, Resource)
    assert (resource.slug, resource.title) == ("blue-things", "Blue things")


def test_texts_of_the_document_are_escaped() -> None:
    operation = SPEC["paths"]["/v1/keys"]["get"] | {"summary": "<script>alert(1)</script>", "description": "`<b>` & more"}
    page = Reference(SPEC | {"paths": {"/v1/keys": {"get": operation}}}).resource("keys")
    assert "<script>" not in page
    assert "<code>&lt;b&gt;</code> &amp; more" in page


async def test_headers_and_caching(client: httpx.AsyncClient) -> None:
    first = await client.get("/docs/keys")
    assert first.status_code == 200
    assert first.headers["content-type"] == "text/html; charset=utf-8"
    assert first.headers["content-security-policy"].startswith("default-src 'none'; style-src 'self';")
    assert first.headers["x-content-type-options"] == "nosniff"
    again = await client.get("/docs/keys", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
    other = await client.get("/docs/keys", headers={"if-none-match": '"other"'})
    assert (other.status_code, other.content) == (200, first.content)
    style = await client.get("/docs/style.css")
    assert (style.status_code, style.headers["content-type"]) == (200, "text/css; charset=utf-8")


def test_pages_are_small() -> None:
    assert {address: len(html) for address, html in PAGES.items() if len(html) > 100_000} == {}


def test_examples_show_no_markup_in_their_text() -> None:
    """The text that a person copies from the page is the example."""
    page = PAGES["/docs/keys"]
    shown = [
        re.sub(r"&#34;", '"', block).replace("&#39;", "'") for block in re.findall(r"<pre[^>]*><code>(.*?)</code></pre>", page, re.DOTALL)
    ]
    assert CALLS[[call.id for call in CALLS].index("create_key")].example.curl in shown
