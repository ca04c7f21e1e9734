"""The common parts of HTTP: strict JSON, keys, limits, compressed bodies, errors in one shape."""

import contextlib
import gzip
import json
import zlib
from typing import Any

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from lmaas.compression import MAX_MEMBERS, PIECE_BYTES, Unpacker
from lmaas.errors import (
    InvalidRequest,
    LmaasError,
    ModelNotFound,
    OverLimit,
    SettingsError,
    TooLarge,
    Unauthenticated,
    Unavailable,
    UnsupportedMediaType,
)
from lmaas.http import Frame, JsonResponse, api_key, error_response, limited, on_error, on_http_exception, parse_json


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"{}", {}),
        (b' {"a": [1, 2.5, null, true, "x"]} ', {"a": [1, 2.5, None, True, "x"]}),
        (b'{"a": {"b": 1}, "c": {"b": 2}}', {"a": {"b": 1}, "c": {"b": 2}}),
        ('{"ü": "\\ud83d\\ude00"}'.encode(), {"ü": "😀"}),
        pytest.param(rb'{"a": "the escape \\u0000 in a program"}', {"a": r"the escape \u0000 in a program"}),
        (rb'{"a": "the escape \\ud800 in a program"}', {"a": r"the escape \ud800 in a program"}),
    ],
)
def test_good_json(text: bytes, value: Any) -> None:
    assert parse_json(text) == value


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"[]", id="list"),
        pytest.param(b'"x"', id="string"),
        pytest.param(b"null", id="null"),
        pytest.param(b'{"a": 1, "a": 2}', id="same key twice"),
        pytest.param(b'{"a": {"b": 1, "b": 1}}', id="same key twice inside"),
        pytest.param(b'{"a": 1, "\\u0061": 2}', id="same key twice, escaped"),
        pytest.param(b'{"a": NaN}', id="NaN"),
        pytest.param(b'{"a": -Infinity}', id="Infinity"),
        pytest.param(b'{"a": 1} {"b": 2}', id="two values"),
        pytest.param(b'{"a": 1,}', id="comma"),
        pytest.param(b"{'a': 1}", id="python"),
        pytest.param(b'{"a": "\n"}', id="control character"),
        pytest.param(b'{"a": "\xff"}', id="not UTF-8"),
        pytest.param('{"a": 1}'.encode("utf-16"), id="UTF-16"),
        pytest.param(b"\xef\xbb\xbf{}", id="byte order mark"),
        pytest.param(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", id="deep list"),
        pytest.param(b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, id="deep object"),
        pytest.param(b"[" * 100_000, id="deep and open"),
        pytest.param(b'{"a": ' + b"9" * 5000 + b"}", id="number without end"),
    ],
)
def test_bad_json(text: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_json(text)
    assert caught.value.error_code == "invalid_json"
    assert len(caught.value.message) < 300
    caught.value.message.encode()


@pytest.mark.parametrize(
    ("text", "param", "what"),
    [
        (rb'{"a": "\ud800"}', "a", "half a surrogate pair"),
        (rb'{"a": "\u0000"}', "a", "NUL"),
        (rb'{"\uDFFF": 1}', "\ufffd", "half a surrogate pair"),
        (rb'{"a": {"b": [1, {"c": "x\u0000"}]}}', "a.b[1].c", "NUL"),
        (rb'{"a": {"b\u0000": 1}}', "a.b\ufffd", "NUL"),
        (rb'{"t": "\u0000", "a": "\uDc00\ud83d"}', "a", "half a surrogate pair"),
    ],
)
def test_strings_that_are_no_text_are_blamed_by_their_place(text: bytes, param: str, what: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_json(text, texts=("t",))
    assert (caught.value.error_code, caught.value.param) == ("invalid_string", param)
    assert what in caught.value.message
    caught.value.message.encode()


@pytest.mark.parametrize("depth", [100, 400, 900, 990, 5000])
def test_deep_values_with_odd_characters_break_nothing(depth: int) -> None:
    text = b'{"a": ' * depth + rb'"\u0000"' + b"}" * depth
    with pytest.raises(InvalidRequest):
        parse_json(text)
    with contextlib.suppress(InvalidRequest):
        parse_json(text, texts=("a",))


def test_texts_for_a_model_may_have_any_character() -> None:
    body = rb'{"t": ["a\u0000b", {"c": "\ud83d cut, \ud83d\ude00 whole"}], "n": 1, "\u0074t": "\\u0000"}'
    assert parse_json(body, texts=("t",)) == {"t": ["a\0b", {"c": "\ufffd cut, 😀 whole"}], "n": 1, "tt": r"\u0000"}


def http(headers: dict[str, str] | None = None, **changes: Any) -> Scope:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in (headers or {}).items()]
    return {"type": "http", "method": "POST", "path": "/x", "raw_path": b"/x", "query_string": b"", "headers": raw, **changes}


def body(*parts: bytes) -> Receive:
    left = list(parts)

    async def receive() -> Message:
        part = left.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(left)}

    return receive


