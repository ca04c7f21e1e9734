"""Refusals that a gateway makes by itself: bodies, parameters, methods, paths and keys, without a database or a queue."""

import gzip
import json
import zlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from lmaas.config import Settings
from tests.unit.unreachable import INFERENCE, UnreachableGateway

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
PATHS = pytest.mark.parametrize("path", [CHAT, COMPLETION])
HI = [{"role": "user", "content": "Hi"}]
MAX_BODY_BYTES = Settings().max_body_bytes


def check(response: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    """Check that the response is this error; return its message."""
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param), response.text
    assert response.headers["x-request-id"].startswith("req_")
    return str(error["message"])


def ask(path: str, **more: Any) -> dict[str, Any]:
    return {"model": "base", "max_tokens": 6} | ({"messages": HI} if path == CHAT else {"prompt": "Hi"}) | more


@pytest.mark.parametrize(
    ("content", "code", "param"),
    [
        *(
            (text, "invalid_json", None)
            for text in (b"", b"{", b"[1]", b'"text"', b'{"a": 1, "a": 2}', b'{"a": NaN}', b'{"model": "\xff"}')
        ),
        pytest.param(b"[" * 100_000, "invalid_json", None, id="deep"),
        (b'{"model": "\\ud800", "messages": [{"role": "user", "content": "a"}]}', "invalid_string", "model"),
    ],
)
async def test_bodies_that_are_no_request(tenant: httpx.AsyncClient, content: bytes, code: str, param: str | None) -> None:
    check(await tenant.post(CHAT, content=content), 400, code, param)


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        (CHAT, {"messages": HI}, "missing_parameter", "model"),
        (CHAT, {"model": "base"}, "missing_parameter", "messages"),
        (CHAT, ask(CHAT, stream_options={"include_usage": True}), "invalid_request", "stream_options"),
        (CHAT, ask(CHAT, n=129), "out_of_range", "n"),
        (COMPLETION, ask(COMPLETION, prompt=["a"] * 33), "too_many_prompts", "prompt"),
    ],
)
async def test_parameters_that_are_wrong(tenant: httpx.AsyncClient, path: str, body: dict[str, Any], code: str, param: str) -> None:
    check(await tenant.post(path, json=body), 400, code, param)


@PATHS
@pytest.mark.parametrize(
    "name",
    [
        *("chat_template", "mm_processor_kwargs", "allowed_token_ids", "bad_words", "thinking_token_budget"),
        *("cache_salt", "priority", "kv_transfer_params", "prompt_embeds", "x" * 3000),
    ],
)
async def test_what_is_not_on_the_allowlist_is_refused_by_name(tenant: httpx.AsyncClient, path: str, name: str) -> None:
    check(await tenant.post(path, json=ask(path, **{name: 1})), 400, "unsupported_parameter", name[:100])


