"""Connections to Postgres: short transactions, never open across a stream."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any, LiteralString, Protocol

import psycopg
from psycopg.errors import InsufficientPrivilege, InvalidParameterValue
from psycopg.pq import Conninfo
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from lmaas.errors import SettingsError, Unavailable
from lmaas.store.rights import DatabaseRole, role_name
from lmaas.store.scopes import SYSTEM, AnyScope, begin_statement, tenant_settings


def driver_url(url: str) -> str:
    """Return `url` with the driver that we use, whatever dialect name it came with (`postgres://`, `postgresql://`).

    Raises SettingsError, without the URL's password, for what is not the URL of a Postgres database.
    """
    try:
        parsed = make_url(url.replace("postgres://", "postgresql://", 1))
        is_postgres = parsed.get_backend_name() == "postgresql"
    except (ArgumentError, ValueError):
        is_postgres = False
    if not is_postgres:
        raise SettingsError("LMAAS_DATABASE_URL is not the URL of a database, such as postgresql://user:password@host/name.")
    known = {option.keyword.decode() for option in Conninfo.get_defaults()}
    if unknown := sorted(set(parsed.query) - known):
        raise SettingsError(f"LMAAS_DATABASE_URL has the option {unknown[0]!r}, which Postgres does not know. Remove it.")
    return parsed.set(drivername="postgresql+psycopg").render_as_string(hide_password=False)


def new_id(prefix: str) -> str:
    """A random identifier such as `ten_3f9c…`: 80 bits, lower-case hex."""
    return f"{prefix}_{secrets.token_hex(10)}"


_OPTIONS = "-c statement_timeout=10000 -c timezone=UTC"
#: For job runners, whose statements look rows up by keys: a plan that was made while a table was empty is kept while it fills up. Without
#: sequential scans, plans seem expensive to some releases of Postgres, which would compile them.
_BY_INDEX = " -c enable_seqscan=off -c jit=off"


class Writes(Protocol):
    """The object through which a function may write: the database, or the connection that proves the right to write."""

    def begin(self, scope: AnyScope) -> AbstractAsyncContextManager[AsyncConnection]:
        """Provide a connection for the block. Its statements hold, all or each, once the block has ended without an error."""

    async def check(self) -> None:
        """Raises if nothing may be written now."""


class Database:
    """A pool of connections. Every use is one transaction; a database that is away raises Unavailable.

    `role` is the role of this process. Its login may be that very role, or one that may act as it; then each transaction does. Without
    a role, transactions have the login's own rights.
    """

    def __init__(self, url: str, role: DatabaseRole | None = None, *, prefix: str = "lmaas", connections: int = 5) -> None:
        self._role, self._prefix = role, prefix
        self._login = make_url(driver_url(url)).username
        #: The role that a transaction has to take, unless the login already is that role.
        self._acts_as = None if role is None or role_name(prefix, role) == self._login else role
        self._engine = create_async_engine(
            driver_url(url),
            pool_size=connections,
            max_overflow=connections,
            pool_timeout=5,
            # The driver begins no transaction by itself: ours begins with its scope, in one exchange.
            isolation_level="AUTOCOMMIT",
            # Errors go to the log; hashes of keys and names of tenants do not.
            hide_parameters=True,
            connect_args={"connect_timeout": 5, "options": _OPTIONS + (_BY_INDEX if role is DatabaseRole.JOBS else "")},
        )

    @asynccontextmanager
    async def begin(self, scope: AnyScope) -> AsyncIterator[AsyncConnection]:
        """Provide a transaction that sees the rows of `scope`: a tenant by its id, SYSTEM, OPERATOR, CLAIMS, LEASES, or a KeyScope.

        It is committed at the end of the block, and rolled back on an error.
        """
        with _unavailable():
            connection = await self._connected(lambda connection: self.start(connection, scope))
            try:
                async with connection.begin():
                    yield connection
            finally:
                # Also if the task is cancelled meanwhile: the pool gets its connection back.
                await asyncio.shield(connection.close())

    async def execute_for_each(self, statement: LiteralString, values: Sequence[tuple[str, Sequence[Any]]]) -> None:
        """Execute one of the driver's own statements for some tenants, for each with its values, as one transaction in one exchange with
        Postgres.

        It costs half of the CPU time of `begin`, and is for what happens very often. Each execution is in the scope of its tenant. If a
        connection is lost, all are executed again, although Postgres may have done them: the second time they must have no effect.
        """
        scoped = [(*tenant_settings(tenant_id, self._prefix, self._acts_as), each) for tenant_id, each in values]

        async def exchange(connection: AsyncConnection) -> None:
            driver = await _driver(connection)
            # The statements of a pipeline are one transaction, which its end commits.
            async with driver.pipeline():
                cursor = driver.cursor()
                for settings, of_settings, each in scoped:
                    await cursor.execute(settings, of_settings, prepare=True)
                    await cursor.execute(statement, each, prepare=True)

        with _unavailable():
            connection = await self._connected(exchange)
            await asyncio.shield(connection.close())

    async def _connected(self, first: Callable[[AsyncConnection], Awaitable[None]]) -> AsyncConnection:
        """Return a connection on which `first` has succeeded. Its exchange also finds out whether the connection still works."""
        while True:
            connection = await self._engine.connect()
            try:
                info = (await connection.get_raw_connection()).info
                is_new, info["lmaas_used"] = "lmaas_used" not in info, True
                await first(connection)
            except (psycopg.OperationalError, psycopg.InterfaceError):
                # A connection may have died in the pool. Then the next one is tried, in the end a new one.
                await connection.invalidate()
                await connection.close()
                if is_new:
                    raise
            except BaseException:
                await asyncio.shield(connection.close())
                raise
            else:
                return connection

    async def start(self, connection: AsyncConnection, scope: AnyScope) -> None:
        """Begin a transaction in `scope` on a connection that is in none, in one exchange.

        Raises psycopg's own errors, and SettingsError if the login may not act as the role that the scope needs.
        """
        statement = begin_statement(scope, self._prefix, self._acts_as)
        driver = await _driver(connection)
        try:
            # Several statements in one message cannot be prepared.
            await driver.execute(statement.encode(), prepare=False)
        except (InsufficientPrivilege, InvalidParameterValue) as error:
            raise SettingsError(
                f"The database login {self._login!r} may not act as a role that it needs: {str(error).splitlines()[0]}. Run "
                "`lmaas migrate` with a login that may grant it, or use the login of the role itself (docs/concepts/tenancy.md)."
            ) from error

    @asynccontextmanager
    async def autocommit(self) -> AsyncIterator[AsyncConnection]:
        """Provide a connection of one's own with the login's rights, each statement its own transaction.

        Raises Unavailable if there is none to be had.
        """
        try:
            connection = await self._engine.connect()
        except (OperationalError, InterfaceError, PoolTimeout) as error:
            raise Unavailable("The database is not available. Retry after 2 s.", code="database_unavailable", retry_after_s=2) from error
        try:
            yield connection
        finally:
            await connection.close()

    async def check(self) -> None:
        """Raises Unavailable if the database is away."""
        async with self.begin(SYSTEM):
            pass

    async def close(self) -> None:
        """Close every connection."""
        await self._engine.dispose()


async def _driver(connection: AsyncConnection) -> psycopg.AsyncConnection[Any]:
    """Return the driver's connection."""
    driver: psycopg.AsyncConnection[Any] = (await connection.get_raw_connection()).driver_connection  # type: ignore[assignment]  # SQLAlchemy does not say which driver's it is
    return driver


@contextmanager
def _unavailable() -> Iterator[None]:
    """Raise Unavailable for errors of the block that mean that the database is away."""
    try:
        yield
    except (OperationalError, InterfaceError, PoolTimeout, psycopg.OperationalError, psycopg.InterfaceError) as error:
        raise Unavailable("The database is not available. Retry after 2 s.", code="database_unavailable", retry_after_s=2) from error
    except DBAPIError as error:
        if error.connection_invalidated:
            raise Unavailable("The database connection was lost. Retry after 2 s.", code="database_unavailable", retry_after_s=2) from error
        raise
