"""The contents of adapters in the object store."""

import asyncio
import shutil
from collections.abc import Iterable
from pathlib import Path

from lmaas.adapters.config import CONFIG_FILE
from lmaas.adapters.safetensors import MODEL_FILE
from lmaas.errors import Unavailable
from lmaas.store.objects import Objects


def source_of(tenant_id: str, content_hash: str) -> str:
    """Return the place of a tenant's content in the store."""
    return f"adapters/{tenant_id}/{content_hash}"


class AdapterFiles:
    """The contents of adapters, each a config and a model file under one prefix. The config is written last and read first, so a model file
    is complete if there is a config."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    async def put(self, source: str, config: bytes, model: Path) -> None:
        """Store a content. Storing it again changes nothing. Raises Unavailable."""
        if not await self.exists(source):
            await self._objects.put(f"{source}/{MODEL_FILE}", model)
            await self._objects.put(f"{source}/{CONFIG_FILE}", config)

    async def exists(self, source: str) -> bool:
        """Return whether the complete content is stored. Raises Unavailable."""
        # Both: a deletion that runs meanwhile takes the config first, and an upload may have stored it again before the model goes.
        return await self._objects.exists(f"{source}/{CONFIG_FILE}") and await self._objects.exists(f"{source}/{MODEL_FILE}")

    async def fetch(self, source: str, folder: Path) -> None:
        """Copy a content into `folder`, completely or not at all. Raises FileNotFoundError, or OSError when the disk or the store fails."""
        partial = folder.with_name(folder.name + ".partial")
        await asyncio.to_thread(shutil.rmtree, partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            for name in (CONFIG_FILE, MODEL_FILE):
                await self._objects.download(f"{source}/{name}", partial / name)
            partial.rename(folder)
        except Unavailable as error:
            raise OSError(f"the object store failed: {error.__cause__}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    async def delete(self, sources: Iterable[str]) -> None:
        """Delete contents, config first. A content that does not exist is not an error. Raises Unavailable."""
        for source in sources:
            for name in (CONFIG_FILE, MODEL_FILE):
                await self._objects.delete([f"{source}/{name}"])

    async def list_sources(self, tenant_id: str) -> list[str]:
        """Return every content of a tenant. Raises Unavailable."""
        return sorted({key.rsplit("/", 1)[0] for key in await self._objects.list(f"adapters/{tenant_id}")})
