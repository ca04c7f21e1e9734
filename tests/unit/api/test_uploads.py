"""Forms with a file that is written while they arrive: accepted and refused forms, however the form is cut into pieces."""

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from lmaas.api.files import disposition
from lmaas.api.uploads import MAX_TEXT_BYTES, read_upload
from lmaas.errors import LmaasError
from lmaas.http import Frame, JsonResponse, on_error, on_http_exception

LIMIT = 300_000
TYPE = "multipart/form-data; boundary=b"


async def upload(request: Request) -> Response:
    """Respond with the texts, the name of the file and its bytes."""
    pieces: list[bytes] = []

    async def write(piece: bytes) -> None:
        pieces.append(piece)

    form = await read_upload(request, LIMIT, "file", ("purpose", "more"), write)
    content = b"".join(pieces)
    return JsonResponse({"texts": form.texts, "filename": form.filename, "size": len(content), "start": content[:20].decode("latin-1")})


@contextmanager
def client() -> Iterator[TestClient]:
    handlers = {HTTPException: on_http_exception, LmaasError: on_error, Exception: on_error}
    app = Starlette(routes=[Route("/x", upload, methods=["POST"])], exception_handlers=handlers)
    with TestClient(Frame(app)) as test:
        yield test


def post(content: bytes | Iterator[bytes], content_type: str = TYPE, **headers: str) -> tuple[int, dict[str, Any]]:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in (headers | {"content-type": content_type}).items()]
    with client() as test:
        response = test.post("/x", content=content, headers=raw)
    return response.status_code, response.json()


def text(name: str = "purpose", value: bytes = b"batch", more: bytes = b"") -> bytes:
    return b'--b\r\nContent-Disposition: form-data; name="' + name.encode() + b'"' + more + b"\r\n\r\n" + value + b"\r\n"


def file(content: bytes = b"content", name: bytes = b"a.jsonl", field: str = "file") -> bytes:
    return text(field, content, b'; filename="' + name + b'"\r\nContent-Type: application/octet-stream')


END = b"--b--\r\n"
FORM = text() + file() + END


@pytest.mark.parametrize("form", [FORM, file() + text() + END, b"preamble\r\n" + FORM, FORM + b"epilogue"], ids=range(4))
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_form(form: bytes, size: int) -> None:
    status, found = post(iter([form[start : start + size] for start in range(0, len(form), size)]))
    if form.startswith(b"preamble"):
        assert (status, found["error"]["code"]) == (400, "invalid_multipart")
        return
    assert (status, found) == (200, {"texts": {"purpose": "batch"}, "filename": "a.jsonl", "size": 7, "start": "content"})


@pytest.mark.parametrize("content", [b"", b"\0" * 1000, b"\r\n--", b"\r\n--bb\r\n--c--\r\n", b"--b--", bytes(range(256)) * 900])
def test_any_bytes_are_a_content(content: bytes) -> None:
    status, found = post(text() + file(content) + END)
    assert (status, found["size"], found["start"]) == (200, len(content), content[:20].decode("latin-1"))


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (b"plain.jsonl", "plain.jsonl"),
        ("übung 中文 \u202e😀.jsonl".encode(), "übung 中文 \u202e😀.jsonl"),
        (b"../../etc/passwd", "passwd"),
        (b"/abs/olute", "olute"),
        (b"C:\\\\Users\\\\me\\\\x.jsonl", "x.jsonl"),
        (b"a;b=c.jsonl", "a;b=c.jsonl"),
        (b"%00%0a.jsonl", "%00%0a.jsonl"),
        (b"x" * 255, "x" * 255),
        ("ü".encode() * 255, "ü" * 255),
        (b" spaced ", " spaced "),
        (b".hidden", ".hidden"),
    ],
)
def test_a_name_is_kept_without_its_path(given: bytes, kept: str) -> None:
    status, found = post(text() + file(name=given) + END)
    assert (status, found.get("filename")) == (200, kept)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (b"", "needs a name"),
        (b"a/", "needs a name"),
        (b"..", "needs a name"),
        (b"a/..", "needs a name"),
        (b"  ", "needs a name"),
        (b"a\x00b", "control character"),
        (b"a\x1b[31mb", "control character"),
        (b"a\x7f", "control character"),
        ("a\x85b".encode(), "control character"),
        (b"x" * 256, "has 256 characters, and may have 255"),
        (b"x" * 4000, "has 4,000 characters"),
    ],
)
def test_a_name_that_is_none(given: bytes, words: str) -> None:
    status, found = post(text() + file(name=given) + END)
    assert status == 400
    assert words in found["error"]["message"] or found["error"]["code"] == "invalid_multipart"
    assert found["error"]["code"] in ("invalid_filename", "invalid_multipart")
    assert len(found["error"]["message"]) < 300


