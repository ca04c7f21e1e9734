"""Lists in parts. Each part begins after an item that the caller names, in an order that does not change."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, ColumnElement, Select, select, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from lmaas.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a list: the rows after the one with the id `after`, or the first rows.

    It has `limit` rows, and one more if the list continues.
    """

    limit: int
    after: str | None = None


async def rows_of(
    connection: AsyncConnection,
    query: Select[Any],
    part: Part | None,
    key: Column[Any],
    item_id: Column[Any],
    *owned: ColumnElement[bool],
    newest_first: bool = False,
) -> list[Any]:
    """Return the rows of a part of a list, or all rows if `part` is None, ordered by `key` and `item_id`.

    `owned` are the conditions on the items that `after` may name. An item that has left the list, such as a replica that has ended, still
    marks a position. Raises InvalidRequest `invalid_cursor` if there is no such item.
    """
    order = tuple_(key, item_id)
    if part is not None:
        query = query.limit(part.limit + 1)
        if part.after is not None:
            place = (await connection.execute(select(key, item_id).where(item_id == part.after, *owned))).one_or_none()
            if place is None:
                raise InvalidRequest("'after' must be the id of an item of this list.", code="invalid_cursor", param="after")
            query = query.where(order < tuple_(*place) if newest_first else order > tuple_(*place))
    query = query.order_by(*((key.desc(), item_id.desc()) if newest_first else (key, item_id)))
    return list((await connection.execute(query)).all())
