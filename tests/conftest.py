"""Fixtures with real servers: one Postgres and one Valkey per session, a new database and an empty keyspace per test."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import hypothesis
import pytest
from redis.asyncio import Redis
from rich.console import Console

from lmaas import config
from lmaas.config import Settings
from lmaas.scheduling.client import Scheduler, connect
from lmaas.store.database import Database
from lmaas.store.rights import DatabaseRole
from lmaas.store.tenants import create_tenant
from lmaas.up import embedded
from lmaas.up.bootstrap import prepare_default_model
from tests.support.databases import login_url, new_database, prepare
from tests.support.effort import tries

hypothesis.settings.register_profile("lmaas", max_examples=tries(100))
hypothesis.settings.load_profile("lmaas")


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a running Postgres with a migrated template database."""
    with embedded.postgres(tmp_path_factory.mktemp("postgres") / "data") as url:
        prepare(url)
        yield url


@pytest.fixture
def database_url(postgres_url: str) -> Iterator[str]:
    """The URL of a new, migrated database for this test."""
    with new_database(postgres_url) as url:
        yield url


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    """The test's database with the rights of the superuser, for whatever a test looks up or prepares itself."""
    database = Database(database_url)
    yield database
    await database.close()


@pytest.fixture
async def gateway_db(database_url: str) -> AsyncIterator[Database]:
    """The same database with a gateway's rights."""
    database = Database(login_url(database_url, DatabaseRole.GATEWAY), DatabaseRole.GATEWAY)
    yield database
    await database.close()


@pytest.fixture
async def controller_db(database_url: str) -> AsyncIterator[Database]:
    """The same database with a controller's rights."""
    database = Database(login_url(database_url, DatabaseRole.CONTROLLER), DatabaseRole.CONTROLLER)
    yield database
    await database.close()


@pytest.fixture
async def jobs_db(database_url: str) -> AsyncIterator[Database]:
    """The same database with a job runner's rights."""
    database = Database(login_url(database_url, DatabaseRole.JOBS), DatabaseRole.JOBS)
    yield database
    await database.close()


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a running Valkey."""
    with embedded.valkey(tmp_path_factory.mktemp("valkey")) as url:
        yield url


@pytest.fixture
async def redis(valkey_url: str) -> AsyncIterator[Redis]:
    """A client of an empty Valkey."""
    client = connect(valkey_url)
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
def scheduler(redis: Redis) -> Scheduler:
    """The scheduler on an empty Valkey."""
    return Scheduler(redis)


@pytest.fixture(scope="session")
def model_folder() -> Path:
    """The folder of the default base model, which is converted if this machine has not done so yet."""
    return prepare_default_model(config.load({}), Console())


@pytest.fixture
def settings(tmp_path: Path, database_url: str, valkey_url: str) -> Settings:
    """The settings of a stack for this test."""
    return Settings(home=tmp_path, database_url=database_url, redis_url=valkey_url)


@pytest.fixture
async def tenant_id(db: Database) -> str:
    """The id of a tenant."""
    return (await create_tenant(db, "acme", "standard", 64, 10)).id