@pytest.mark.parametrize(
    ("form", "code", "param"),
    [
        pytest.param(END, "missing_parameter", "file", id="no part"),
        pytest.param(text() + END, "missing_parameter", "file", id="no file"),
        pytest.param(text() + text("file", b"x") + END, "missing_parameter", "file", id="a file without a name"),
        pytest.param(text() + file() + file() + END, "unexpected_field", "file", id="two files"),
        pytest.param(file() + file(field="other") + END, "unexpected_field", "other", id="another file"),
        pytest.param(text() + file(field="purpose") + END, "unexpected_field", "purpose", id="a field twice, once as a file"),
        pytest.param(file(field="purpose") + file() + END, "invalid_type", "purpose", id="a field as a file"),
        pytest.param(text() + text() + file() + END, "unexpected_field", "purpose", id="a field twice"),
        pytest.param(text("nonsense") + file() + END, "unexpected_field", "nonsense", id="an unknown field"),
        pytest.param(text("n" * 3000) + file() + END, "unexpected_field", "n" * 100, id="a long unknown field"),
        pytest.param(text("purpose", b"a\0b") + file() + END, "invalid_type", "purpose", id="NUL in a field"),
        pytest.param(text("purpose", b"\xff\xfe") + file() + END, "invalid_multipart", None, id="bytes in a field"),
        pytest.param(text("purpose", b"x" * (MAX_TEXT_BYTES + 1)) + file() + END, "out_of_range", "purpose", id="a huge field"),
        pytest.param(text() + file(name=b"\xff\xfe") + END, "invalid_multipart", None, id="a name that is not text"),
        pytest.param(text().replace(b"purpose", b"\xff") + file() + END, "invalid_multipart", None, id="a field's name that is not text"),
        pytest.param(b"--b\r\n\r\nx\r\n" + file() + END, "invalid_multipart", None, id="a part without headers"),
        pytest.param(b"--b\r\n" + b"X-A: 1\r\n" * 9 + b"\r\nx\r\n" + END, "invalid_multipart", None, id="many headers"),
        pytest.param(b"--b\r\nX-A: " + b"1" * 5000 + b"\r\n\r\nx\r\n" + END, "invalid_multipart", None, id="a long header"),
        pytest.param(b"{}", "invalid_multipart", None, id="no form"),
        pytest.param(b"", "invalid_multipart", None, id="no body"),
        pytest.param(FORM.replace(b"--b", b"--c"), "invalid_multipart", None, id="another boundary"),
    ],
)
def test_what_is_refused(form: bytes, code: str, param: str | None) -> None:
    status, found = post(form)
    assert (status, found["error"]["code"], found["error"]["param"]) == (400, code, param)
    assert len(found["error"]["message"]) < 400


@pytest.mark.parametrize("length", range(0, len(FORM) - 4, 5))
def test_a_form_that_is_cut(length: int) -> None:
    status, found = post(FORM[:length])
    assert (status, found["error"]["code"]) == (400, "invalid_multipart")


@pytest.mark.parametrize("content_type", ["", "application/json", "multipart/form-data", "multipart/form-data; boundary=" + "b" * 300])
def test_a_content_type_that_is_none(content_type: str) -> None:
    status, found = post(FORM, content_type)
    assert (status, found["error"]["code"]) == (400, "invalid_multipart")


def test_a_text_in_another_charset() -> None:
    status, found = post(text("purpose", "ü".encode("latin-1")) + file() + END, f"{TYPE}; charset=latin-1")
    assert (status, found["texts"]) == (200, {"purpose": "ü"})


def test_a_compressed_form() -> None:
    assert post(gzip.compress(FORM), **{"content-encoding": "gzip"})[0] == 200
    bomb = gzip.compress(text() + file(b"\0" * LIMIT) + END)
    assert post(bomb, **{"content-encoding": "gzip"})[0] == 413
    assert post(gzip.compress(FORM)[:-9], **{"content-encoding": "gzip"})[1]["error"]["code"] == "invalid_content_encoding"
    assert post(FORM, **{"content-encoding": "br"})[0] == 415


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("a.jsonl", "attachment; filename=\"a.jsonl\"; filename*=UTF-8''a.jsonl"),
        ("ü\u202e.txt", "attachment; filename=\"__.txt\"; filename*=UTF-8''%C3%BC%E2%80%AE.txt"),
        ('a"\\%;\r\n b', "attachment; filename=\"a___;__ b\"; filename*=UTF-8''a%22%5C%25%3B%0D%0A%20b"),
    ],
)
def test_the_name_of_a_download(name: str, header: str) -> None:
    assert disposition(name) == header
