"""Responses in the background: rows that gateways create and job runners lease, and the log of their events.

A lease is a runner's id with the number of the attempt. Every write of a runner names it, so a runner that has lost a lease changes nothing
any more. The end of a response is one transaction: its state, the stored response, its last events, and its usage event. Whichever end
comes first holds, because each of them needs a row that has not ended.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, Row, delete, func, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from lmaas.errors import InProgress, OverLimit, Unauthenticated
from lmaas.states import BackgroundStatus, EventType
from lmaas.store import conversations
from lmaas.store.database import Database
from lmaas.store.event_logs import FIRST_EVENT, Piece
from lmaas.store.events import add_event
from lmaas.store.idempotency import Answer, Claim, keep_in
from lmaas.store.responses import ROW_BYTES, Response, owned
from lmaas.store.runners import hold
from lmaas.store.scopes import LEASES
from lmaas.store.tables import background_responses as rows
from lmaas.store.tables import response_events, responses
from lmaas.store.usage import UsageEvent, insert_events

#: The time for which the events are kept after the end of a response.
LOG_KEPT_FOR = timedelta(minutes=10)
#: The bytes that the unfinished responses of one tenant may take.
MAX_OPEN_BYTES = 256 * 1024 * 1024

#: The events of the ends of responses. A client that deletes a response needs none.
_EVENTS = {
    BackgroundStatus.COMPLETED: EventType.RESPONSE_COMPLETED,
    BackgroundStatus.INCOMPLETE: EventType.RESPONSE_INCOMPLETE,
    BackgroundStatus.FAILED: EventType.RESPONSE_FAILED,
    BackgroundStatus.CANCELLED: EventType.RESPONSE_CANCELLED,
}
_NO_VALUES: Mapping[str, Any] = {}

#: Leases rows that no runner has leased. A tenant's oldest ones come first, but those that it has running come before them in its turn, so
#: that tenants take turns. The rows are chosen before they are looked up one by one: joined as a whole, they take quadratic time.
_CLAIM = text(
    """
    WITH chosen AS (
        SELECT tenant_id, id FROM (
            SELECT tenant_id, id, place, created_at, sum(size_bytes) OVER (ORDER BY place, created_at, id) - size_bytes AS bytes_before
            FROM (
                SELECT tenant_id, id, created_at, size_bytes, runner_id IS NULL AS is_free,
                    row_number() OVER (PARTITION BY tenant_id ORDER BY runner_id IS NULL, created_at) AS place
                FROM background_responses
                WHERE ended_at IS NULL AND (runner_id IS NOT NULL OR coalesce(not_before <= now(), true) OR deadline_at <= now())
            ) AS open
            WHERE is_free
        ) AS free
        WHERE bytes_before < :most_bytes ORDER BY place, created_at LIMIT :most
    ), locked AS (
        SELECT response.tenant_id, response.id FROM background_responses AS response
        WHERE (response.tenant_id, response.id) IN (SELECT tenant_id, id FROM chosen)
            AND response.ended_at IS NULL AND response.runner_id IS NULL
        FOR UPDATE SKIP LOCKED
    )
    UPDATE background_responses AS response SET runner_id = :runner, attempt = response.attempt + 1
    FROM locked WHERE response.tenant_id = locked.tenant_id AND response.id = locked.id
    RETURNING response.tenant_id, response.id, response.attempt, response.size_bytes
    """
)
#: Executed twice, it has an effect once, because the row has another `next_event` afterwards.
_LOG = """
WITH new AS (
    SELECT * FROM unnest(%b::text[], %b::int[], %b::int[], %b::int[], %b::bytea[]) AS new (id, attempt, first, next, events)
), changed AS (
    UPDATE background_responses AS response SET status = 'in_progress', next_event = new.next,
        size_bytes = response.size_bytes + octet_length(new.events)
    FROM new
    WHERE response.tenant_id = %s AND response.id = new.id AND response.runner_id = %s AND response.attempt = new.attempt
        AND response.ended_at IS NULL AND response.next_event = new.first
    RETURNING response.id
)
INSERT INTO response_events (tenant_id, response_id, first, last, events)
SELECT %s, new.id, new.first, new.next - 1, new.events FROM new JOIN changed ON changed.id = new.id WHERE new.next > new.first
"""


@dataclass(frozen=True, slots=True)
class NewBackground:
    """A response that is to run in the background. `request`, `input` and `body` are JSON; `events` are those of its creation."""

    id: str
    key_id: str
    previous_id: str | None
    conversation_id: str | None
    request: bytes
    input: bytes
    body: bytes
    events: bytes | None

    @property
    def size_bytes(self) -> int:
        """Its size in the database."""
        return len(self.request) + len(self.input) + len(self.body) + len(self.events or b"") + ROW_BYTES


@dataclass(frozen=True, slots=True)
class Open:
    """A response as clients see it before its end. Its body is that of its creation."""

    status: BackgroundStatus
    previous_id: str | None
    input: bytes
    body: bytes


@dataclass(frozen=True, slots=True)
class Lease:
    """A runner's claim on a response."""

    tenant_id: str
    id: str
    runner_id: str
    attempt: int
    #: About what the response takes, of which its request is the most.
    size_bytes: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Run:
    """The data that a runner needs to run a response. `next_event` is the number of the first event of this run."""

    key_id: str
    previous_id: str | None
    conversation_id: str | None
    request: bytes
    input: bytes
    body: bytes
    is_streamed: bool
    next_event: int
    failures: int
    losses: int
    #: True if its deadline has passed, so that it is not to run any more.
    is_overdue: bool


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of a response: what is stored with its state. `items` are appended to its conversation."""

    status: BackgroundStatus
    response: Response
    items: Sequence[conversations.Item]
    pieces: Sequence[Piece]
    next_event: int
    is_log_whole: bool
    event: UsageEvent | None


def _one(tenant_id: str, response_id: str) -> tuple[ColumnElement[bool], ...]:
    return (*owned(rows, tenant_id), rows.c.id == response_id)


async def create(
    db: Database,
    tenant_id: str,
    new: NewBackground,
    *,
    most: int,
    deadline: timedelta,
    kept_for: timedelta,
    kept: tuple[Claim, Answer] | None = None,
) -> None:
    """Store a new response. `kept` is the claim of its idempotency key with the answer for repeats, which is kept together with it.

    Raises OverLimit if the tenant has `most` unfinished responses or too many bytes of them, Unauthenticated if the tenant was deleted, and
    InProgress if another request has taken over the claim.
    """
    values: dict[str, Any] = {"tenant_id": tenant_id, "id": new.id, "key_id": new.key_id, "previous_id": new.previous_id}
    values |= {"conversation_id": new.conversation_id, "request": new.request, "input": new.input, "body": new.body}
    values |= {"status": BackgroundStatus.QUEUED.value, "is_streamed": new.events is not None, "size_bytes": new.size_bytes}
    values |= {"deadline_at": func.now() + deadline, "expires_at": func.now() + deadline + kept_for}
    own = (rows.c.tenant_id == tenant_id, rows.c.ended_at.is_(None))
    async with db.begin(tenant_id) as connection:
        if not await conversations.hold_tenant(connection, tenant_id):
            raise Unauthenticated
        # Simultaneous creations for one tenant wait for each other, so that none counts too few.
        await connection.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(f"background {tenant_id}", 0))))
        counting = select(func.count(), func.coalesce(func.sum(rows.c.size_bytes), 0)).where(*own)
        count, size = (await connection.execute(counting)).one()
        if count >= most:
            raise OverLimit(
                f"You have {count} responses in the background that have not ended, the maximum of your tier. Wait until some have ended, "
                "or cancel some.",
                code="background_limit_exceeded",
                retry_after_s=10,
            )
        if count and size + new.size_bytes > MAX_OPEN_BYTES:
            raise OverLimit(
                f"Your unfinished responses in the background have {size:,} bytes; with this one they would exceed {MAX_OPEN_BYTES:,}. "
                "Wait until some have ended, or cancel some.",
                code="background_limit_exceeded",
                retry_after_s=10,
            )
        await connection.execute(insert(rows).values(values))
        if new.events is not None:
            piece = Piece(0, FIRST_EVENT - 1, new.events)
            await connection.execute(insert(response_events).values(piece.row(tenant_id, new.id)))
        if kept is not None and not await keep_in(connection, *kept):
            raise InProgress("Another request with this Idempotency-Key has taken it over. Retry after 2 s.", retry_after_s=2)


async def find_open(db: Database, tenant_id: str, response_id: str) -> Open | None:
    """Return a response that has not ended. None if the tenant has none, or if it has ended."""
    query = select(rows.c.status, rows.c.previous_id, rows.c.input, rows.c.body).where(
        *_one(tenant_id, response_id), rows.c.ended_at.is_(None)
    )
    async with db.begin(tenant_id) as connection:
        row = (await connection.execute(query)).first()
    return None if row is None else Open(BackgroundStatus(row.status), row.previous_id, row.input, row.body)


async def cancel(db: Database, tenant_id: str, response: Response, kept_for: timedelta) -> bool:
    """End a response as cancelled, and store it in this form. Returns False if it has ended already, or does not exist."""
    async with db.begin(tenant_id) as connection:
        if not await conversations.hold_tenant(connection, tenant_id):
            return False
        row = await _end(connection, _one(tenant_id, response.id), BackgroundStatus.CANCELLED)
        if row is None:
            return False
        return await conversations.add_turn(connection, tenant_id, response, row.conversation_id, (), kept_for)


async def _end(
    connection: AsyncConnection, which: Sequence[ColumnElement[bool]], status: BackgroundStatus, values: Mapping[str, Any] = _NO_VALUES
) -> Row[Any] | None:
    """End a row with the event of that. Returns it, or None if it has ended already. Its lease stays, so that its runner can charge what it
    used."""
    empty = dict.fromkeys(("request", "input", "body"), b"")
    text_bytes = func.octet_length(rows.c.request) + func.octet_length(rows.c.input) + func.octet_length(rows.c.body)
    changes = {"ended_at": func.now(), "expires_at": func.now() + LOG_KEPT_FOR, "size_bytes": rows.c.size_bytes - text_bytes}
    ending = update(rows).where(*which, rows.c.ended_at.is_(None)).values({"status": status.value} | changes | empty | dict(values))
    returned = (rows.c.tenant_id, rows.c.id, rows.c.conversation_id)
    ended: Row[Any] | None = (await connection.execute(ending.returning(*returned))).first()
    if ended is not None and (type_ := _EVENTS.get(status)) is not None:
        await add_event(connection, ended.tenant_id, type_, {"id": ended.id})
    return ended


async def delete_response(db: Database, tenant_id: str, response_id: str) -> bool:
    """Delete a response, its input and its events, whether it has ended or not. Returns False if the tenant does not have it.

    One that runs is ended. The emptied row of one that a runner leases stays, so that the runner can charge what it used.
    """
    stored = delete(responses).where(*owned(responses, tenant_id), responses.c.id == response_id).returning(responses.c.id)
    log = delete(response_events).where(response_events.c.tenant_id == tenant_id, response_events.c.response_id == response_id)
    async with db.begin(tenant_id) as connection:
        # First the row, as those that end it do: whichever comes first.
        ended = await _end(connection, _one(tenant_id, response_id), BackgroundStatus.DELETED)
        found = (await connection.execute(stored)).first() is not None or ended is not None
        if found:
            await connection.execute(log)
            await connection.execute(delete(rows).where(*_one(tenant_id, response_id), rows.c.runner_id.is_(None)))
            # It may have been cancelled before.
            await connection.execute(update(rows).where(*_one(tenant_id, response_id)).values(status=BackgroundStatus.DELETED.value))
        return found


async def claim(db: Database, runner_id: str, most: int, most_bytes: int = MAX_OPEN_BYTES) -> list[Lease]:
    """Lease at most `most` responses that wait for a runner, of about `most_bytes`, which the last one may exceed.

    Raises LeaseLost if the runner was declared lost.
    """
    async with db.begin(LEASES) as connection:
        await hold(connection, runner_id)
        found = (await connection.execute(_CLAIM, {"runner": runner_id, "most": most, "most_bytes": most_bytes})).all()
    return [Lease(row.tenant_id, row.id, runner_id, row.attempt, row.size_bytes) for row in found]


async def leased(db: Database, runner_id: str) -> dict[Lease, bool]:
    """Return the leases of a runner, and for each whether its response has ended: it was cancelled or deleted."""
    query = select(rows.c.tenant_id, rows.c.id, rows.c.attempt, rows.c.ended_at).where(rows.c.runner_id == runner_id)
    async with db.begin(LEASES) as connection:
        found = (await connection.execute(query)).all()
    return {Lease(row.tenant_id, row.id, runner_id, row.attempt): row.ended_at is not None for row in found}


def _held(lease: Lease) -> tuple[ColumnElement[bool], ...]:
    return (
        rows.c.tenant_id == lease.tenant_id,
        rows.c.id == lease.id,
        rows.c.runner_id == lease.runner_id,
        rows.c.attempt == lease.attempt,
    )


async def begin(db: Database, lease: Lease) -> Run | None:
    """Return what is to be run. None if the lease is lost, or the response has ended.

    Events of an earlier run are removed. Then one number is left out: that of the event which reports the new run to those who follow the
    log.
    """
    query = select(rows, (rows.c.deadline_at <= func.now()).label("is_overdue"))
    async with db.begin(lease.tenant_id) as connection:
        row = (await connection.execute(query.where(*_held(lease), rows.c.ended_at.is_(None)).with_for_update())).first()
        if row is None:
            return None
        next_event = row.next_event
        changes: dict[str, Any] = {"not_before": None}
        if next_event > row.first_event:
            next_event += 1
            log = (response_events.c.tenant_id == lease.tenant_id, response_events.c.response_id == lease.id)
            gone = delete(response_events).where(*log, response_events.c.first >= FIRST_EVENT)
            await connection.execute(gone)
            changes |= {"first_event": next_event, "next_event": next_event, "is_log_whole": True}
        await connection.execute(update(rows).where(*_held(lease)).values(changes))
    return Run(
        row.key_id,
        row.previous_id,
        row.conversation_id,
        row.request,
        row.input,
        row.body,
        row.is_streamed,
        next_event,
        row.failures,
        row.losses,
        row.is_overdue,
    )


async def add_events(db: Database, runner_id: str, pieces: Mapping[str, Sequence[tuple[Lease, Piece]]]) -> None:
    """Log pieces of running responses, by tenant, and record that they are in progress. A piece may be empty.

    All in one transaction. A piece whose lease is lost is not logged, nor one that was logged before.
    """
    values = []
    for tenant_id, each in pieces.items():
        ids, attempts = [lease.id for lease, _ in each], [lease.attempt for lease, _ in each]
        firsts, nexts = [piece.first for _, piece in each], [piece.last + 1 for _, piece in each]
        events = [piece.events for _, piece in each]
        values.append((tenant_id, (ids, attempts, firsts, nexts, events, tenant_id, runner_id, tenant_id)))
    await db.execute_for_each(_LOG, values)


async def finish(db: Database, lease: Lease, ending: Ending, kept_for: timedelta) -> bool:
    """End a response: its state, the stored response, its last events and its usage event, all or nothing.

    Returns False if the lease is lost, the response has ended, or the tenant was deleted: then nothing was stored.
    """
    tenant_id, log_bytes = lease.tenant_id, sum(len(piece.events) for piece in ending.pieces)
    changes = {"next_event": ending.next_event, "is_log_whole": ending.is_log_whole}
    async with db.begin(tenant_id) as connection:
        if not await conversations.hold_tenant(connection, tenant_id):
            return False
        row = await _end(connection, _held(lease), ending.status, changes)
        if row is None:
            return False
        await connection.execute(update(rows).where(*_held(lease)).values(runner_id=None, size_bytes=rows.c.size_bytes + log_bytes))
        for piece in ending.pieces:
            # A piece may have been logged although Postgres did not reply.
            logging = insert(response_events).values(piece.row(tenant_id, lease.id)).on_conflict_do_nothing()
            await connection.execute(logging)
        if ending.event is not None:
            await insert_events(connection, [ending.event])
        if not await conversations.add_turn(connection, tenant_id, ending.response, row.conversation_id, ending.items, kept_for):
            raise RuntimeError(f"the response {lease.id} is stored although it has not ended")
        return True


async def settle(db: Database, lease: Lease, event: UsageEvent | None) -> bool:
    """Give up the lease of a response that was cancelled or deleted, and charge what it used. Returns False if the lease is lost."""
    query = update(rows).where(*_held(lease), rows.c.ended_at.is_not(None)).values(runner_id=None).returning(rows.c.status)
    async with db.begin(lease.tenant_id) as connection:
        if (await connection.execute(query)).first() is None:
            return False
        if event is not None:
            await insert_events(connection, [event])
        return True


async def give_back(db: Database, lease: Lease, *, delay_s: float = 0, failed: bool = False) -> None:
    """Give back a lease: after the delay, the response runs again. `failed` counts a failure."""
    changes = {"runner_id": None, "status": BackgroundStatus.QUEUED.value, "not_before": func.now() + timedelta(seconds=delay_s)}
    changes["failures"] = rows.c.failures + int(failed)
    async with db.begin(lease.tenant_id) as connection:
        await connection.execute(update(rows).where(*_held(lease), rows.c.ended_at.is_(None)).values(changes))