async def read(receive: Receive) -> bytes:
    parts: list[bytes] = []
    while True:
        message = await receive()
        parts.append(message["body"])
        if not message["more_body"]:
            return b"".join(parts)


async def test_a_body_within_the_limit() -> None:
    assert (
        await read(limited(body(b"12345", b"67890"), http({"content-length": "10", "content-encoding": "identity"}), 10)) == b"1234567890"
    )


async def test_a_body_that_grows_over_the_limit() -> None:
    receive = limited(body(b"12345", b"678901", b"x"), http(), 10)
    await receive()
    with pytest.raises(TooLarge):
        await receive()


@pytest.mark.parametrize("headers", [{"content-length": "11"}, {"content-length": "1000000000"}])
async def test_a_body_that_is_refused_before_it_is_read(headers: dict[str, str]) -> None:
    with pytest.raises(TooLarge) as caught:
        limited(body(), http(headers), 10)
    assert caught.value.status == 413


@pytest.mark.parametrize("coding", [" BR", "zstd", "compress", "aes128gcm", "gzip, gzip", "deflate,gzip", "utf-8", "ü", "x" * 1000])
async def test_an_encoding_that_is_not_read(coding: str) -> None:
    with pytest.raises(UnsupportedMediaType) as caught:
        limited(body(), http({"content-encoding": coding}), 10)
    assert caught.value.status == 415
    assert caught.value.headers()["accept-encoding"] == "gzip, deflate, identity"
    assert len(caught.value.message) < 300


TEXT = b'{"text": "' + bytes(range(32, 127)) * 3000 + b'"}'


def deflated(data: bytes) -> bytes:
    return zlib.compress(data)


@pytest.mark.parametrize("step", [1000, 10**9])
@pytest.mark.parametrize(
    ("coding", "packed"),
    [
        ("gzip", gzip.compress(TEXT)),
        (" GZip ", gzip.compress(TEXT)),
        ("x-gzip", gzip.compress(TEXT, 1)),
        ("identity, gzip", gzip.compress(TEXT)),
        pytest.param("gzip", gzip.compress(TEXT[:1000]) + gzip.compress(b"") + gzip.compress(TEXT[1000:]), id="members"),
        pytest.param("gzip", gzip.compress(TEXT) + b"\0" * 700, id="padded"),
        ("deflate", deflated(TEXT)),
        ("identity", TEXT),
        ("", TEXT),
    ],
)
async def test_a_compressed_body_is_unpacked(coding: str, packed: bytes, step: int) -> None:
    parts = [packed[i : i + step] for i in range(0, len(packed), step)]
    assert await read(limited(body(*parts), http({"content-encoding": coding}), len(TEXT))) == TEXT
    with pytest.raises(TooLarge):
        await read(limited(body(*parts), http({"content-encoding": coding}), len(TEXT) - 1))


async def test_bytes_one_by_one() -> None:
    packed = gzip.compress(b"{}")
    assert await read(limited(body(*(packed[i : i + 1] for i in range(len(packed)))), http({"content-encoding": "gzip"}), 100)) == b"{}"
    assert await read(limited(body(b""), http({"content-encoding": "gzip"}), 100)) == b"", "an empty body has nothing to unpack"


