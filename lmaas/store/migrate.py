"""Brings a database to the newest schema."""

import logging
import time
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, create_engine, pool, text
from sqlalchemy.exc import OperationalError

from lmaas.errors import Unavailable
from lmaas.store.database import driver_url

log = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).parents[2] / "migrations"
#: Any constant that nobody else uses.
LOCK = 0x6C6D6161
#: How long a migration waits for a table's lock: whoever wants the table meanwhile waits behind it, so not for long.
LOCK_TIMEOUT_S = 3.0
#: For how long that is tried again, with pauses in which the others get through: doubled each time, up to the last.
RETRY_FOR_S = 120.0
PAUSE_S, MAX_PAUSE_S = 0.5, 8.0
#: Postgres' codes for a lock that did not come, and for two who wait for each other.
LOCKED = ("55P03", "40P01")


def upgrade(database_url: str, to: str = "head") -> None:
    """Run the missing migrations, each of them whole or not at all. Two at once wait for each other.

    Raises Unavailable: `database_busy` if a table is locked by others for RETRY_FOR_S, or if the database cannot be reached.
    """
    engine = create_engine(driver_url(database_url), poolclass=pool.NullPool)
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    with _connected(engine) as connection:
        # Another migration may take a while; one that hangs must not hang us.
        connection.execute(text("SET lock_timeout = '120s'"))
        connection.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": LOCK})
        connection.execute(text(f"SET lock_timeout = '{LOCK_TIMEOUT_S * 1000:.0f}ms'"))
        connection.execute(text("SET statement_timeout = '60s'"))
        connection.commit()
        config.attributes["connection"] = connection
        _upgrade_patiently(connection, config, to)
        connection.execute(text("SELECT pg_advisory_unlock(:lock)"), {"lock": LOCK})
        connection.commit()
    engine.dispose()


def _connected(engine: Engine) -> Connection:
    try:
        return engine.connect()
    except OperationalError as error:
        why = " ".join(str(error.orig).split())
        raise Unavailable(f"The database cannot be reached: {why}", code="database_unavailable", retry_after_s=2) from error


def _upgrade_patiently(connection: Connection, config: Config, to: str) -> None:
    deadline, pause_s = time.monotonic() + RETRY_FOR_S, PAUSE_S
    while True:
        try:
            command.upgrade(config, to)
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
