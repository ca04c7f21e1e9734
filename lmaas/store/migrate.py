"""Brings a database to the newest schema, and its roles, rights and policies to what this release needs."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, create_engine, pool, text
from sqlalchemy.exc import InterfaceError, NotSupportedError, OperationalError, ProgrammingError

from lmaas.errors import SettingsError, Unavailable
from lmaas.store.database import driver_url
from lmaas.store.rights import LOGINS, DatabaseRole, role_name
from lmaas.store.roles import adopt, guard, prepare_roles

log = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).parents[2] / "migrations"
#: The key of the lock: any constant that is not used elsewhere.
LOCK = 0x6C6D6161
#: The time for which a migration waits for a table's lock. Other queries of the table wait behind it, so the time is short.
LOCK_TIMEOUT_S = 3.0
#: For how long that is tried again, with pauses in which the others get through: doubled each time, up to the last.
RETRY_FOR_S = 120.0
PAUSE_S, MAX_PAUSE_S = 0.5, 8.0
#: The time for which a migration waits for another one.
WAIT_S = 120.0
#: Postgres' codes for a lock timeout and a deadlock.
LOCKED = ("55P03", "40P01")
NO_PASSWORDS: Mapping[DatabaseRole, str] = {}


def upgrade(database_url: str, to: str = "head", *, prefix: str = "lmaas", passwords: Mapping[DatabaseRole, str] = NO_PASSWORDS) -> None:
    """Run the missing migrations, each of them whole or not at all, and set roles, rights and policies. Two at once wait for each other.

    `prefix` begins the roles' names; roles in `passwords` may log in with them. With another `to` than `head`, rights and policies stay
    as they are. Raises Unavailable if the database cannot be reached, or (`database_busy`) if another migration runs for WAIT_S or a
    table is locked by others for RETRY_FOR_S, and SettingsError if the login may not do what is missing.
    """
    engine = create_engine(driver_url(database_url), poolclass=pool.NullPool)
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    with _connected(engine) as connection:
        _lock(connection)
        connection.execute(text(f"SET lock_timeout = '{LOCK_TIMEOUT_S * 1000:.0f}ms'"))
        connection.execute(text("SET statement_timeout = '60s'"))
        connection.commit()
        config.attributes["connection"] = connection
        prepare_roles(connection, prefix, passwords)
        _patiently(connection, config, to, prefix)
        connection.execute(text("SELECT pg_advisory_unlock(:lock)"), {"lock": LOCK})
        connection.commit()
    engine.dispose()


def _lock(connection: Connection) -> None:
    """Wait for another migration, which may take a while. One that hangs must not hang this one."""
    connection.execute(text(f"SET lock_timeout = '{WAIT_S * 1000:.0f}ms'"))
    try:
        connection.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": LOCK})
    except OperationalError as error:
        if getattr(error.orig, "sqlstate", None) not in LOCKED:
            raise
        raise Unavailable(
            f"Another migration of this database has been running for more than {WAIT_S:.0f} s. Nothing was changed. Wait until it has "
            "ended, or end it if it hangs (pg_stat_activity shows it), and run it again.",
            code="database_busy",
            retry_after_s=60,
        ) from error


def _connected(engine: Engine) -> Connection:
    try:
        return engine.connect()
    except OperationalError as error:
        why = " ".join(str(error.orig).split())
        raise Unavailable(f"The database cannot be reached: {why}", code="database_unavailable", retry_after_s=2) from error
    except (ProgrammingError, InterfaceError, NotSupportedError) as error:
        # The driver refuses a value of the URL. Its text may have any of them, so it is not shown.
        raise SettingsError("LMAAS_DATABASE_URL has a value that the database driver refuses. Check each of its parts.") from error


def parse_passwords(text: str) -> dict[DatabaseRole, str]:
    """Read LMAAS_DATABASE_PASSWORDS: `gateway=…,controller=…`. Raises SettingsError."""
    found: dict[DatabaseRole, str] = {}
    for number, part in enumerate(filter(None, text.split(",")), 1):
        name, separator, password = part.strip().partition("=")
        if name not in LOGINS or not separator or not password:
            names = ", ".join(LOGINS)
            raise SettingsError(f"Entry {number} of LMAAS_DATABASE_PASSWORDS is not `role=password` with one of the roles {names}.")
        found[DatabaseRole(name)] = password
    return found


def _patiently(connection: Connection, config: Config, to: str, prefix: str) -> None:
    deadline, pause_s = time.monotonic() + RETRY_FOR_S, PAUSE_S
    while True:
        try:
            _upgrade(connection, config, to, prefix)
        except OperationalError as error:
            if getattr(error.orig, "sqlstate", None) not in LOCKED:
                raise
            connection.rollback()
            if time.monotonic() + pause_s > deadline:
                raise Unavailable(
                    f"A table stayed locked for {RETRY_FOR_S:.0f} s, so the migration stopped. The migrations before it are complete. "
                    "End the long transactions in pg_stat_activity and run it again.",
                    code="database_busy",
                    retry_after_s=60,
                ) from error
            log.warning("a table is locked: the migration is tried again", extra={"action": "migrate", "detail": str(error.orig)})
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)
        else:
            return


def _upgrade(connection: Connection, config: Config, to: str, prefix: str) -> None:
    connection.execute(text("RESET ROLE"))
    connection.commit()
    adopt(connection, prefix)
    # Tables that are created from here on belong to the owner.
    try:
        connection.execute(text(f"SET ROLE {role_name(prefix, DatabaseRole.OWNER)}"))
    except ProgrammingError as error:
        migrator = role_name(prefix, DatabaseRole.MIGRATOR)
        raise SettingsError(
            f"The database login may not migrate: {str(error.orig).splitlines()[0]}. Use the login {migrator}, "
            "or the one that ran `lmaas migrate` first (docs/concepts/tenancy.md)."
        ) from error
    connection.commit()
    command.upgrade(config, to)
    if to == "head":
        guard(connection, prefix)
    connection.execute(text("RESET ROLE"))
    connection.commit()
