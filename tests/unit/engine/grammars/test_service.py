"""The host that checks grammars ends when it is stopped."""

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest

from lmaas.config import Settings
from lmaas.engine.grammars.service import serve_checks
from lmaas.store.database import Database
from tests.support.conditions import until


class SwallowingRedis:
    """A client that imitates a defect of redis-py on Python 3.11: a cancelled call sometimes returns as if it had not been cancelled."""

    def __init__(self) -> None:
        self.asked = 0

    async def get(self, _: str) -> None:
        """Return when cancelled; later calls return at once."""
        self.asked += 1
        if self.asked == 1:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()

    async def set(self, *_: object, **__: object) -> None:
        """Do nothing."""


async def test_a_cancellation_that_the_client_library_swallows_ends_it(tmp_path: Path, no_database: Database) -> None:
    redis: Any = SwallowingRedis()
    task = asyncio.create_task(serve_checks(Settings(home=tmp_path, zygote="off"), no_database, redis))
    await until(lambda: redis.asked)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(20):
            await task
