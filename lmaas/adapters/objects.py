"""The store of adapter files: a folder (`file://…`) or an S3-compatible bucket (`s3://…`), by URL."""

import asyncio
import contextlib
import shutil
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote, urlparse

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from lmaas.adapters.config import CONFIG_FILE
from lmaas.adapters.safetensors import MODEL_FILE
from lmaas.errors import SettingsError, Unavailable


def source_of(tenant_id: str, content_hash: str) -> str:
    """Return the place of a tenant's content in the store."""
    return f"adapters/{tenant_id}/{content_hash}"


class AdapterFiles:
    """The contents of adapters, each a config and a model file under one prefix. The config is written last and read first, so a model file
    is complete if there is a config."""

    def __init__(self, url: str) -> None:
        parsed = urlparse(url)
        try:
            self._root = Path(unquote(parsed.path)) if parsed.scheme == "file" else None
            if self._root is not None:
                self._store: ObjectStore = LocalStore(self._root, mkdir=True)
            else:
                self._store = from_url(url)
        except (BaseError, ValueError, OSError) as error:
            raise SettingsError(f"LMAAS_OBJECT_STORE_URL cannot be used: {error}") from error

    async def put(self, source: str, config: bytes, model: Path) -> None:
        """Store a content. Storing it again changes nothing. Raises Unavailable."""
        try:
            if not await self.exists(source):
                await obstore.put_async(self._store, f"{source}/{MODEL_FILE}", model)
                await obstore.put_async(self._store, f"{source}/{CONFIG_FILE}", config)
        except (BaseError, OSError) as error:
            raise Unavailable(
                "The adapter store did not accept the files. Retry after 10 s.", code="object_store_unavailable", retry_after_s=10
            ) from error

    async def exists(self, source: str) -> bool:
        """Return whether the complete content is stored."""
        try:
            # Both: a deletion that runs meanwhile takes the config first, and an upload may have stored it again before the model goes.
            for name in (CONFIG_FILE, MODEL_FILE):
                await obstore.head_async(self._store, f"{source}/{name}")
        except FileNotFoundError:
            return False
        return True

    async def fetch(self, source: str, folder: Path) -> None:
        """Copy a content into `folder`, completely or not at all. Raises FileNotFoundError, or OSError when the disk or the store fails."""
        partial = folder.with_name(folder.name + ".partial")
        await asyncio.to_thread(shutil.rmtree, partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            for name in (CONFIG_FILE, MODEL_FILE):
                found = await obstore.get_async(self._store, f"{source}/{name}")
                with (partial / name).open("wb") as file:
                    async for chunk in found.stream():
                        await asyncio.to_thread(file.write, chunk)
            partial.rename(folder)
        except BaseError as error:
            raise OSError(f"the adapter store failed: {error}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    async def delete(self, sources: Iterable[str]) -> None:
        """Delete contents, config first. A content that does not exist is not an error."""
        for source in sources:
            for name in (CONFIG_FILE, MODEL_FILE):
                try:
                    await obstore.delete_async(self._store, f"{source}/{name}")
                except FileNotFoundError:
                    continue
                except (BaseError, OSError) as error:
                    raise Unavailable(
                        "The adapter store did not delete the files. Retry after 10 s.", code="object_store_unavailable", retry_after_s=10
                    ) from error
            if self._root is not None:
                # A bucket has no folders; a disk keeps empty ones.
                with contextlib.suppress(OSError):
                    (self._root / source).rmdir()

    async def list_sources(self, tenant_id: str) -> list[str]:
        """Return every content of a tenant. Raises Unavailable."""
        prefix = f"adapters/{tenant_id}"
        found: set[str] = set()
        try:
            async for page in obstore.list(self._store, prefix=prefix):
                found |= {item["path"].rsplit("/", 1)[0] for item in page}
        except (BaseError, OSError) as error:
            raise Unavailable("The adapter store cannot be read now.", code="object_store_unavailable", retry_after_s=10) from error
        return sorted(found)
