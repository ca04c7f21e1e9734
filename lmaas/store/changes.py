"""The change number, from which gateways learn that cached data has changed."""

from sqlalchemy import func, select

from lmaas.store.database import Database
from lmaas.store.scopes import SYSTEM
from lmaas.store.tables import changes


async def change_number(db: Database) -> int:
    """Return a number that grows whenever a tenant, a key, a base model or an adapter changes. Raises Unavailable."""
    async with db.begin(SYSTEM) as connection:
        return int((await connection.execute(select(func.sum(changes.c.number)))).scalar_one() or 0)
