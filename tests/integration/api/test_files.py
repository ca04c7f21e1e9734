"""Files over HTTP: accepted and refused uploads. Refused and interrupted uploads leave nothing behind."""

import asyncio
import gzip
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from sqlalchemy import text

from lmaas.errors import Unavailable
from lmaas.files.service import DOWNLOADS_AT_ONCE, UPLOADS_AT_ONCE
from lmaas.store.objects import Objects
from lmaas.store.scopes import SYSTEM
from tests.integration.gateway.stack import Stack, Tenant, running
from tests.support.conditions import until

FILES = "/v1/files"
LINES = b'{"custom_id": "1"}\r\n{"custom_id": "2"}'


@pytest.fixture
async def stack(postgres_url: str, valkey_url: str, tmp_path: Path) -> AsyncIterator[Stack]:
    async with running(postgres_url, valkey_url, tmp_path) as stack:
        yield stack


async def send(stack: Stack, tenant: Tenant, content: bytes = LINES, name: str = "a.jsonl", url: str = "", **fields: str) -> httpx.Response:
    async with stack.client(tenant, url) as http:
        return await http.post(FILES, data={"purpose": "batch"} | fields, files={"file": (name, content)})


async def created(stack: Stack, tenant: Tenant, content: bytes = LINES, name: str = "a.jsonl", **fields: str) -> dict[str, Any]:
    answer = await send(stack, tenant, content, name, **fields)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def left(stack: Stack) -> tuple[int, int, int, int]:
    """Return the number of rows, of checks of contents, of contents, and of named files among the drafts."""
    async with stack.db.begin(SYSTEM) as connection:
        rows = (await connection.execute(text("SELECT count(*) FROM files"))).scalar_one()
        checks = (await connection.execute(text("SELECT count(*) FROM content_checks"))).scalar_one()
    drafts = stack.settings.home / "uploads"
    return rows, checks, len(await stack.services.objects.list("files")), len(os.listdir(drafts)) if drafts.exists() else 0


def error(answer: httpx.Response) -> tuple[int, str, str | None]:
    found = answer.json()["error"]
    return answer.status_code, found["code"], found["param"]


async def test_the_life_of_a_file(stack: Stack) -> None:
    acme, globex, before = await stack.tenant(), await stack.tenant(), int(time.time())
    file = await created(stack, acme, name="größe 1.jsonl")
    assert file == {
        "id": file["id"],
        "object": "file",
        "bytes": len(LINES),
        "created_at": file["created_at"],
        "expires_at": file["created_at"] + 30 * 86400,
        "filename": "größe 1.jsonl",
        "purpose": "batch",
        "status": "processed",
        "status_details": None,
    }
    assert before <= file["created_at"] <= time.time()
    kept = await created(stack, acme, b"kept", purpose="user_data")
    soon = await created(stack, acme, b"soon", purpose="evals", **{"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"})
    assert (kept["expires_at"], soon["expires_at"] - soon["created_at"]) == (None, 3600)
    path = f"{FILES}/{file['id']}"
    async with stack.client(acme) as http, stack.client(globex) as other:
        assert (await http.get(path)).json() == file
        content = await http.get(f"{path}/content")
        assert (content.status_code, content.content) == (200, LINES)
        assert content.headers["content-type"] == "application/octet-stream"
        assert (
            content.headers["content-disposition"] == "attachment; filename=\"gr__e 1.jsonl\"; filename*=UTF-8''gr%C3%B6%C3%9Fe%201.jsonl"
        )
        assert content.headers["x-content-type-options"] == "nosniff"
        for address in (path, f"{path}/content"):
            head, got = await http.head(address), await http.get(address)
            assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", got.headers["content-length"])
            for method in ("GET", "HEAD"):
                assert (await other.request(method, address)).status_code == 404
        assert error(await other.delete(path)) == (404, "file_not_found", "file_id")
        assert (await other.get(FILES)).json()["data"] == []
        assert (await http.delete(path)).json() == {"id": file["id"], "object": "file", "deleted": True}
        for answer in (await http.get(path), await http.get(f"{path}/content"), await http.delete(path)):
            assert error(answer) == (404, "file_not_found", "file_id")
        # These are not ids of files.
        for address in (f"{FILES}/none", f"{FILES}/{'x' * 3000}", f"{FILES}/file-%FF", f"{FILES}/file-{'0' * 24}/content"):
            assert (await http.get(address)).status_code == 404
    assert await left(stack) == (2, 0, 2, 0)


