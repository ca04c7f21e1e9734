"""Whether anything has changed that gateways keep answers of."""

from sqlalchemy import func, select

from lmaas.store.database import Database
from lmaas.store.scopes import SYSTEM
from lmaas.store.tables import changes


async def change_number(db: Database) -> int:
    """A number that has grown whenever a tenant, a key, a base model or an adapter has changed. Raises Unavailable."""
    async with db.begin(SYSTEM) as connection:
        return int((await connection.execute(select(func.sum(changes.c.number)))).scalar_one() or 0)
