"""Bytes that arrive for a new file: counted, hashed, and written to a temporary file on the disk."""

import asyncio
import errno
import hashlib
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO

from lmaas.errors import TooLarge, Unavailable

#: The bytes that are gathered in memory before they are hashed and written.
WRITE_BYTES = 1024 * 1024


def too_large(max_bytes: int) -> TooLarge:
    """Return the error for a file with more bytes than a file may have."""
    words = f"The file has more than {max_bytes:,} bytes, the maximum. Split it into several files."
    return TooLarge(words, code="file_too_large", param="file")


class Draft:
    """The content of a file that is being written. Its temporary file has no name, so it goes with this process."""

    def __init__(self, file: BinaryIO, max_bytes: int) -> None:
        self._file, self._max_bytes = file, max_bytes
        self._gathered: list[bytes] = []
        self._gathered_bytes = 0
        self._digest = hashlib.sha256()
        self.size_bytes = 0

    async def write(self, chunk: bytes) -> None:
        """Append bytes. Raises TooLarge beyond the bytes that a file may have, and Unavailable if the disk is full."""
        self.size_bytes += len(chunk)
        if self.size_bytes > self._max_bytes:
            raise too_large(self._max_bytes)
        self._gathered.append(chunk)
        self._gathered_bytes += len(chunk)
        if self._gathered_bytes >= WRITE_BYTES:
            await self._flush()

    async def finish(self) -> str:
        """Write what is left, and return the SHA-256 of the content in hex. Raises Unavailable if the disk is full."""
        await self._flush()
        return self._digest.hexdigest()

    @property
    def path(self) -> Path:
        """A path by which this process, and no other, can read the content once it is finished."""
        return Path(f"/dev/fd/{self._file.fileno()}")

    async def _flush(self) -> None:
        gathered, self._gathered, self._gathered_bytes = b"".join(self._gathered), [], 0
        try:
            await asyncio.to_thread(self._append, gathered)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise Unavailable("The disk for uploads is full. Retry later.", code="disk_full", retry_after_s=60) from error

    def _append(self, content: bytes) -> None:
        self._digest.update(content)
        left = memoryview(content)
        while left:
            left = left[self._file.write(left) :]


@asynccontextmanager
async def draft(folder: Path, max_bytes: int) -> AsyncIterator[Draft]:
    """Provide a draft in a folder, which is created if need be. It is gone after the block."""
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        yield Draft(file, max_bytes)
