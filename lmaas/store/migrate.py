"""Brings a database to the newest schema."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, pool, text

from lmaas.store.database import driver_url

MIGRATIONS = Path(__file__).parents[2] / "migrations"
#: Any constant that nobody else uses.
LOCK = 0x6C6D6161


def upgrade(database_url: str) -> None:
    """Run the missing migrations. Two at once wait for each other; a table's lock that does not come in 10 s is an error."""
    engine = create_engine(driver_url(database_url), poolclass=pool.NullPool)
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with engine.connect() as connection:
        # Another migration may take a while; one that hangs must not hang us.
        connection.execute(text("SET lock_timeout = '120s'"))
        connection.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": LOCK})
        connection.execute(text("SET lock_timeout = '10s'"))
        connection.execute(text("SET statement_timeout = '60s'"))
        connection.commit()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        connection.execute(text("SELECT pg_advisory_unlock(:lock)"), {"lock": LOCK})
        connection.commit()
    engine.dispose()
