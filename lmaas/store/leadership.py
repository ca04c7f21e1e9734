"""One active controller: a lock that Postgres gives back when its holder's connection ends."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from lmaas.errors import Unavailable
from lmaas.store.database import Database

LOCK = 0x6C6D6162
CHECK_S = 2.0


class LostLead(Exception):
    """The connection that held the lock is gone: another controller may be active now."""


class Lead:
    """Being the active controller."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def lost(self) -> None:
        """Returns never; raises LostLead once the lock's connection is gone."""
        while True:
            await asyncio.sleep(CHECK_S)
            try:
                await self._connection.execute(text("SELECT 1"))
            except SQLAlchemyError as error:
                raise LostLead("the database connection that held the controller's lock is gone") from error


@asynccontextmanager
async def leading(db: Database) -> AsyncIterator[Lead]:
    """Wait for the lock, and hold it for the block."""
    async with AsyncExitStack() as stack:
        while True:
            with suppress(Unavailable):
                connection = await stack.enter_async_context(db.autocommit())
                if (await connection.execute(text("SELECT pg_try_advisory_lock(:lock)"), {"lock": LOCK})).scalar_one():
                    break
                await stack.aclose()
            await asyncio.sleep(CHECK_S)
        try:
            yield Lead(connection)
        finally:
            # The lock goes with its session, whatever state that is in.
            with suppress(SQLAlchemyError):
                await connection.invalidate()
