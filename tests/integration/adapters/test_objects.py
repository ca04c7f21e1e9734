"""The store of adapter files: a folder, and an S3-compatible bucket."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmaas.adapters.config import CONFIG_FILE
from lmaas.adapters.objects import AdapterFiles, source_of
from lmaas.adapters.safetensors import MODEL_FILE
from lmaas.store.objects import Objects
from tests.support import buckets

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with buckets.bucket() as url:
        yield url


@pytest.fixture(params=["file", "s3"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> AdapterFiles:
    """A store of each kind."""
    return AdapterFiles(Objects((tmp_path / "a folder").as_uri() if request.param == "file" else request.getfixturevalue("bucket")))


async def test_put_fetch_list_delete(files: AdapterFiles, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.write_bytes(os.urandom(3_000_000))
    first, second = source_of("ten_1", "aa"), source_of("ten_1", "bb")
    for source in (first, second, first):
        await files.put(source, b"{}", model)
    assert await files.exists(first)
    assert await files.list_sources("ten_1") == [first, second]
    assert await files.list_sources("ten_2") == []
    await files.fetch(first, tmp_path / "copy")
    assert (tmp_path / "copy" / MODEL_FILE).read_bytes() == model.read_bytes()
    assert (tmp_path / "copy" / CONFIG_FILE).read_bytes() == b"{}"
    await files.delete([first, first])
    assert not await files.exists(first)
    assert await files.list_sources("ten_1") == [second]
    await files.delete([second])


async def test_what_is_not_there_is_not_half_there(files: AdapterFiles, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await files.fetch(source_of("ten_1", "none"), tmp_path / "copy")
    assert [name for name in os.listdir(tmp_path) if name.startswith("copy")] == []


@pytest.mark.parametrize("left", [CONFIG_FILE, MODEL_FILE])
async def test_half_a_content_is_stored_again(tmp_path: Path, left: str) -> None:
    """A content of which only one file is left is stored again. A simultaneous deletion and upload may leave it that way."""
    model = tmp_path / "model"
    model.write_bytes(b"weights")
    files, source = AdapterFiles(Objects((tmp_path / "store").as_uri())), source_of("ten_1", "aa")
    await files.put(source, b"{}", model)
    (tmp_path / "store" / source / ({CONFIG_FILE, MODEL_FILE} - {left}).pop()).unlink()
    assert not await files.exists(source)
    await files.put(source, b"{}", model)
    await files.fetch(source, tmp_path / "copy")
    assert (tmp_path / "copy" / MODEL_FILE).read_bytes() == b"weights"
