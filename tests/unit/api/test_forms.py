"""Multipart forms that are malformed in any way are the client's error."""

import gzip
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from lmaas.api.forms import multipart_form
from lmaas.errors import LmaasError
from lmaas.http import Frame, JsonResponse, on_error, on_http_exception

FORM = (
    b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\nrobot\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="f.bin"\r\nContent-Type: application/octet-stream\r\n\r\n'
    b"\x00\x01\x02\r\n--b--\r\n"
)
LIMIT = 300_000


async def upload(request: Request) -> Response:
    """Respond with the fields, and the sizes of the files."""
    async with multipart_form(request, LIMIT, max_files=2, max_fields=2) as form:
        return JsonResponse({name: value if isinstance(value, str) else len(await value.read()) for name, value in form.multi_items()})


@contextmanager
def client() -> Iterator[TestClient]:
    handlers = {HTTPException: on_http_exception, LmaasError: on_error, Exception: on_error}
    app = Starlette(routes=[Route("/x", upload, methods=["POST"])], exception_handlers=handlers)
    with TestClient(Frame(app)) as test:
        yield test


def post(content: bytes, content_type: str | None, **headers: str) -> tuple[int, dict[str, object]]:
    sent = headers | ({"content-type": content_type} if content_type is not None else {})
    with client() as test:
        raw = [(name.encode(), value.encode("latin-1")) for name, value in sent.items()]
        response = test.post("/x", content=content, headers=raw)
    return response.status_code, response.json()


@pytest.mark.parametrize(
    "options",
    [
        "boundary=b",
        'boundary="b"',
        "boundary=b; charset=utf-8",
        "charset=UTF-8; boundary=b",
        "boundary=b; charset=us-ascii",
        "boundary=b; x=y",
    ],
)
def test_a_form(options: str) -> None:
    assert post(FORM, f"multipart/form-data; {options}") == (200, {"name": "robot", "file": 3})


def test_a_compressed_form() -> None:
    packed = gzip.compress(FORM)
    assert post(packed, "multipart/form-data; boundary=b", **{"content-encoding": "gzip"}) == (200, {"name": "robot", "file": 3})
    bomb = gzip.compress(FORM.replace(b"\x00", b"\x00" * LIMIT))
    assert post(bomb, "multipart/form-data; boundary=b", **{"content-encoding": "gzip"})[0] == 413
    status, body = post(packed, "multipart/form-data; boundary=b", **{"content-encoding": "br"})
    assert (status, body["error"]["code"]) == (415, "unsupported_media_type")  # type: ignore[index]


@pytest.mark.parametrize(
    "content_type",
    [
        *(
            f"multipart/form-data; boundary=b; charset={charset}"
            for charset in (
                *(
                    "utf-7",
                    "punycode",
                    "undefined",
                    "idna",
                    "unicode_escape",
                    "raw_unicode_escape",
                    "rot13",
                    "hex",
                    "zlib",
                    "base64",
                    "mbcs",
                ),
                *("utf-16", "utf-32", "nonsense", "../../x", "x" * 5000, "\xff\xfe", "utf-8\x01", '"utf-7"'),
            )
        ),
        "multipart/form-data",
        "multipart/form-data; boundary=",
        'multipart/form-data; boundary=""',
        "multipart/form-data; boundary=other",
        "multipart/form-data; boundary=" + "b" * 5000,
        "multipart/form-data; boundary*=utf-7''b",
        "multipart/form-data; boundary=\xff",
        "multipart/mixed; boundary=b",
        "application/x-www-form-urlencoded",
        "application/json",
        ";;;===",
        "\xff",
        "",
        None,
    ],
)
def test_a_content_type_that_cannot_be_read(content_type: str | None) -> None:
    status, body = post(FORM, content_type)
    assert status == 400, body
    assert body["error"]["code"] == "invalid_multipart"  # type: ignore[index]
    assert len(str(body)) < 500


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(b"", id="no header"),
        pytest.param(b"Content-Disposition: form-data\r\n", id="no name"),
        pytest.param(b"Content-Disposition: form-data; name*=utf-7''a\r\n", id="only an extended name"),
        pytest.param(b"Content-Disposition\r\n", id="no colon"),
        pytest.param(b'Content-Disposition: form-data; name="a"; x="' + b"y" * 100_000 + b'"\r\n', id="a huge header"),
        pytest.param(b"X-Header: 1\r\n" * 1000 + b'Content-Disposition: form-data; name="a"\r\n', id="a thousand headers"),
        pytest.param(b"\xff\xfe: \x00\r\n", id="not text"),
        pytest.param(b'Content-Disposition: form-data; name="a"\n\n', id="bare line feeds"),
    ],
)
def test_a_part_that_cannot_be_read(part: bytes) -> None:
    status, body = post(b"--b\r\n" + part + b"\r\nvalue\r\n--b--\r\n", "multipart/form-data; boundary=b")
    assert status == 400, body
    assert body["error"]["code"] == "invalid_multipart"  # type: ignore[index]


@pytest.mark.parametrize(
    "disposition",
    [
        b"form-data; name=\"a\"; filename*=utf-7''%ff",
        b"form-data; name=\"a\"; filename*=unknown''x",
        b'form-data; name="a"; filename*=UTF-8\'\'%e2%82%ac; filename="x"',
        b'form-data; name="a"; filename="\xff\xfe\x80"',
        b'form-data; name="a"; filename="' + b"x" * 3000 + b'"',
        b'form-data; name="\xff"',
        b'form-data; name="a"; name="b"',
        b'form-data; name="a',
        b"form-data; name=a; filename=",
        b'attachment; name="a"; filename="C:\\Users\\x.bin"',
        b'form-data; name="%ff%00"; filename="%zz"',
    ],
)
def test_odd_names_are_no_error_of_the_service(disposition: bytes) -> None:
    status, _ = post(b"--b\r\nContent-Disposition: " + disposition + b"\r\n\r\nvalue\r\n--b--\r\n", "multipart/form-data; boundary=b")
    assert status in (200, 400)


@pytest.mark.parametrize("length", range(0, len(FORM) - 2, 7))
def test_a_form_that_is_cut(length: int) -> None:
    status, body = post(FORM[:length], "multipart/form-data; boundary=b")
    assert (status, body["error"]["code"]) == (400, "invalid_multipart")  # type: ignore[index]


def test_too_many_and_too_much() -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n'
    assert post(part * 3 + b"--b--\r\n", "multipart/form-data; boundary=b")[0] == 400
    assert post(FORM.replace(b"\x00", b"\x00" * LIMIT), "multipart/form-data; boundary=b")[0] == 413