@pytest.mark.parametrize(
    ("coding", "packed"),
    [
        pytest.param("gzip", TEXT, id="not gzip"),
        pytest.param("gzip", deflated(TEXT), id="deflate as gzip"),
        pytest.param("deflate", gzip.compress(TEXT), id="gzip as deflate"),
        pytest.param("gzip", gzip.compress(TEXT)[:-1], id="cut in the trailer"),
        pytest.param("gzip", gzip.compress(TEXT)[:5], id="cut in the head"),
        pytest.param("gzip", gzip.compress(TEXT)[:1000], id="cut in the data"),
        pytest.param("gzip", gzip.compress(TEXT)[:-8] + b"\0" * 8, id="wrong checksum"),
        pytest.param("gzip", gzip.compress(TEXT) + b"more", id="more after it"),
        pytest.param("gzip", gzip.compress(TEXT) + gzip.compress(TEXT)[:20], id="second member cut"),
        pytest.param("gzip", gzip.compress(b"") * (MAX_MEMBERS + 1), id="too many members"),
        pytest.param("deflate", deflated(TEXT) + b"x", id="more after deflate"),
        pytest.param("deflate", deflated(TEXT) * 2, id="deflate twice"),
        pytest.param("deflate", deflated(TEXT)[:-1], id="deflate cut"),
    ],
)
async def test_a_damaged_body(coding: str, packed: bytes) -> None:
    for parts in ([packed], [packed[:50], packed[50:]]):
        with pytest.raises(InvalidRequest) as caught:
            await read(limited(body(*parts), http({"content-encoding": coding}), 10**7))
        assert (caught.value.status, caught.value.error_code) == (400, "invalid_content_encoding")


async def test_a_bomb_is_not_unpacked_beyond_the_limit() -> None:
    bomb = gzip.compress(b"\0" * 100_000_000, 9)
    assert len(bomb) < 200_000
    receive = limited(body(bomb), http({"content-encoding": "gzip"}), 1_000_000)
    for _ in range(1_000_000 // PIECE_BYTES):
        assert len((await receive())["body"]) == PIECE_BYTES
    with pytest.raises(TooLarge):
        await receive()
    with pytest.raises(TooLarge):
        await read(limited(body(b"x" * 11), http({"content-encoding": "gzip"}), 10))


def test_unpacking_goes_in_small_pieces() -> None:
    pieces = list(Unpacker(b"gzip").feed(gzip.compress(b"\0" * 10_000_000), last=True))
    assert max(map(len, pieces)) <= PIECE_BYTES
    assert sum(map(len, pieces)) == 10_000_000


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ([], None),
        ([("authorization", "Bearer k")], "k"),
        ([("authorization", "bearer   k  ")], "k"),
        ([("api-key", "k")], "k"),
        ([("x-api-key", " k ")], "k"),
        ([("api-key", "k"), ("x-api-key", "k"), ("authorization", "Bearer k")], "k"),
        ([("authorization", "Bearer k"), ("authorization", "Bearer k")], "k"),
        pytest.param([("authorization", "Basic dXNlcg=="), ("api-key", "k")], "k", id="a proxy's own credentials"),
        pytest.param([("authorization", "Bearer "), ("x-api-key", "k")], "k", id="an SDK without a key"),
        ([("authorization", "Bearer"), ("x-api-key", "k")], "k"),
        ([("authorization", "Bearer k"), ("x-api-key", "")], "k"),
        ([("authorization", "k")], None),
        ([("authorization", "Basic k")], None),
        ([("authorization", "")], None),
        ([("api-key", "")], None),
        ([("cookie", "api-key=k"), ("x-key", "k")], None),
    ],
)
def test_the_key_of_a_request(headers: list[tuple[str, str]], key: str | None) -> None:
    assert api_key((name.encode(), value.encode()) for name, value in headers) == key


