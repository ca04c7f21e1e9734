"""Connections to Postgres: short transactions, never open across a stream."""

import secrets
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from sqlalchemy import make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from lmaas.errors import SettingsError, Unavailable
from lmaas.store.scopes import SYSTEM, AnyScope


def driver_url(url: str) -> str:
    """`url` with the driver that we use, whatever dialect name it came with (`postgres://`, `postgresql://`)."""
    try:
        parsed = make_url(url.replace("postgres://", "postgresql://", 1))
    except ArgumentError:
        raise SettingsError("LMAAS_DATABASE_URL is not the URL of a database, such as postgresql://user:password@host/name.") from None
    return parsed.set(drivername="postgresql+psycopg").render_as_string(hide_password=False)


def new_id(prefix: str) -> str:
    """A random identifier such as `ten_3f9c…`: 80 bits, lower-case hex."""
    return f"{prefix}_{secrets.token_hex(10)}"


class Writes(Protocol):
    """Where something may be written: the database, or the connection that proves who may write."""

    def begin(self, scope: AnyScope) -> AbstractAsyncContextManager[AsyncConnection]:
        """Provide a connection for the block. Its statements hold, all or each, once the block has ended without an error."""

    async def check(self) -> None:
        """Raises if nothing may be written now."""


class Database:
    """A pool of connections. Every use is one transaction; a database that is away raises Unavailable."""

    def __init__(self, url: str, *, pool_size: int = 5) -> None:
        self._engine = create_async_engine(
            driver_url(url),
            pool_size=pool_size,
            max_overflow=pool_size,
            pool_timeout=5,
            pool_pre_ping=True,
            # Errors go to the log; hashes of keys and names of tenants do not.
            hide_parameters=True,
            connect_args={"connect_timeout": 5, "options": "-c statement_timeout=10000 -c timezone=UTC"},
        )

    @asynccontextmanager
    async def begin(self, scope: AnyScope) -> AsyncIterator[AsyncConnection]:
        """Provide a transaction that sees the rows of `scope`: a tenant by its id, SYSTEM, OPERATOR, or a KeyScope.

        It is committed at the end of the block, and rolled back on an error.
        """
        try:
            async with self._engine.begin() as connection:
                yield connection
        except (OperationalError, InterfaceError, PoolTimeout) as error:
            raise Unavailable("The database is not available. Retry after 2 s.", code="database_unavailable", retry_after_s=2) from error
        except DBAPIError as error:
            if error.connection_invalidated:
                raise Unavailable(
                    "The database connection was lost. Retry after 2 s.", code="database_unavailable", retry_after_s=2
                ) from error
            raise

    @asynccontextmanager
    async def autocommit(self) -> AsyncIterator[AsyncConnection]:
        """A connection of one's own, each statement its own transaction. Raises Unavailable if there is none to be had."""
        try:
            connection = await self._engine.connect()
        except (OperationalError, InterfaceError, PoolTimeout) as error:
            raise Unavailable("The database is not available. Retry after 2 s.", code="database_unavailable", retry_after_s=2) from error
        try:
            yield await connection.execution_options(isolation_level="AUTOCOMMIT")
        finally:
            await connection.close()

    async def check(self) -> None:
        """Raises Unavailable if the database is away."""
        async with self.begin(SYSTEM) as connection:
            await connection.execute(text("SELECT 1"))

    async def close(self) -> None:
        """Close every connection."""
        await self._engine.dispose()
