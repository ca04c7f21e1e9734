"""Cross-origin requests: preflights, and the headers of every response, over a socket and without one."""

import json

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmaas.config import Settings, load
from lmaas.errors import SettingsError, Unauthenticated
from lmaas.http import Frame, JsonResponse
from lmaas.web.cors import EXPOSED, Cors
from tests.support.conditions import until
from tests.unit.web.test_server import Connection

ORIGIN = "https://app.example.com"
#: Headers that the SDKs of OpenAI, Anthropic and Azure send from a browser.
SDK_HEADERS = (
    "authorization,content-type,x-stainless-lang,x-stainless-retry-count,openai-organization,openai-project,anthropic-version,"
    "anthropic-dangerous-direct-browser-access,x-api-key,api-key,idempotency-key"
)


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["path"] == "/secret":
        raise Unauthenticated
    await JsonResponse({})(scope, receive, send)


def framed(*origins: str) -> ASGIApp:
    return Cors(Frame(app, {"/v1/chat/completions": app}), origins)


async def over_a_socket(served: ASGIApp, method: str, path: str, **headers: str) -> tuple[int, dict[str, str]]:
    connection = Connection(served)
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    connection.send(f"{method} {path} HTTP/1.1\r\nhost: x\r\n{lines}\r\n".encode())
    await until(lambda: connection.protocol.cycle.response_complete, every_s=0)
    head = b"".join(connection.written).partition(b"\r\n\r\n")[0].decode().split("\r\n")
    pairs = [line.split(": ", 1) for line in head[1:]]
    names = [name.lower() for name, _ in pairs]
    assert len(names) == len(set(names)), "no header occurs twice"
    connection.protocol.connection_lost(None)
    return int(head[0].split()[1]), {name.lower(): value for name, value in pairs}


@pytest.mark.parametrize(
    ("method", "path", "status"), [("POST", "/v1/chat/completions", 200), ("GET", "/x", 200), ("HEAD", "/x", 200), ("POST", "/secret", 401)]
)
@pytest.mark.parametrize(
    ("origins", "origin", "allowed"),
    [
        ((ORIGIN,), ORIGIN, ORIGIN),
        ((ORIGIN, "http://localhost:3000"), "http://localhost:3000", "http://localhost:3000"),
        (("*",), "https://any.example", "*"),
        ((ORIGIN,), "https://evil.example", None),
        ((ORIGIN,), "null", None),
        ((ORIGIN,), ORIGIN + ".evil.example", None),
    ],
)
async def test_every_response_has_the_headers(
    method: str, path: str, status: int, origins: tuple[str, ...], origin: str, allowed: str | None
) -> None:
    got, headers = await over_a_socket(framed(*origins), method, path, origin=origin)
    assert got == status
    assert headers["x-request-id"].startswith("req_")
    assert headers.get("access-control-allow-origin") == allowed
    if allowed is not None:
        assert {"x-request-id", "x-lmaas-model", "retry-after", "x-ratelimit-remaining-tokens", "openai-processing-ms"} <= set(
            headers["access-control-expose-headers"].split(", ")
        )
    if "*" not in origins:
        assert headers["vary"] == "Origin"
    assert "access-control-allow-credentials" not in headers


async def test_a_response_without_an_origin_varies_by_it() -> None:
    _, headers = await over_a_socket(framed(ORIGIN), "POST", "/v1/chat/completions")
    assert headers["vary"] == "Origin"
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/adapters/x", "/admin/v1/tenants", "/nowhere"])
@pytest.mark.parametrize("method", ["POST", "GET", "DELETE", "PATCH", "PUT"])
async def test_a_preflight(path: str, method: str) -> None:
    asked = {"access_control_request_method": method, "access_control_request_headers": SDK_HEADERS}
    status, headers = await over_a_socket(framed(ORIGIN), "OPTIONS", path, origin=ORIGIN, **asked)
    assert status == 200
    assert headers["access-control-allow-origin"] == ORIGIN
    assert method in headers["access-control-allow-methods"].split(", ")
    assert headers["access-control-allow-headers"] == SDK_HEADERS
    assert int(headers["access-control-max-age"]) > 0
    status, headers = await over_a_socket(framed(ORIGIN), "OPTIONS", path, origin="https://evil.example", **asked)
    assert status == 400
    assert "access-control-allow-origin" not in headers


async def test_a_lifespan_passes() -> None:
    passed: list[str] = []

    async def inner(scope: Scope, _: Receive, __: Send) -> None:
        passed.append(scope["type"])

    async def nothing(*_: Message) -> Message:
        return {}

    await Cors(inner, ["*"])({"type": "lifespan"}, nothing, nothing)  # type: ignore[arg-type]
    assert passed == ["lifespan"]


def test_no_header_is_exposed_twice() -> None:
    assert len(EXPOSED) == len(set(EXPOSED))
    assert json.dumps(EXPOSED).islower()


@pytest.mark.parametrize(
    ("text", "origins"),
    [
        ("", []),
        ("*", ["*"]),
        (f"{ORIGIN}, http://localhost:3000 ,", [ORIGIN, "http://localhost:3000"]),
        ("http://[::1]:8080", ["http://[::1]:8080"]),
        ("chrome-extension://abcdef", ["chrome-extension://abcdef"]),
    ],
)
def test_the_setting(text: str, origins: list[str]) -> None:
    settings = load({"LMAAS_CORS_ORIGINS": text})
    assert settings.cors_origin_list == origins
    assert load(settings.environment()).cors_origin_list == origins


@pytest.mark.parametrize(
    "text", ["example.com", "https://example.com/", "https://example.com/app", "null", "https://*.example.com", "*.com", "https://a b"]
)
def test_what_is_not_an_origin_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="LMAAS_CORS_ORIGINS"):
        Settings(cors_origins=text)