async def test_lists(stack: Stack) -> None:
    acme = await stack.tenant()
    ids = [(await created(stack, acme, str(number).encode(), purpose="evals" if number % 2 else "batch"))["id"] for number in range(5)]
    async with stack.client(acme) as http:
        page = (await http.get(FILES)).json()
        assert [file["id"] for file in page["data"]] == ids[::-1]
        assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == ("list", ids[4], ids[0], False)
        page = (await http.get(FILES, params={"limit": 2, "order": "asc", "after": ids[1]})).json()
        assert ([file["id"] for file in page["data"]], page["has_more"]) == (ids[2:4], True)
        page = (await http.get(FILES, params={"purpose": "evals"})).json()
        assert [file["id"] for file in page["data"]] == [ids[3], ids[1]]
        assert (await http.get(FILES, params={"purpose": "fine-tune-results", "limit": 10_000})).json()["data"] == []
        for query in ({"limit": 0}, {"limit": 10_001}, {"limit": "x"}, {"order": "up"}, {"purpose": "assistants"}, {"after": "file-0"}):
            answer = await http.get(FILES, params=query)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(query)))


@pytest.mark.parametrize(
    ("fields", "code", "param", "words"),
    [
        (
            {"purpose": "assistants"},
            "invalid_purpose",
            "purpose",
            "'assistants' belongs to an API of OpenAI that this service lacks",
        ),
        ({"purpose": "vision"}, "invalid_purpose", "purpose", "'vision' belongs to an API"),
        ({"purpose": "batch_output"}, "invalid_purpose", "purpose", "written by the service itself"),
        ({"purpose": "fine-tune-results"}, "invalid_purpose", "purpose", "Use one of: batch, fine-tune, evals, user_data."),
        ({"purpose": "nonsense"}, "invalid_purpose", "purpose", "must be one of: batch, evals, fine-tune, user_data"),
        ({"purpose": ""}, "invalid_purpose", "purpose", "must be one of"),
        ({"expires_after[seconds]": "3600"}, "missing_parameter", "expires_after[anchor]", "is required with the other field"),
        ({"expires_after[anchor]": "created_at"}, "missing_parameter", "expires_after[seconds]", "is required with the other field"),
        ({"expires_after[anchor]": "now", "expires_after[seconds]": "3600"}, "out_of_range", "expires_after[anchor]", "created_at"),
        *(
            (
                {"expires_after[anchor]": "created_at", "expires_after[seconds]": seconds},
                code,
                "expires_after[seconds]",
                "3,600 to 2,592,000",
            )
            for seconds, code in (("3599", "out_of_range"), ("2592001", "out_of_range"), ("x", "invalid_type"), ("9" * 400, "out_of_range"))
        ),
        ({"model": "base"}, "unexpected_field", "model", "not known"),
    ],
)
async def test_fields_that_are_refused(stack: Stack, fields: dict[str, str], code: str, param: str, words: str) -> None:
    async with stack.client(await stack.tenant()) as http:
        answer = await http.post(FILES, data={"purpose": "batch"} | fields, files={"file": ("a", b"x")})
    assert error(answer) == (400, code, param)
    assert words in answer.json()["error"]["message"]
    assert await left(stack) == (0, 0, 0, 0)


async def test_a_form_without_a_purpose_or_a_file(stack: Stack) -> None:
    async with stack.client(await stack.tenant()) as http:
        assert error(await http.post(FILES, files={"file": ("a", b"x")})) == (400, "missing_parameter", "purpose")
        answer = await http.post(FILES, data={"purpose": "batch"}, files={"other": ("a", b"x")})
        assert error(answer) == (400, "unexpected_field", "other")
        assert error(await http.post(FILES, json={"purpose": "batch"})) == (400, "invalid_multipart", None)
    assert await left(stack) == (0, 0, 0, 0)


async def test_operators_do_not_see_files(stack: Stack, operator: httpx.AsyncClient) -> None:
    file = await created(stack, await stack.tenant())
    for method, path in (("GET", FILES), ("POST", FILES), ("GET", f"{FILES}/{file['id']}/content"), ("DELETE", f"{FILES}/{file['id']}")):
        assert (await operator.request(method, path)).status_code == 403


