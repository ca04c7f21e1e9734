"""The election of one active controller, by a lock that Postgres releases when its holder's session ends.

The active controller writes through that session, so a write after the loss of the lock fails, however long the process was paused in
between. A holder whose session is silent counts as stuck: a standby controller ends that session and takes over.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import psycopg
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from lmaas.errors import Unavailable
from lmaas.store.database import Database
from lmaas.store.scopes import SYSTEM, AnyScope

log = logging.getLogger(__name__)

LOCK = 0x6C6D6162
CHECK_S = 2.0
#: The time of silence after which a holder's session counts as stuck.
SILENT_S = 15.0

#: Postgres splits a 64-bit key into two fields. The database is compared too, because locks of other databases on the server are separate.
_END_SILENT_HOLDER = text(
    """
    SELECT pg_terminate_backend(holder.pid) FROM pg_locks AS held JOIN pg_stat_activity AS holder USING (pid)
    WHERE held.locktype = 'advisory' AND held.granted AND held.classid = 0 AND held.objid = :lock AND held.objsubid = 1
      AND held.database = (SELECT oid FROM pg_database WHERE datname = current_database())
      AND holder.state_change < clock_timestamp() - make_interval(secs => :silent_s)
    """
)


class LostLead(Exception):
    """The session that held the lock has ended, so another controller may be active."""


class Lead:
    """The role of active controller, with the connection for what only the active controller may write."""

    def __init__(self, db: Database, connection: AsyncConnection) -> None:
        self._db, self._connection = db, connection
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def begin(self, scope: AnyScope) -> AsyncIterator[AsyncConnection]:
        """Provide a transaction on the connection that holds the lock. Raises LostLead if the lock is lost; nothing has been written then.

        The only scope is SYSTEM, because the active controller's writes belong to no tenant.
        """
        if scope is not SYSTEM:
            raise ValueError(f"The controller's own connection writes in the scope SYSTEM only, not {scope!r}.")
        async with self._turn:
            if self._connection.invalidated:
                # SQLAlchemy would open a new connection, which does not hold the lock.
                raise LostLead("the database session that held the controller's lock is gone")
            try:
                await self._db.start(self._connection, scope)
                async with self._connection.begin():
                    yield self._connection
            except (DBAPIError, psycopg.OperationalError, psycopg.InterfaceError) as error:
                if isinstance(error, DBAPIError) and not _is_lost(error):
                    raise
                await self._connection.invalidate()
                raise LostLead("the database session that held the controller's lock was cut") from error

    async def check(self) -> None:
        """Raise LostLead if this process has lost the lock."""
        async with self.begin(SYSTEM) as connection:
            await connection.execute(text("SELECT 1"))

    async def lost(self) -> None:
        """Raise LostLead once the lock's session has ended. Until then, keep the session active, so that other controllers do not end
        it."""
        while True:
            await asyncio.sleep(CHECK_S)
            await self.check()


def _is_lost(error: DBAPIError) -> bool:
    return error.connection_invalidated or isinstance(error, OperationalError | InterfaceError)


@asynccontextmanager
async def leading(db: Database, *, check_s: float = CHECK_S, silent_s: float = SILENT_S) -> AsyncIterator[Lead]:
    """Wait for the lock, and hold it for the block."""
    async with AsyncExitStack() as stack:
        while True:
            with suppress(Unavailable):
                connection = await stack.enter_async_context(db.autocommit())
                try:
                    if (await connection.execute(text("SELECT pg_try_advisory_lock(:lock)"), {"lock": LOCK})).scalar_one():
                        await connection.commit()
                        break
                    if (await connection.execute(_END_SILENT_HOLDER, {"lock": LOCK, "silent_s": silent_s})).first():
                        log.warning("the active controller has been silent; it is deposed", extra={"action": "lead"})
                except DBAPIError as error:
                    # Postgres became unavailable, or does not allow ending the session. Try again.
                    log.warning("the controller's lock cannot be had", extra={"action": "lead", "detail": str(error.orig)})
                await stack.aclose()
            await asyncio.sleep(check_s)
        try:
            yield Lead(db, connection)
        finally:
            # Ending the session releases the lock in any state of the connection.
            with suppress(SQLAlchemyError):
                await connection.invalidate()
