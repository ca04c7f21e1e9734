"""The migrations create exactly the tables that the code declares."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, create_engine, text

from lmaas.errors import Unavailable
from lmaas.store import migrate
from lmaas.store.database import Database, driver_url
from lmaas.store.migrate import upgrade
from lmaas.store.responses import find_response, save
from lmaas.store.tables import metadata
from tests.integration.store.build import stored_response, tenant


def test_the_newest_schema_is_what_the_tables_say(database_url: str) -> None:
    engine = create_engine(driver_url(database_url))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []
        # Types and indexes that autogenerate does not compare closely.
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


def test_the_clone_may_be_in_a_folder_of_any_name(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / "a clone's 100% ü"
    odd.symlink_to(migrate.MIGRATIONS)
    monkeypatch.setattr(migrate, "MIGRATIONS", odd)
    upgrade(database_url)


def test_a_database_that_cannot_be_reached_is_an_error_that_says_so() -> None:
    with pytest.raises(Unavailable, match=r"The database cannot be reached: .*Connection refused") as refused:
        upgrade("postgresql://nobody@127.0.0.1:1/none")
    assert "\n" not in refused.value.message


@pytest.fixture
def older_url(database_url: str) -> str:
    """A database of the first release."""
    engine = create_engine(driver_url(database_url))
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()
    upgrade(database_url, "0001")
    return database_url


@pytest.fixture
def reader(older_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Connection]:
    """A long transaction that has read a table which a migration changes."""
    monkeypatch.setattr(migrate, "LOCK_TIMEOUT_S", 0.05)
    engine = create_engine(driver_url(older_url))
    with engine.connect() as connection:
        connection.execute(text("SELECT count(*) FROM tenants"))
        yield connection
    engine.dispose()


def version(url: str) -> str:
    engine = create_engine(driver_url(url))
    with engine.connect() as connection:
        found: str = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one()
    engine.dispose()
    return found


async def test_a_database_of_the_release_before_stored_responses(older_url: str) -> None:
    upgrade(older_url, "0011")
    upgrade(older_url)
    db = Database(older_url)
    acme = await tenant(db, "acme")
    await save(db, acme.id, [stored_response("resp_1")], timedelta(days=1))
    assert await find_response(db, acme.id, "resp_1") == stored_response("resp_1")
    await db.close()


def test_a_locked_table_is_waited_for(older_url: str, reader: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    def sleep(pause_s: float) -> None:
        pauses.append(pause_s)
        if len(pauses) == 3:
            reader.rollback()

    monkeypatch.setattr("lmaas.store.migrate.time.sleep", sleep)
    upgrade(older_url)
    assert pauses == [0.5, 1.0, 2.0]
    assert version(older_url) != "0001"


def test_a_table_that_stays_locked_is_an_error_that_says_so(older_url: str, reader: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrate, "RETRY_FOR_S", 0.2)
    monkeypatch.setattr(migrate, "PAUSE_S", 0.01)
    with pytest.raises(Unavailable, match="stayed locked") as caught:
        upgrade(older_url)
    assert caught.value.error_code == "database_busy"
    reader.rollback()
    upgrade(older_url)
    assert version(older_url) != "0001"


def test_another_migration_that_takes_too_long_is_an_error_that_says_so(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrate, "WAIT_S", 0.05)
    engine = create_engine(driver_url(database_url))
    with engine.connect() as other:
        other.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": migrate.LOCK})
        with pytest.raises(Unavailable, match=r"Another migration of this database has been running") as refused:
            upgrade(database_url)
    engine.dispose()
    assert refused.value.error_code == "database_busy"
    upgrade(database_url)