async def test_one_byte_more_than_a_file_may_have_leaves_nothing(stack: Stack) -> None:
    acme = await stack.tenant()
    async with stack.gateway(max_file_bytes=1_500_000) as gateway:
        assert (await send(stack, acme, b"x" * 1_500_000, url=gateway.url)).status_code == 200
        answer = await send(stack, acme, b"y" * 1_500_001, url=gateway.url)
        assert error(answer) == (413, "file_too_large", "file")
        assert answer.json()["error"]["message"] == "The file has more than 1,500,000 bytes, the maximum. Split it into several files."
        # With a declared length, and without one: a chunked body, and a compressed one.
        boundary = {"content-type": "multipart/form-data; boundary=b"}
        start = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        start += b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'

        async def pieces(count: int) -> AsyncIterator[bytes]:
            yield start
            for _ in range(count):
                yield b"z" * 100_000
            yield b"\r\n--b--\r\n"

        async with stack.client(acme, gateway.url) as http:
            try:
                refused = await http.post(FILES, content=pieces(40), headers=boundary)
                assert error(refused) == (413, "file_too_large", "file")
            except httpx.WriteError:
                pass  # the refusal came before the body was sent
            assert (await http.post(FILES, content=pieces(15), headers=boundary)).status_code == 200
            packed = gzip.compress(start + b"z" * 1_500_000 + b"\r\n--b--\r\n")
            assert (await http.post(FILES, content=packed, headers=boundary | {"content-encoding": "gzip"})).status_code == 200
            bomb = gzip.compress(start + b"z" * 50_000_000 + b"\r\n--b--\r\n")
            refused = await http.post(FILES, content=bomb, headers=boundary | {"content-encoding": "gzip"})
            assert error(refused) == (413, "file_too_large", "file")
    assert await left(stack) == (3, 0, 2, 0)


async def test_a_quota_refuses_before_the_body_is_read(stack: Stack, operator: httpx.AsyncClient) -> None:
    acme = await stack.tenant()
    assert (await operator.patch(f"/admin/v1/tenants/{acme.id}", json={"tier": "free"})).status_code == 200
    async with stack.db.begin(SYSTEM) as connection:
        fill = "INSERT INTO files (tenant_id, id, purpose, filename, size_bytes, sha256) VALUES (:tenant, 'f', 'batch', 'f', :size, 'f')"
        await connection.execute(text(fill), {"tenant": acme.id, "size": 5 * 1024**3 - 1_000_000})
    assert (await send(stack, acme, b"x" * 1_000_000)).status_code == 200
    answer = await send(stack, acme, b"y" * 2_000_000)
    assert error(answer) == (413, "file_quota_exceeded", None)
    message = answer.json()["error"]["message"]
    assert "5,368,709,120 bytes in all, and its tier 'free' allows 5,368,709,120" in message
    assert message.endswith("Delete files, or ask the operator for a higher tier.")
    assert answer.headers["x-should-retry"] == "false"
    assert (await left(stack))[1:] == (0, 1, 0)


def upload_head(tenant: Tenant, length: int) -> bytes:
    head = f"POST {FILES} HTTP/1.1\r\nhost: h\r\nauthorization: Bearer {tenant.key}\r\ncontent-length: {length}\r\n"
    head += "content-type: multipart/form-data; boundary=b\r\n\r\n"
    form = '--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    return (head + form).encode()


