"""Unusual requests to a running gateway: keys, slashes, methods, encodings, old versions of HTTP, browsers."""

import asyncio
import gzip
import json
import re
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from lmaas.api.table import PLACES
from lmaas.keys import hash_key, new_key, shown_prefix
from lmaas.store.tenants import create_key
from lmaas.types import Role
from tests.integration.gateway.stack import CHAT, COMPLETION, Stack, Tenant, running

ORIGIN = "https://app.example.com"
BODY: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
JAVA = "Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\nUpgrade: h2c\r\n"
PATHS = pytest.mark.parametrize("path", [CHAT, COMPLETION])


@dataclass
class Service:
    stack: Stack
    tenant: Tenant
    operator: str

    def client(self, **headers: str) -> httpx.AsyncClient:
        """Return a client with these headers and no others of lmaas."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx.AsyncClient(base_url=self.stack.url, headers=named, timeout=60)

    async def raw(self, request: bytes) -> bytes:
        """Return everything that a connection receives until it closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", int(self.stack.url.rpartition(":")[2]))
        try:
            writer.write(request)
            return await asyncio.wait_for(reader.read(), 60)
        finally:
            writer.close()


async def test_the_reference_of_the_api_needs_no_key(service: Service) -> None:
    async with service.client() as http:
        for path in ("/docs", "/docs/", "/docs/keys", "/docs/style.css"):
            answer = await http.get(path)
            assert answer.status_code == 200, path
            assert answer.headers["content-type"].startswith("text/"), path
        missing = await http.get("/docs/nothing")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
        assert (await http.head("/docs/keys")).status_code == 200
        assert (await http.post("/docs/keys")).status_code == 405