async def test_bodies_that_are_too_large(tenant: httpx.AsyncClient) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(MAX_BODY_BYTES // 2**16 + 2):
            yield b" " * 2**16

    bomb = gzip.compress(b'{"model": "' + b"a" * (2 * MAX_BODY_BYTES) + b'"}')
    check(await tenant.post(CHAT, content=b'{"x": "' + b"a" * MAX_BODY_BYTES + b'"}'), 413, "request_too_large")
    check(await tenant.post(CHAT, content=endless()), 413, "request_too_large")
    check(await tenant.post(CHAT, content=bomb, headers={"content-encoding": "gzip"}), 413, "request_too_large")


async def test_codings_that_are_wrong(tenant: httpx.AsyncClient) -> None:
    check(await tenant.post(CHAT, content=b"\x1f\x8b", headers={"content-encoding": "gzip"}), 400, "invalid_content_encoding")
    check(await tenant.post(CHAT, content=b"{}", headers={"content-encoding": "br"}), 415, "unsupported_media_type", "Content-Encoding")


@pytest.mark.parametrize(("coding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_what_is_compressed_is_read(tenant: httpx.AsyncClient, coding: str, pack: Callable[[bytes], bytes]) -> None:
    headers = {"content-encoding": coding, "content-type": "application/json; charset=punycode"}
    response = await tenant.post(CHAT, content=pack(json.dumps(ask(CHAT, n=129)).encode()), headers=headers)
    check(response, 400, "out_of_range", "n")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        *((method, CHAT, "POST") for method in ("GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS")),
        ("GET", COMPLETION, "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("DELETE", "/v1/models/base", "GET, HEAD"),
        ("POST", "/health", "GET, HEAD"),
        ("PUT", "/v1/adapters", "GET, HEAD, POST"),
        ("PUT", "/admin/v1/tenants/x", "DELETE, GET, HEAD, PATCH"),
    ],
)
async def test_what_a_path_allows(tenant: httpx.AsyncClient, method: str, path: str, allowed: str) -> None:
    for each in (path, path + "/"):
        response = await tenant.request(method, each)
        assert (response.status_code, response.headers["allow"]) == (405, allowed)
        if method != "HEAD":
            check(response, 405, "method_not_allowed")


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/inference/v1/abort_requests", "/v1", "/", "/admin/v1", "/v1/none"])
async def test_paths_that_do_not_exist(tenant: httpx.AsyncClient, path: str) -> None:
    check(await tenant.post(path, json={"request_ids": []}), 404, "not_found")


@pytest.mark.parametrize("charset", ["utf-7", "punycode", "undefined", "idna", "unicode_escape", "rot13"])
async def test_a_form_in_an_odd_charset(tenant: httpx.AsyncClient, charset: str) -> None:
    form = b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\na+AGI-\xff\r\n--b--\r\n'
    headers = {"content-type": f"multipart/form-data; boundary=b; charset={charset}"}
    check(await tenant.post("/v1/adapters/", content=form, headers=headers), 400, "invalid_multipart")


async def test_text_that_cannot_be_a_key(tenant: httpx.AsyncClient) -> None:
    key = tenant.headers["authorization"].removeprefix("Bearer ")
    credentials = ["", "Bearer", "Bearer x", "Bearer ' OR '1'='1", "Bearer sk-lmaas-" + "a" * 5000, f"Basic {key}"]
    bodies = set()
    for authorization in [*credentials, f"Bearer sk-lmaas-{'é' * 10}"]:
        response = await tenant.post(CHAT, json=ask(CHAT), headers=[(b"authorization", authorization.encode())])
        check(response, 401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"
        bodies.add(response.text)
    assert len(bodies) == 1


@pytest.mark.parametrize("header", ["api-key", "x-api-key"])
@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/v1/adapters", "/admin/v1/tenants"])
async def test_two_different_keys(tenant: httpx.AsyncClient, path: str, header: str) -> None:
    message = check(await tenant.request("POST" if path == CHAT else "GET", path, headers={header: "another"}), 401, "invalid_api_key")
    assert "two different API keys" in message


async def test_an_operators_key_calls_no_models(operator: httpx.AsyncClient) -> None:
    check(await operator.post(CHAT, json=ask(CHAT)), 403, "insufficient_permissions")
    check(await operator.get("/v1/models"), 403, "insufficient_permissions")


@pytest.mark.parametrize(("method", "path"), [("GET", "/admin/v1/tenants"), ("POST", "/v1/keys"), ("POST", "/v1/adapters")])
async def test_a_key_for_inference_manages_nothing(gateway: UnreachableGateway, method: str, path: str) -> None:
    async with gateway.client(INFERENCE) as client:
        check(await client.request(method, path), 403, "insufficient_permissions")


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"nonsense": 1}', b'{"name": 5}'])
@pytest.mark.parametrize("path", ["/admin/v1/tenants", "/admin/v1/keys", "/admin/v1/base-models"])
async def test_bodies_that_the_management_api_refuses(operator: httpx.AsyncClient, path: str, content: bytes) -> None:
    response = await operator.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"]