@pytest.mark.parametrize(
    "headers",
    [
        [("authorization", "Bearer a"), ("api-key", "b")],
        [("x-api-key", "a"), ("api-key", "b")],
        [("authorization", "Bearer a"), ("authorization", "Bearer b")],
        [("x-api-key", "a"), ("x-api-key", "b")],
        [("x-api-key", "a"), ("api-key", "a"), ("authorization", "Bearer secret")],
    ],
)
def test_two_keys_that_differ_are_refused(headers: list[tuple[str, str]]) -> None:
    with pytest.raises(Unauthenticated) as caught:
        api_key((name.encode(), value.encode()) for name, value in headers)
    assert caught.value.headers()["www-authenticate"] == "Bearer"
    assert "two different API keys" in caught.value.message
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    ("path", "reached", "seen"),
    [
        ("/v1/chat/completions", "direct", "/v1/chat/completions"),
        ("/v1/chat/completions/", "direct", "/v1/chat/completions"),
        ("/v1/chat/completions//", "direct", "/v1/chat/completions"),
        ("/v1//chat/completions", "direct", "/v1/chat/completions"),
        ("//v1/chat/completions", "direct", "/v1/chat/completions"),
        ("//v1//chat/completions/", "direct", "/v1/chat/completions"),
        ("/admin/v1//tenants/", "app", "/admin/v1/tenants"),
        ("/v1/models/", "app", "/v1/models"),
        ("/v1/models/a//b", "app", "/v1/models/a//b"),
        pytest.param("/admin/v1/tenants//keys/x", "app", "/admin/v1/tenants//keys/x", id="an empty name does not become another path"),
        ("/v1x//y", "app", "/v1x//y"),
        ("/", "app", "/"),
        ("///", "app", "/"),
        ("/v1/", "app", "/v1"),
        ("/v1", "app", "/v1"),
        ("*", "app", "*"),
    ],
)
async def test_slashes_at_the_end_and_after_the_base_url_do_not_matter(path: str, reached: str, seen: str) -> None:
    def endpoint(name: str) -> Any:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await JsonResponse([name, scope["path"]])(scope, receive, send)

        return app

    frame = Frame(endpoint("app"), {"/v1/chat/completions": endpoint("direct")})
    assert json.loads((await answer(frame, http(path=path)))[2]) == [reached, seen]
    assert json.loads((await answer(frame, http(path=path, method="GET")))[2]) == ["app", seen]


async def test_the_frames_lines_go_into_the_head_where_the_server_takes_them() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await JsonResponse({})(scope, receive, send)

    _, headers, _ = await answer(Frame(app))
    assert headers["x-request-id"].startswith("req_")
    assert int(headers["openai-processing-ms"]) >= 0
    lines: list[bytes] = []
    scope = http()
    scope["lmaas.head"] = lines.append
    _, headers, _ = await answer(Frame(app), scope)
    assert "x-request-id" not in headers
    [line] = lines
    assert [each.partition(b":")[0] for each in line.split(b"\r\n")] == [b"x-request-id", b"openai-processing-ms", b""]


@pytest.mark.parametrize(
    ("path", "anthropic"), [("/v1/messages", True), ("/v1/messages/count_tokens", True), ("/v1/chat/completions", False)]
)
async def test_anthropics_clients_get_the_id_under_the_name_that_they_read(path: str, anthropic: bool) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await JsonResponse({})(scope, receive, send)

    scope = http(path=path)
    _, got, _ = await answer(Frame(app), scope)
    assert got.get("request-id") == (got["x-request-id"] if anthropic else None)
    lines: list[bytes] = []
    scope["lmaas.head"] = lines.append
    await answer(Frame(app), scope)
    assert (b"\r\nrequest-id: req_" in lines[0]) is anthropic


def test_a_message_that_is_not_text_can_still_be_sent() -> None:
    assert JsonResponse({"message": "a \ud800 b"}).body == b'{"message":"a ? b"}'


async def answer(app: Any, scope: Scope | None = None) -> tuple[int, dict[str, str], bytes]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope or http(), body(b""), send)
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, b"".join(message.get("body", b"") for message in sent[1:])


