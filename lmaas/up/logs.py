"""Bounds the logs of a stack's processes."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

#: The size at which a log is moved aside.
MAX_BYTES = 64 * 1024 * 1024


def trim(folder: Path, max_bytes: int = MAX_BYTES) -> None:
    """Move the contents of each log in this folder that is larger than `max_bytes` to a file with the suffix `.1`, which replaces the one
    before.

    Processes keep their logs open and append to them, so the files themselves stay. Lines that arrive between the copy and the truncation
    are lost. If there is no room for the copy, the contents are dropped.
    """
    for log in folder.glob("*.log"):
        with suppress(FileNotFoundError):
            if log.stat().st_size > max_bytes:
                older = log.with_suffix(".log.1")
                try:
                    shutil.copyfile(log, older)
                except OSError:
                    older.unlink(missing_ok=True)
                os.truncate(log, 0)
