"""The migrations make exactly the tables that the code knows."""

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, text

from lmaas.store.database import driver_url
from lmaas.store.migrate import upgrade
from lmaas.store.tables import metadata


def test_the_newest_schema_is_what_the_tables_say(database_url: str) -> None:
    engine = create_engine(driver_url(database_url))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []
        # Types and indexes that autogenerate does not look at closely.
        unique = connection.execute(text("SELECT indexdef FROM pg_indexes WHERE indexname = 'tenants_name_key'")).scalar_one()
        assert "UNIQUE" in unique
        assert "deleted_at IS NULL" in unique
    engine.dispose()


def test_upgrading_what_is_new_already_changes_nothing(database_url: str) -> None:
    engine = create_engine(driver_url(database_url))
    with engine.connect() as connection:
        before = connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all()
        connection.commit()
        upgrade(database_url)
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all() == before
        assert connection.execute(text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")).scalar_one() == 0
    engine.dispose()
