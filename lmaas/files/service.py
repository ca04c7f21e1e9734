"""Files of tenants: uploads, and what the service writes itself. Rows are in Postgres, bytes in the object store."""

import asyncio
import logging
import re
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from lmaas.audit import Audit
from lmaas.errors import Unavailable
from lmaas.files.drafts import Draft, draft
from lmaas.files.slots import Slots
from lmaas.store import files as rows
from lmaas.store.database import Database
from lmaas.store.files import Check, File, NewFile, Within, not_found
from lmaas.store.objects import Objects
from lmaas.store.scopes import OPERATOR, SYSTEM, AnyScope
from lmaas.types import Quota

log = logging.getLogger(__name__)

#: The number of attempts to store a content that a deletion has removed before its file was added.
TRIES = 3
#: The uploads of a tenant that a process reads at the same time.
UPLOADS_AT_ONCE = 16
#: The downloads of a tenant that a process sends at the same time. A slow one takes about 2 MiB.
DOWNLOADS_AT_ONCE = 32
#: Of a process: additions and settlements that hold a connection to the database at the same time, and settlements that wait or run.
ADDITIONS_AT_ONCE, SETTLEMENTS_AT_ONCE, SETTLING_AT_ONCE = 2, 2, 64
#: The time for which a request waits for the deletion of bytes.
SETTLE_S = 5.0
#: The time in which the object store must report whether it has a content, while others wait for the lock of the content.
LOOK_S = 10.0
_ID = re.compile(r"file-[0-9a-f]{24}")


class Purpose(StrEnum):
    """The purpose of a file, in OpenAI's words."""

    BATCH = "batch"
    FINE_TUNE = "fine-tune"
    EVALS = "evals"
    USER_DATA = "user_data"
    #: Files that the service writes itself.
    BATCH_OUTPUT = "batch_output"
    FINE_TUNE_RESULTS = "fine-tune-results"


#: The purposes of uploads.
UPLOADED = (Purpose.BATCH, Purpose.FINE_TUNE, Purpose.EVALS, Purpose.USER_DATA)


@dataclass(frozen=True, slots=True)
class Written:
    """A file to add whose content is complete in a draft. Without `expires_after_s` it is kept until it is deleted."""

    purpose: Purpose
    filename: str
    draft: Draft
    expires_after_s: int | None = None


