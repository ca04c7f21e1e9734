"""Cancelling tasks that call redis-py."""

import asyncio
import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def unswallowed() -> Iterator[None]:
    """Raise a cancellation that the block swallowed: redis-py sends with asyncio.wait_for, which can do that on Python 3.11."""
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    try:
        yield
    finally:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError
