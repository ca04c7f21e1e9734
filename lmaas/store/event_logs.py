"""Logs of the events of responses in the background, from which gateways stream them. Job runners write them: `lmaas.store.background`."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import literal, select

from lmaas.states import BackgroundStatus
from lmaas.store.database import Database
from lmaas.store.responses import owned
from lmaas.store.tables import background_responses as rows
from lmaas.store.tables import response_events

#: The `sequence_number` of the first event after those of the creation.
FIRST_EVENT = 2
#: Pieces of a log that are read at a time.
PIECES_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive events, with the numbers of the first and the last."""

    first: int
    last: int
    events: bytes

    def row(self, tenant_id: str, response_id: str) -> dict[str, Any]:
        """Return the piece as a row of `response_events`."""
        return {"tenant_id": tenant_id, "response_id": response_id, "first": self.first, "last": self.last, "events": self.events}


@dataclass(frozen=True, slots=True)
class Log:
    """The part of a log after an event: its next pieces, and its continuation.

    `first_event` is the number of the first event of the present run; earlier runs' events are gone. `next_event` is the number of the next
    event. The log is not `is_whole` if some events were not logged.
    """

    status: BackgroundStatus
    has_ended: bool
    first_event: int
    next_event: int
    is_whole: bool
    pieces: Sequence[Piece]


async def read_log(db: Database, tenant_id: str, response_id: str, after: int) -> Log | None:
    """Return what the log of a response has after the event `after`. None if its events are not logged, or not any more.

    It is one statement, so the pieces and the state belong together.
    """
    pieces = response_events.c
    next_pieces = (
        select(pieces.first, pieces.last, pieces.events)
        .where(pieces.tenant_id == tenant_id, pieces.response_id == response_id, pieces.last > after)
        .order_by(pieces.first)
        .limit(PIECES_AT_ONCE)
        .subquery("pieces")
        .lateral()
    )
    columns = (rows.c.status, rows.c.ended_at, rows.c.first_event, rows.c.next_event, rows.c.is_log_whole)
    query = (
        select(*columns, next_pieces.c.first, next_pieces.c.last, next_pieces.c.events)
        .join_from(rows, next_pieces, literal(True), isouter=True)
        .where(*owned(rows, tenant_id), rows.c.id == response_id, rows.c.is_streamed, rows.c.status != BackgroundStatus.DELETED)
        .order_by(next_pieces.c.first)
    )
    async with db.begin(tenant_id) as connection:
        found = (await connection.execute(query)).all()
    if not found:
        return None
    row = found[0]
    read = [Piece(each.first, each.last, each.events) for each in found if each.first is not None]
    return Log(BackgroundStatus(row.status), row.ended_at is not None, row.first_event, row.next_event, row.is_log_whole, read)


async def progress(db: Database, tenant_id: str, response_ids: Collection[str]) -> dict[str, tuple[int, bool]]:
    """Return the number of the next event of each of these responses, and whether it has ended. Those that do not exist are missing."""
    query = select(rows.c.id, rows.c.next_event, rows.c.ended_at.is_not(None)).where(
        *owned(rows, tenant_id), rows.c.id.in_(response_ids), rows.c.status != BackgroundStatus.DELETED
    )
    async with db.begin(tenant_id) as connection:
        return {response_id: (number, has_ended) for response_id, number, has_ended in await connection.execute(query)}