@asynccontextmanager
async def connected(stack: Stack) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Provide a connection to the gateway, and close it after the block."""
    address = httpx.URL(stack.url)
    reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def test_an_upload_that_breaks_off_leaves_nothing(stack: Stack) -> None:
    acme = await stack.tenant()
    drafts = stack.settings.home / "uploads"
    # The client disconnects in the middle of the upload.
    async with connected(stack) as (_, writer):
        writer.write(upload_head(acme, 10_000_000) + b"x" * 3_000_000)
        await writer.drain()
        await until(lambda: _open_files(drafts) == 1)
    await until(lambda: _open_files(drafts) == 0)
    # The client declares a shorter length than it sends, so the form is cut.
    async with connected(stack) as (reader, writer):
        writer.write(upload_head(acme, 1000) + b"x" * 3000)
        assert b" 200 " not in await reader.read()
    await until(lambda: _open_files(drafts) == 0)
    assert await left(stack) == (0, 0, 0, 0)


def _open_files(folder: Path) -> int:
    """Return the number of nameless files of a folder that this process has open."""
    found = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            found += descriptor.readlink().is_relative_to(folder)
        except OSError:
            continue
    return found


async def test_uploads_at_once_are_bounded(stack: Stack) -> None:
    acme, globex = await stack.tenant(), await stack.tenant()
    drafts = stack.settings.home / "uploads"
    async with AsyncExitStack() as connections:
        for _ in range(UPLOADS_AT_ONCE):
            _, writer = await connections.enter_async_context(connected(stack))
            writer.write(upload_head(acme, 10_000_000) + b"x" * 100_000)
            await writer.drain()
        await until(lambda: _open_files(drafts) == UPLOADS_AT_ONCE)
        answer = await send(stack, acme)
        assert error(answer) == (429, "too_many_uploads", None)
        assert answer.headers["retry-after"] == "5"
        assert (await send(stack, globex)).status_code == 200
    await until(lambda: _open_files(drafts) == 0)
    assert (await send(stack, acme)).status_code == 200


async def test_downloads_at_once_are_bounded(stack: Stack) -> None:
    acme, globex = await stack.tenant(), await stack.tenant()
    path = f"{FILES}/{(await created(stack, acme, b'x' * 8_000_000))['id']}/content"
    other = f"{FILES}/{(await created(stack, globex))['id']}/content"
    async with stack.client(acme) as http, stack.client(globex) as theirs:
        async with AsyncExitStack() as connections:
            readers = []
            for _ in range(DOWNLOADS_AT_ONCE):
                reader, writer = await connections.enter_async_context(connected(stack))
                writer.write(f"GET {path} HTTP/1.1\r\nhost: h\r\nauthorization: Bearer {acme.key}\r\n\r\n".encode())
                readers.append(reader)
            for reader in readers:
                assert b" 200 " in await reader.readline()
            assert error(await http.get(path)) == (429, "too_many_downloads", None)
            assert (await http.head(path)).status_code == 200
            assert (await theirs.get(other)).content == LINES

        async def works() -> bool:
            return (await http.get(path)).status_code == 200

        await until(works)


async def test_memory_stays_flat(stack: Stack) -> None:
    """Uploads and downloads of large files do not increase memory, even if a client hardly reads."""
    acme, size, process = await stack.tenant(), 200_000_000, psutil.Process()
    piece = os.urandom(1_000_000)

    async def pieces() -> AsyncIterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nuser_data\r\n'
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(size // len(piece)):
            yield piece
        yield b"\r\n--b--\r\n"

    async with stack.client(acme) as http:
        await created(stack, acme)  # modules that are loaded only once are loaded now
        before = process.memory_info().rss
        headers = {"content-type": "multipart/form-data; boundary=b"}
        file = (await http.post(FILES, content=pieces(), headers=headers)).json()
        assert file["bytes"] == size
        path, got = f"{FILES}/{file['id']}/content", 0
        async with connected(stack) as (_, slow):
            slow.write(f"GET {path} HTTP/1.1\r\nhost: h\r\nauthorization: Bearer {acme.key}\r\n\r\n".encode())
            async with http.stream("GET", path) as answer:
                assert answer.headers["content-length"] == str(size)
                async for part in answer.aiter_raw():
                    got += len(part)
            assert got == size
            assert process.memory_info().rss - before < 60_000_000


async def test_a_download_whose_object_is_away(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    acme = await stack.tenant()
    file = await created(stack, acme, b"x" * 3_000_000)
    path, reads, read = f"{FILES}/{file['id']}/content", 0, Objects.read

    async def failing(self: Objects, key: str, ranges: Any) -> list[bytes]:
        nonlocal reads
        reads += 1
        if reads in (1, 4):
            raise Unavailable("The object store cannot be read now. Retry after 10 s.", code="object_store_unavailable", retry_after_s=10)
        return await read(self, key, ranges)

    monkeypatch.setattr(Objects, "read", failing)
    async with stack.client(acme) as http:
        answer = await http.get(path)
        assert (answer.headers["retry-after"], error(answer)) == ("10", (503, "object_store_unavailable", None))
        with pytest.raises(httpx.RemoteProtocolError, match="peer closed connection"):
            await http.get(path)
        assert (await http.get(path)).content == b"x" * 3_000_000


async def test_a_download_that_its_client_leaves_is_not_read_on(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    acme, reads, read = await stack.tenant(), 0, Objects.read
    file = await created(stack, acme, b"x" * 40_000_000)

    async def counted(self: Objects, key: str, ranges: Any) -> list[bytes]:
        nonlocal reads
        reads += 1
        return await read(self, key, ranges)

    monkeypatch.setattr(Objects, "read", counted)
    async with stack.client(acme) as http:
        async with http.stream("GET", f"{FILES}/{file['id']}/content") as answer:
            await anext(answer.aiter_raw(1000))
        assert (await http.head(f"{FILES}/{file['id']}/content")).status_code == 200
        await http.get("/healthz")
    assert reads < 30


async def test_files_of_a_deleted_tenant_go_with_it(stack: Stack, operator: httpx.AsyncClient) -> None:
    acme, globex = await stack.tenant(), await stack.tenant()
    for content in (b"1", b"2"):
        await created(stack, acme, content)
    await created(stack, globex, b"1")
    assert (await operator.delete(f"/admin/v1/tenants/{acme.id}")).status_code == 200
    assert await left(stack) == (1, 0, 1, 0)