@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after", "should_retry"),
    [
        (InvalidRequest("no", param="x"), 400, "invalid_request", None, "false"),
        (ModelNotFound("x" * 1000), 404, "model_not_found", None, "false"),
        (OverLimit("slowly", retry_after_s=0.2), 429, "rate_limit_exceeded", "1", "true"),
        (Unavailable("later", retry_after_s=10_000), 503, "no_capacity", "120", "true"),
        (Unavailable("later"), 503, "no_capacity", None, "true"),
        (InvalidRequest("no", retry_after_s=5), 400, "invalid_request", None, "false"),
        (LmaasError("?"), 500, "internal_error", None, "false"),
        (ValueError("secret"), 500, "internal_error", None, "false"),
    ],
)
async def test_the_frame_turns_errors_into_answers(
    error: Exception, status: int, code: str, retry_after: str | None, should_retry: str
) -> None:
    async def app(_: Scope, __: Receive, ___: Send) -> None:
        raise error

    got, headers, text = await answer(Frame(app), http({"x-request-id": "mine"}))
    assert got == status
    shape = json.loads(text)
    assert set(shape) == {"error"}
    assert set(shape["error"]) == {"message", "type", "param", "code"}
    assert shape["error"]["code"] == code
    assert "secret" not in text.decode()
    assert len(shape["error"]["message"]) < 300
    assert headers["x-request-id"].startswith("req_")
    assert headers.get("retry-after") == retry_after
    assert headers["x-should-retry"] == should_retry
    assert headers["content-type"] == "application/json"


async def test_each_request_has_its_own_id_also_when_it_succeeds() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await error_response(LmaasError(scope["request_id"]), scope)(scope, receive, send)

    first, second = await answer(Frame(app)), await answer(Frame(app))
    assert first[1]["x-request-id"] != second[1]["x-request-id"]
    assert json.loads(first[2])["error"]["message"] == first[1]["x-request-id"]


async def test_after_the_start_there_is_no_second_answer(caplog: pytest.LogCaptureFixture) -> None:
    async def app(_: Scope, __: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("too late")

    status, headers, text = await answer(Frame(app))
    assert (status, text) == (200, b"")
    [record] = caplog.records
    assert (record.levelname, record.__dict__["request_id"]) == ("ERROR", headers["x-request-id"])


@pytest.mark.parametrize(
    ("host", "good"),
    [
        ("localhost", True),
        ("127.0.0.1:8080", True),
        ("[::1]:8080", True),
        ("Models.example.com", True),
        ("a/x?", False),
        ("a b", False),
        ("a:80:80", False),
        ("a@b", False),
        ("[::1", False),
        ("a#", False),
    ],
)
async def test_a_host_that_is_no_host_is_refused(host: str, good: bool) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await error_response(OverLimit("reached"), scope)(scope, receive, send)

    status, headers, text = await answer(Frame(app), http({"host": host}))
    assert status == (429 if good else 400)
    assert headers["x-request-id"].startswith("req_")
    assert (json.loads(text)["error"]["code"] == "invalid_host") is not good


async def test_a_client_that_leaves_while_it_sends_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    async def app(_: Scope, __: Receive, ___: Send) -> None:
        raise ClientDisconnect

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await Frame(app)(http(), body(b""), send)
    assert (sent, caplog.records) == ([], [])


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (HTTPException(404), 404, "not_found"),
        (HTTPException(405, headers={"Allow": "POST, GET"}), 405, "method_not_allowed"),
        (HTTPException(400, "Too many fields."), 400, "invalid_request"),
        (HTTPException(500, "secret"), 500, "internal_error"),
    ],
)
async def test_errors_of_starlette(error: Exception, status: int, code: str) -> None:
    response = await on_http_exception(Request(http()), error)
    assert response.status_code == status
    assert json.loads(bytes(response.body))["error"]["code"] == code
    assert b"secret" not in response.body
    assert response.headers.get("allow") == ("GET, POST" if status == 405 else None)


async def test_other_errors_are_as_they_are_or_unknown() -> None:
    # The frame has given the request its id.
    request = Request({**http(), "request_id": "req_1"})
    assert (await on_error(request, OverLimit("slowly"))).status_code == 429
    for error in (ValueError("secret"), SettingsError("secret")):
        unknown = await on_error(request, error)
        assert unknown.status_code == 500
        assert b"secret" not in unknown.body