class Files:
    """Adds, reads and deletes files. Its methods work with the rights of a gateway and of a job runner; `delete_all` is for operators and
    `sweep` for controllers.

    Drafts are in `folder`. A file has at most `max_bytes`. `quota_of` returns what a tenant of a tier may upload.
    """

    def __init__(self, db: Database, objects: Objects, folder: Path, max_bytes: int, quota_of: Callable[[str], Quota]) -> None:
        self._db, self._objects, self._folder = db, objects, folder
        self.max_bytes, self._quota_of = max_bytes, quota_of
        self._uploads = Slots(UPLOADS_AT_ONCE, "uploads", "too_many_uploads")
        self._downloads = Slots(DOWNLOADS_AT_ONCE, "downloads", "too_many_downloads")
        #: Each holds a connection to the database while it waits for the object store.
        self._additions, self._settlements = asyncio.Semaphore(ADDITIONS_AT_ONCE), asyncio.Semaphore(SETTLEMENTS_AT_ONCE)
        self._settling: set[asyncio.Task[bool]] = set()

    @asynccontextmanager
    async def uploading(self, tenant_id: str) -> AsyncIterator[Draft]:
        """Provide a draft for a tenant's upload. Raises OverLimit if the tenant has too many uploads at once, whose drafts would fill the
        disk that all tenants share."""
        with self._uploads.one(tenant_id):
            async with self.draft() as content:
                yield content

    def downloading(self, tenant_id: str) -> AbstractContextManager[None]:
        """Count a download for the block. Raises OverLimit if the tenant has too many at once, each of which takes memory."""
        return self._downloads.one(tenant_id)

    def draft(self, max_bytes: int | None = None) -> AbstractAsyncContextManager[Draft]:
        """Provide a draft for the block; an upload's, unless it may have another number of bytes."""
        return draft(self._folder, self.max_bytes if max_bytes is None else max_bytes)

    async def add(
        self, tenant_id: str, purpose: Purpose, filename: str, chunks: AsyncIterable[bytes], expires_after_s: int | None = None
    ) -> File:
        """Add a file that the service writes itself. It counts for the tenant's quota, but is never refused for it.

        If anything fails, nothing is left behind. Raises TooLarge, NotFound for a tenant that is deleted, and Unavailable.
        """
        async with self.draft() as content:
            async for chunk in chunks:
                await content.write(chunk)
            [file] = await self.add_written(tenant_id, [Written(purpose, filename, content, expires_after_s)])
        return file

    async def upload(self, tenant_id: str, written: Written, *, audit: Audit | None = None, within: Within | None = None) -> File:
        """Add a file that a tenant uploads. Raises as `add`, TooLarge `file_quota_exceeded`, and what `within` raises, as `add_written`."""
        quota = self._quota_of(await rows.tier_of(self._db, tenant_id))
        [file] = await self._add(tenant_id, [written], quota, audit, within)
        return file

    async def add_written(self, tenant_id: str, written: Sequence[Written], within: Within | None = None) -> list[File]:
        """Add files that the service writes itself, in one transaction, in which `within` runs when the rows are there: all of it holds, or
        none. Raises as `add`, and what `within` raises."""
        return await self._add(tenant_id, written, None, None, within)

    async def _add(
        self, tenant_id: str, written: Sequence[Written], quota: Quota | None, audit: Audit | None, within: Within | None
    ) -> list[File]:
        if not written:
            raise ValueError("there is no file to add")
        hashes = [await each.draft.finish() for each in written]
        contents = {sha256: each.draft.path for sha256, each in zip(hashes, written, strict=True)}
        new = [
            NewFile(each.purpose, each.filename, each.draft.size_bytes, sha256, each.expires_after_s)
            for each, sha256 in zip(written, hashes, strict=True)
        ]
        checks = await rows.expect_contents(self._db, tenant_id, contents.keys())
        try:
            for _ in range(TRIES):
                for sha256, path in contents.items():
                    key = rows.key_of(tenant_id, sha256)
                    if not await self._objects.exists(key):
                        await self._objects.put(key, path)
                async with self._additions, rows.adding(self._db, checks) as connection:
                    # The last other file with a content may have been deleted since it was found there.
                    if await self._are_stored(checks):
                        files = await rows.add_files(connection, checks, new, quota, audit)
                        if within is not None:
                            await within(connection, files)
                        return files
        except Exception:
            await self._settle_now(tenant_id, checks)
            raise
        await self._settle_now(tenant_id, checks)
        raise Unavailable(
            "The content of the file was deleted again and again while it was stored. Retry after 1 s.",
            code="file_contended",
            retry_after_s=1,
        )

    async def _are_stored(self, checks: Sequence[Check]) -> bool:
        try:
            async with asyncio.timeout(LOOK_S):
                return all([await self._objects.exists(rows.key_of(*check.content)) for check in checks])
        except TimeoutError:
            raise Unavailable(
                "The object store does not respond. Retry after 10 s.", code="object_store_unavailable", retry_after_s=10
            ) from None

    async def check_room(self, tenant_id: str, size_bytes: int) -> None:
        """Raise TooLarge if a file of this size would exceed the tenant's quota now, before its bytes are read."""
        await rows.check_room(self._db, tenant_id, self._quota_of(await rows.tier_of(self._db, tenant_id)), size_bytes)

    async def get(self, tenant_id: str, file_id: str) -> File:
        """Return a file of this tenant. Raises NotFound, also for one that has expired."""
        file = await rows.find_file(self._db, tenant_id, file_id) if _ID.fullmatch(file_id) else None
        if file is None:
            raise not_found()
        return file

    async def read(self, file: File, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return these ranges of a file, each an offset and a length. Ranges that lie close together are fetched together, so they should
        not have more bytes in all than the memory has room for.

        Raises NotFound if the file was deleted meanwhile, and Unavailable.
        """
        try:
            return await self._objects.read(file.key, ranges)
        except FileNotFoundError:
            raise not_found() from None

    async def stream(self, file: File) -> AsyncIterator[bytes]:
        """Provide the content of a file in pieces, each of which is fetched when it is needed. Raises as `read`."""
        try:
            async for piece in self._objects.stream(file.key, file.size_bytes):
                yield piece
        except FileNotFoundError:
            raise not_found() from None

    async def delete(self, tenant_id: str, file_id: str, *, audit: Audit | None = None) -> None:
        """Delete a file of this tenant. Its bytes go with the last file that has them, later if the store is away. Raises NotFound."""
        if not _ID.fullmatch(file_id):
            raise not_found()
        await self._settle_now(tenant_id, await rows.delete_file(self._db, tenant_id, file_id, audit=audit))

    async def delete_all(self, tenant_id: str) -> None:
        """Delete the files of a deleted tenant and their bytes, for an operator. What cannot be deleted now goes later."""
        while await rows.delete_expired(self._db, tenant_id):
            pass
        while checks := await rows.due_checks(self._db, tenant_id):
            if not await self._settle_now(OPERATOR, checks):
                return

    async def sweep(self) -> int:
        """Delete some expired files, and some contents that no file has, for a controller. Returns how many it has worked on: none if
        nothing is left. Raises Unavailable."""
        expired = await rows.delete_expired(self._db)
        checks = await rows.due_checks(self._db)
        try:
            await self._settle(SYSTEM, checks)
        except Unavailable:
            await rows.postpone(self._db, checks)
            raise
        return expired + len(checks)

    async def stored(self) -> tuple[int, int]:
        """Return the number of all files and their bytes, for a controller. It reads every row."""
        return await rows.stored_files(self._db)

    async def _settle(self, scope: AnyScope, checks: Sequence[Check]) -> None:
        """Delete those contents that no file has. Raises Unavailable."""
        if checks:
            async with self._settlements, rows.unused(self._db, scope, checks) as keys:
                await self._objects.delete(keys)

    async def _settle_now(self, scope: AnyScope, checks: Sequence[Check]) -> bool:
        """Settle checks, and return whether that is done after SETTLE_S. If not, it goes on, because a deletion that has been sent to the
        object store must not come after the end of its lock. A controller settles what fails, or is too much."""
        if len(self._settling) >= SETTLING_AT_ONCE:
            return False
        task = asyncio.create_task(self._try_to_settle(scope, checks), name="settle-contents")
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)
        await asyncio.wait([task], timeout=SETTLE_S)
        return task.done() and task.result()

    async def _try_to_settle(self, scope: AnyScope, checks: Sequence[Check]) -> bool:
        try:
            await self._settle(scope, checks)
        except Unavailable as error:
            log.warning("contents of files cannot be deleted now", extra={"action": "sweep", "detail": error.message})
            return False
        return True
