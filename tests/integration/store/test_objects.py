"""The object store: a folder, and an S3-compatible bucket."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmaas.errors import SettingsError, Unavailable
from lmaas.store.objects import STREAM_BYTES, Objects
from tests.support import buckets

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with buckets.bucket() as url:
        yield url


@pytest.fixture(params=["file", "s3"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    """A store of each kind."""
    return Objects((tmp_path / "a folder").as_uri() if request.param == "file" else request.getfixturevalue("bucket"))


async def test_put_read_list_delete(objects: Objects, tmp_path: Path) -> None:
    # Large enough for an upload in parts.
    large = os.urandom(12_000_000)
    (tmp_path / "large").write_bytes(large)
    await objects.put("files/ten_1/large", tmp_path / "large")
    for content in (b"first", b"second", b""):
        await objects.put("files/ten_1/small", content)
        assert await objects.exists("files/ten_1/small")
        assert [piece async for piece in objects.stream("files/ten_1/small", len(content))] == ([content] if content else [])
    assert sorted(await objects.list("files/ten_1")) == ["files/ten_1/large", "files/ten_1/small"]
    assert await objects.list("files/ten_2") == []
    ranges = [(0, 1), (11_999_990, 10), (5, 0), (1_000_000, 3_000_000), (999_999, 2)]
    assert await objects.read("files/ten_1/large", ranges) == [large[offset : offset + length] for offset, length in ranges]
    pieces = [piece async for piece in objects.stream("files/ten_1/large", len(large))]
    assert (b"".join(pieces), max(map(len, pieces))) == (large, STREAM_BYTES)
    await objects.download("files/ten_1/large", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == large
    await objects.delete(["files/ten_1/small", "files/ten_1/large", "files/ten_1/none"])
    assert await objects.list("files") == []
    assert not await objects.exists("files/ten_1/small")


async def test_what_does_not_exist(objects: Objects, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await objects.read("none", [(0, 1)])
    with pytest.raises(FileNotFoundError):
        await objects.download("none", tmp_path / "copy")
    with pytest.raises(FileNotFoundError):
        [piece async for piece in objects.stream("none", 5)]
    assert not await objects.exists("none")


async def test_a_range_beyond_the_end(objects: Objects) -> None:
    await objects.put("short", b"12345")
    with pytest.raises(Unavailable):
        await objects.read("short", [(10, 5)])
    await objects.delete(["short"])


async def test_a_store_that_is_away(tmp_path: Path) -> None:
    objects = Objects((tmp_path / "store").as_uri())
    await objects.put("a/b", b"x")
    (tmp_path / "store" / "a" / "b").unlink()
    (tmp_path / "store" / "a").rmdir()
    (tmp_path / "store" / "a").write_text("in place of the folder")
    for call in (objects.put("a/b", b"x"), objects.delete(["a/b"]), objects.exists("a/b"), objects.read("a/b", [(0, 1)])):
        with pytest.raises(Unavailable) as raised:
            await call
        assert (raised.value.error_code, raised.value.retry_after_s) == ("object_store_unavailable", 10)


def test_a_store_that_cannot_be_is_a_wrong_setting() -> None:
    with pytest.raises(SettingsError):
        Objects("nonsense://x")
