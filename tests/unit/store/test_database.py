"""A database that cannot be reached, and the driver."""

from typing import Any

import pytest
from sqlalchemy import make_url

from lmaas.errors import SettingsError, Unavailable
from lmaas.store import tenants
from lmaas.store.database import Database, driver_url


async def test_a_database_that_is_away_is_unavailable(tmp_path: Any) -> None:
    database = Database(f"postgresql://postgres@/none?host={tmp_path}")
    with pytest.raises(Unavailable) as caught:
        await tenants.list_tenants(database)
    assert caught.value.error_code == "database_unavailable"
    with pytest.raises(Unavailable):
        async with database.autocommit():
            pytest.fail("there is no connection")
    await database.close()


@pytest.mark.parametrize("url", ["postgres://u:p@h:1/d", "postgresql://u:p@h:1/d", "postgresql+asyncpg://u:p@h:1/d"])
def test_the_driver_is_ours(url: str) -> None:
    assert driver_url(url) == "postgresql+psycopg://u:p@h:1/d"


@pytest.mark.parametrize(
    "url", ["", "x", "postgresql://u:hidden@h:port/d", "mysql://u:hidden@h/d", "sqlite:///hidden", "postgresql://u:hidden@h/d?foo=1"]
)
def test_what_is_no_database_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(SettingsError, match="LMAAS_DATABASE_URL") as refused:
        driver_url(url)
    assert "hidden" not in refused.value.message


def test_options_of_postgres_stay() -> None:
    url = "postgresql+psycopg://u@/d?application_name=me&connect_timeout=3&host=%2Frun&sslmode=require"
    assert make_url(driver_url(url)) == make_url(url)
