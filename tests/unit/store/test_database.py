"""A database that cannot be reached, and the driver."""

from typing import Any

import pytest

from lmaas.errors import Unavailable
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