@pytest.fixture(scope="module")
async def service(postgres_url: str, valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    folder: Path = tmp_path_factory.mktemp("stack")
    async with running(postgres_url, valkey_url, folder, cors_origins=f"{ORIGIN},http://localhost:3000") as stack:
        model = await stack.model("base")
        await stack.replica(model, "--fake-token-ms 2")
        tenant = await stack.tenant()
        keys = []
        for tenant_id, role in ((tenant.id, Role.TENANT_ADMIN), (None, Role.OPERATOR)):
            keys.append(new_key())
            row = await create_key(stack.db, tenant_id, role, "test", hash_key(keys[-1]), shown_prefix(keys[-1]))
        yield Service(stack, Tenant(tenant.id, keys[0], row.id), keys[1])


@pytest.mark.parametrize("name", ["authorization", "api-key", "x-api-key", "X-API-Key"])
async def test_each_key_header_works_everywhere(service: Service, name: str) -> None:
    def headers(key: str) -> dict[str, str]:
        return {name: f"Bearer {key}" if name == "authorization" else key}

    async with service.client() as http:
        assert (await http.post(CHAT, json=BODY, headers=headers(service.tenant.key))).status_code == 200
        assert (await http.get("/v1/models", headers=headers(service.tenant.key))).status_code == 200
        assert (await http.get("/v1/adapters", headers=headers(service.tenant.key))).status_code == 200
        assert (await http.get("/admin/v1/tenants", headers=headers(service.operator))).status_code == 200
        for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/v1/adapters"), ("GET", "/admin/v1/tenants")):
            refused = await http.request(method, path, headers=headers("sk-wrong"))
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"] == "Bearer"
            two = headers(service.tenant.key) | {"api-key" if name != "api-key" else "x-api-key": "another"}
            both = await http.request(method, path, headers=two)
            assert (both.status_code, both.headers["www-authenticate"]) == (401, "Bearer")
            assert "two different API keys" in both.json()["error"]["message"]


@pytest.mark.parametrize("path", [CHAT + "/", COMPLETION + "/", CHAT + "//", "/v1/" + CHAT.removeprefix("/v1"), "/" + CHAT])
async def test_slashes_lead_to_the_same_place(service: Service, path: str) -> None:
    body = BODY if "chat" in path else {"model": "base", "prompt": "Hi"}
    async with service.client(x_api_key=service.tenant.key) as http:
        response = await http.post(service.stack.url + path, json=body)
    assert (response.status_code, response.json()["object"]) == (200, "chat.completion" if "chat" in path else "text_completion")
    assert response.history == []


def readable() -> list[str]:
    paths = {place.path for place in PLACES if place.operation.method == "GET"}
    others = ("/v1/models", "/v1/models/base", "/v1/models/none", "/health", "/healthz", "/readyz", "/metrics", "/openapi.json", "/none")
    return [*sorted(re.sub("{.*?}", "none", path) for path in paths), *others]


@pytest.mark.parametrize("path", readable())
async def test_a_slash_at_the_end_and_head_wherever_there_is_get(service: Service, path: str) -> None:
    key = service.operator if path.startswith("/admin") else service.tenant.key
    async with service.client(authorization=f"Bearer {key}") as http:
        plain, slash = await http.get(path), await http.get(path + "/")
        head, head_slash = await http.head(path), await http.head(path + "/")
    assert plain.status_code == slash.status_code == head.status_code == head_slash.status_code
    # A key is no session.
    assert plain.status_code == 200 or "none" in path or path.endswith("/sessions/current")
    assert head.headers["content-type"] == plain.headers["content-type"]
    assert head.headers["x-request-id"].startswith("req_")
    assert head.content == b""
    if path != "/metrics":
        assert int(head.headers["content-length"]) == len(plain.content)
        # Anthropic's errors contain the request's id.
        assert re.sub(rb"req_\w+", b"", slash.content) == re.sub(rb"req_\w+", b"", plain.content)


@pytest.mark.parametrize(("coding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_compressed_request(service: Service, coding: str, pack: Any, stream: bool) -> None:
    sent = pack(json.dumps(BODY | {"stream": stream}).encode())
    headers = {"content-encoding": coding, "content-type": "application/json; charset=punycode"}
    async with service.client(api_key=service.tenant.key) as http:
        response = await http.post(CHAT, content=sent, headers=headers)
        assert response.status_code == 200
        assert response.text.endswith("data: [DONE]\n\n") is stream
        refused = await http.post("/v1/adapters/x/activate", content=pack(b'{"version": 1}'), headers=headers)
        assert refused.status_code == 404, "the name was read, and the adapter does not exist"


@PATHS
@pytest.mark.parametrize("stream", [False, True])
async def test_how_long_it_took_is_told(service: Service, path: str, stream: bool) -> None:
    body = (BODY if path == CHAT else {"model": "base", "prompt": "Hi"}) | {"stream": stream}
    async with service.client(api_key=service.tenant.key) as http:
        response = await http.post(path, json=body)
        refused = await http.post(path, json={})
    assert (response.status_code, refused.status_code) == (200, 400)
    for each in (response, refused):
        assert 0 <= int(each.headers["openai-processing-ms"]) < 60_000
        assert each.headers.get_list("x-request-id")[0].startswith("req_")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("upgrade", ["", JAVA], ids=["plain", "asks for h2c"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_old_and_eager_clients(service: Service, version: str, upgrade: str, stream: bool) -> None:
    body = json.dumps(BODY | {"stream": stream}).encode()
    headers = f"{upgrade}host: x\r\nauthorization: Bearer {service.tenant.key}\r\ncontent-length: {len(body)}\r\n"
    # If the first request leaves the connection open, a second request on it closes it.
    last = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    request = f"POST {CHAT} HTTP/{version}\r\n{headers}\r\n".encode() + body
    got = await (exchange(service, request, last) if version == "1.1" else service.raw(request))
    head, _, answer = got.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    chunked = b"transfer-encoding: chunked" in head
    assert chunked is (stream and version == "1.1")
    if version == "1.0":
        assert b"connection: close" in head
        if stream:
            assert all(line.startswith(b"data: ") for line in answer.strip().split(b"\n\n"))
            assert answer.endswith(b"data: [DONE]\n\n")
        else:
            assert json.loads(answer)["object"] == "chat.completion"
    else:
        assert b'{"status":"ok"}' in got, "the connection was used again"


async def exchange(service: Service, request: bytes, last: bytes) -> bytes:
    """Return the responses to a request and to a second one on the same connection, which closes it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(service.stack.url.rpartition(":")[2]))
    try:
        writer.write(request)
        got = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
        if b"chunked" in got:
            got += await asyncio.wait_for(reader.readuntil(b"\r\n0\r\n\r\n"), 60)
        else:
            found = re.search(rb"content-length: (\d+)", got)
            assert found is not None
            got += await reader.readexactly(int(found[1]))
        writer.write(last)
        return got + await asyncio.wait_for(reader.read(), 60)
    finally:
        writer.close()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_page_in_a_browser(service: Service, stream: bool) -> None:
    asked = {"origin": ORIGIN, "access-control-request-method": "POST", "access-control-request-headers": "authorization,x-stainless-os"}
    async with service.client() as http:
        preflight = await http.options(CHAT, headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == ORIGIN
        headers = {"origin": ORIGIN, "authorization": f"Bearer {service.tenant.key}"}
        served = await http.post(CHAT, json=BODY | {"stream": stream}, headers=headers)
        unknown = await http.post(CHAT, json=BODY, headers={"origin": ORIGIN})
        missing = await http.post(CHAT, json=BODY | {"model": "none"}, headers=headers)
        listed = await http.get("/v1/models", headers=headers)
        elsewhere = await http.post(CHAT, json=BODY, headers=headers | {"origin": "https://evil.example"})
    assert [each.status_code for each in (served, unknown, missing, listed)] == [200, 401, 404, 200]
    for each in (served, unknown, missing, listed):
        assert each.headers["access-control-allow-origin"] == ORIGIN
        assert "x-request-id" in each.headers["access-control-expose-headers"]
        assert each.headers["vary"] == "Origin"
    assert "access-control-allow-origin" not in elsewhere.headers


async def test_readyz_waits_for_the_file_that_ends_the_setup(service: Service, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    async with service.stack.gateway(ready_file=ready) as gateway, httpx.AsyncClient(base_url=gateway.url) as http:
        closed = await http.get("/readyz")
        assert (closed.status_code, closed.json()["error"]["code"]) == (503, "setup_incomplete")
        assert "the manifests are not applied yet" in closed.json()["error"]["message"]
        assert closed.headers["retry-after"] == "1"
        assert (await http.get("/healthz")).status_code == 200
        key = {"authorization": f"Bearer {service.tenant.key}"}
        assert (await http.get("/v1/models", headers=key)).status_code == 200, "requests are served: applying manifests needs them"
        ready.touch()
        assert (await http.get("/readyz")).json() == {"status": "ready"}
