"""OpenAI's library for Python: files."""

import asyncio
import io
from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.integration.clients.conftest import Service

LINES = b'{"custom_id": "1"}\n{"custom_id": "2"}\n'


@pytest.fixture
async def client(environment: Service) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(max_retries=0) as client:
        yield client


async def test_a_file_is_uploaded_read_and_deleted(client: AsyncOpenAI, tmp_path: Path) -> None:
    path = tmp_path / "größe.jsonl"
    path.write_bytes(LINES)
    file = await client.files.create(file=path, purpose="batch", expires_after={"anchor": "created_at", "seconds": 7200})
    assert (file.bytes, file.filename, file.purpose, file.status, file.object) == (len(LINES), path.name, "batch", "processed", "file")
    assert file.expires_at == file.created_at + 7200
    assert await client.files.retrieve(file.id) == file
    assert (await client.files.wait_for_processing(file.id)).id == file.id
    content = await client.files.content(file.id)
    assert (content.content, content.text) == (LINES, LINES.decode())
    async with client.files.with_streaming_response.content(file.id) as streamed:
        await streamed.stream_to_file(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == LINES
    assert (await client.files.delete(file.id)).model_dump() == {"id": file.id, "object": "file", "deleted": True}
    for call in (client.files.retrieve(file.id), client.files.content(file.id), client.files.delete(file.id)):
        with pytest.raises(openai.NotFoundError) as raised:
            await call
        assert raised.value.code == "file_not_found"


async def test_whatever_the_library_takes_for_a_file(client: AsyncOpenAI) -> None:
    several = (LINES, io.BytesIO(LINES), ("named.jsonl", LINES), ("named.jsonl", io.BytesIO(LINES), "application/jsonl"))
    files = [await client.files.create(file=file, purpose="user_data") for file in several]
    assert {file.bytes for file in files} == {len(LINES)}
    assert {file.expires_at for file in files} == {None}
    assert files[-1].filename == "named.jsonl"
    # Page by page, newest first.
    found = [file.id async for file in client.files.list(purpose="user_data", limit=3)]
    assert found[:4] == [file.id for file in reversed(files)]
    first = await client.files.list(order="asc", limit=1)
    assert first.has_next_page()
    for file in files:
        await client.files.delete(file.id)


async def test_without_asyncio(environment: Service) -> None:
    def run() -> None:
        with OpenAI() as client:
            file = client.files.create(file=("a.jsonl", LINES), purpose="fine-tune")
            assert client.files.content(file.id).read() == LINES
            assert file.id in [each.id for each in client.files.list()]
            client.files.delete(file.id)

    await asyncio.to_thread(run)


async def test_what_is_refused(client: AsyncOpenAI) -> None:
    for purpose in ("assistants", "vision"):
        with pytest.raises(openai.BadRequestError, match=f"'{purpose}' belongs to an API of OpenAI") as refused:
            await client.files.create(file=("a", LINES), purpose=purpose)
        assert (refused.value.code, refused.value.param) == ("invalid_purpose", "purpose")
    with pytest.raises(openai.BadRequestError, match="3,600 to 2,592,000"):
        await client.files.create(file=("a", LINES), purpose="batch", expires_after={"anchor": "created_at", "seconds": 60})
    with pytest.raises(openai.BadRequestError, match="'after'"):
        await client.files.list(after="file-none")
