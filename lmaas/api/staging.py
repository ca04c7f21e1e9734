"""Folders for uploads that are checked on the disk, and what gateways that died have left of them."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: A younger folder may not be locked yet by the upload that has just created it.
MIN_AGE_S = 60.0


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Provide a new folder in `folder`, locked by this process, which is removed after the block."""
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=folder))
    descriptor = os.open(staging, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(descriptor)


def sweep(folder: Path) -> int:
    """Remove what no process has locked, and return the number of folders. Several gateways may share the folder."""
    removed = 0
    for staging in folder.iterdir() if folder.is_dir() else ():
        with suppress(OSError):
            if time.time() - staging.stat().st_mtime < MIN_AGE_S:
                continue
            descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
            try:
                # The end of a process ends its locks.
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(staging)
                removed += 1
            finally:
                os.close(descriptor)
    return removed
