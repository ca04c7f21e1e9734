"""Upload and deletion of adapters."""

import asyncio
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lmaas.adapters.base_weights import write_without
from lmaas.adapters.objects import AdapterFiles, source_of
from lmaas.adapters.validation import AdapterFacts, validate
from lmaas.audit import Audit
from lmaas.errors import InvalidRequest, NotFound
from lmaas.store import adapters as rows
from lmaas.store.database import Database
from lmaas.store.models import BaseModel, get_base_model, list_base_models
from lmaas.types import NAME_PATTERN


@dataclass(frozen=True, slots=True)
class Content:
    """The content of a valid upload, as it is stored. `model` is the file of weights to store, `content_hash` 64 hex digits."""

    facts: AdapterFacts
    config: bytes
    model: Path
    size_bytes: int
    content_hash: str


async def inspect(base: BaseModel, config: bytes, model: Path, base_folder: Callable[[str], Path | None]) -> Content:
    """Validate the files of an adapter for this base model and return the content to store.

    `model` is a local file in its own folder, where another one may be written beside it. `base_folder` finds a base model's files by its
    source. Raises InvalidRequest for a base model that takes no adapters, InvalidAdapter or TooLarge.
    """
    if not base.takes_adapters:
        # Its engines would load none, or ignore what they load.
        raise InvalidRequest(
            f"The base model '{base.name}' takes no adapters: with its architecture, engines would not compute what PEFT computes.",
            code="base_model_takes_no_adapters",
            param="base_model",
        )
    facts = await asyncio.to_thread(validate, config, model, base.shapes, lambda: base_folder(base.source))
    if facts.left_out:
        served = model.with_name(f"served-{model.name}")
        await asyncio.to_thread(write_without, model, facts.records, facts.left_out, served)
        model = served
    stored = json.dumps(facts.config, sort_keys=True, separators=(",", ":")).encode()
    size_bytes = (await asyncio.to_thread(model.stat)).st_size
    return Content(facts, stored, model, size_bytes, await asyncio.to_thread(_hash, stored, model))


class Adapters:
    """Uploads, activates and deletes tenants' adapters. Rows are in Postgres, files in the object store."""

    def __init__(self, db: Database, files: AdapterFiles) -> None:
        self._db = db
        self._files = files

    async def upload(
        self,
        tenant_id: str,
        name: str,
        base_model: str,
        config: bytes,
        model: Path,
        *,
        activate: bool,
        base_folder: Callable[[str], Path | None] = lambda _source: None,
        audit: Audit | None = None,
    ) -> rows.Uploaded:
        """Validate the files, store them and add a version.

        Content that was uploaded before under this name keeps its version. The other arguments are those of `inspect`. If anything fails,
        nothing is left behind. Raises InvalidAdapter, TooLarge, Conflict, NotFound (no such base model) or Unavailable.
        """
        if NAME_PATTERN.fullmatch(name) is None:
            raise InvalidRequest(
                "An adapter's name must have 1 to 63 lower-case letters, digits, '.', '_' or '-', the first and last a letter or digit.",
                code="invalid_name",
                param="name",
            )
        if any(name == existing.name for existing in await list_base_models(self._db)):
            # Checked again when the version is added. This check is before the work.
            raise rows.name_taken(name)
        base = await get_base_model(self._db, base_model)
        content = await inspect(base, config, model, base_folder)
        source = source_of(tenant_id, content.content_hash)
        try:
            await self._files.put(source, content.config, content.model)
            uploaded = await rows.add_version(
                self._db,
                tenant_id,
                name,
                base.id,
                content_hash=content.content_hash,
                rank=content.facts.rank,
                target_modules=list(content.facts.target_modules),
                size_bytes=content.size_bytes,
                activate=activate,
                validated=base,
                audit=audit,
            )
            # The last other adapter with this content may have been deleted between the two steps.
            await self._files.put(source, content.config, content.model)
        finally:
            # The version was not added, or it was deleted before its files were stored again.
            await self._delete_unused(tenant_id, [content.content_hash])
        return uploaded

    async def delete(self, tenant_id: str, name: str, *, audit: Audit | None = None) -> None:
        """Delete an adapter, its versions and their files. Requests that run on it finish.

        The rows go first. If the files cannot be deleted then, Unavailable is raised, and the same call deletes them later: while files of
        this tenant are left that no version has, an adapter that does not exist counts as deleted. Raises NotFound.
        """
        try:
            hashes = await rows.delete_adapter(self._db, tenant_id, name, audit=audit)
        except NotFound:
            left = [source.rsplit("/", 1)[-1] for source in await self._files.list_sources(tenant_id)]
            # An upload that is under way stores its files again, once its version is there.
            if not left or not await self._delete_unused(tenant_id, left):
                raise
        else:
            await self._delete_unused(tenant_id, hashes)

    async def _delete_unused(self, tenant_id: str, hashes: list[str]) -> list[str]:
        """Delete the contents that no version has, and return which."""
        async with rows.unused(self._db, tenant_id, hashes) as unused:
            await self._files.delete(source_of(tenant_id, content_hash) for content_hash in unused)
        return unused

    async def has_files(self, tenant_id: str) -> bool:
        """Return whether any files of a tenant are stored. Raises Unavailable."""
        return bool(await self._files.list_sources(tenant_id))

    async def delete_all(self, tenant_id: str) -> bool:
        """Delete every file of a deleted tenant. Returns whether there were any. Raises Unavailable."""
        sources = await self._files.list_sources(tenant_id)
        await self._files.delete(sources)
        return bool(sources)


def _hash(config: bytes, model: Path) -> str:
    digest = hashlib.sha256()
    digest.update(len(config).to_bytes(8, "big"))
    digest.update(config)
    with model.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
