"""The object store: a folder (`file://…`) or an S3-compatible bucket (`s3://…`), by URL. It keeps bytes by keys."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from urllib.parse import unquote, urlparse

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from lmaas.errors import SettingsError, Unavailable

#: Puts that run at once, and what one of them holds in memory at most: parts of PART_BYTES, two at a time.
PUTS_AT_ONCE = 8
PART_BYTES = 5 * 1024 * 1024
#: Deletions that run at once.
DELETES_AT_ONCE = 16
#: The bytes that a stream reads at once.
STREAM_BYTES = 1024 * 1024
#: In a folder, a put writes beside its object, under the object's name, `#` and the first free number. What is older than this belongs to
#: a process that died.
STAGING_S = 600.0
STAGING_NUMBERS = range(1, 9)


class Objects:
    """Bytes by key. An object is complete or does not exist: a put that fails or dies leaves nothing that can be read."""

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
        self._puts = asyncio.Semaphore(PUTS_AT_ONCE)

    async def put(self, key: str, content: bytes | Path) -> None:
        """Store bytes, or those of a local file, in place of any earlier ones. Raises Unavailable."""
        try:
            async with self._puts:
                await obstore.put_async(self._store, key, content, chunk_size=PART_BYTES, max_concurrency=2)
        except (BaseError, OSError) as error:
            raise _unavailable("The object store did not accept the file. Retry after 10 s.") from error

    async def exists(self, key: str) -> bool:
        """Return whether there is an object with this key. Raises Unavailable."""
        try:
            await obstore.head_async(self._store, key)
        except FileNotFoundError:
            return False
        except (BaseError, OSError) as error:
            raise _unavailable("The object store does not respond. Retry after 10 s.") from error
        return True

    async def read(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of these ranges, each an offset and a length. Ranges that lie close together are fetched together.

        Raises FileNotFoundError if there is no such object, and Unavailable.
        """
        wanted = [(offset, length) for offset, length in ranges if length > 0]
        if not wanted:
            return [b""] * len(ranges)
        offsets, lengths = zip(*wanted, strict=True)
        try:
            found = await obstore.get_ranges_async(self._store, key, starts=list(offsets), lengths=list(lengths))
        except FileNotFoundError:
            raise
        except (BaseError, OSError) as error:
            raise _unavailable("The object store cannot be read now. Retry after 10 s.") from error
        pieces = iter(found)
        return [next(pieces).to_bytes() if length > 0 else b"" for _, length in ranges]

    async def stream(self, key: str, size_bytes: int) -> AsyncIterator[bytes]:
        """Provide the bytes of an object of this size, in pieces of at most STREAM_BYTES.

        Each piece is fetched when it is needed, so that a slow receiver neither fills the memory nor holds a connection to the store.
        Raises as `read`.
        """
        for offset in range(0, size_bytes, STREAM_BYTES):
            [piece] = await self.read(key, [(offset, min(STREAM_BYTES, size_bytes - offset))])
            yield piece

    async def download(self, key: str, path: Path) -> None:
        """Write the bytes of an object to a new local file. Raises FileNotFoundError if there is no such object, OSError if the disk fails,
        and Unavailable."""
        try:
            found = await obstore.get_async(self._store, key)
            with path.open("wb") as file:
                async for chunk in found.stream(min_chunk_size=PART_BYTES):
                    await asyncio.to_thread(file.write, chunk)
        except BaseError as error:
            raise _unavailable("The object store cannot be read now. Retry after 10 s.") from error

    async def delete(self, keys: Iterable[str]) -> None:
        """Delete objects, in no particular order, and what puts of them by processes that died have left in a folder.

        A key without an object is not an error. No deletion goes on after this has returned or raised. Raises Unavailable.
        """
        several = asyncio.Semaphore(DELETES_AT_ONCE)

        async def delete(key: str) -> None:
            async with several:
                try:
                    await obstore.delete_async(self._store, key)
                except FileNotFoundError:
                    pass
                except (BaseError, OSError) as error:
                    raise _unavailable("The object store did not delete the files. Retry after 10 s.") from error
                if self._root is not None:
                    await asyncio.to_thread(self._tidy, self._root / key)

        for failure in await asyncio.gather(*(delete(key) for key in keys), return_exceptions=True):
            if failure is not None:
                raise failure

    def _tidy(self, path: Path) -> None:
        """Remove what dead puts have left, and a folder that is empty now: a bucket has no folders."""
        for number in STAGING_NUMBERS:
            staged = path.with_name(f"{path.name}#{number}")
            with contextlib.suppress(OSError):
                if time.time() - staged.stat().st_mtime > STAGING_S:
                    staged.unlink()
        with contextlib.suppress(OSError):
            path.parent.rmdir()

    async def list(self, prefix: str) -> list[str]:
        """Return the keys below a prefix. Raises Unavailable."""
        found: list[str] = []
        try:
            async for page in obstore.list(self._store, prefix=prefix):
                found += [item["path"] for item in page]
        except (BaseError, OSError) as error:
            raise _unavailable("The object store cannot be read now. Retry after 10 s.") from error
        return found


def _unavailable(message: str) -> Unavailable:
    return Unavailable(message, code="object_store_unavailable", retry_after_s=10)
