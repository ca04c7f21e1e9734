"""Claims on idempotency keys, and their stored responses. Only this module and the deletion of tenants use their table.

A claim lasts until its owner stores a response or gives up the key. All times are those of Postgres, so the clocks of gateways do not
matter.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, case, delete, func, literal, or_, select, tuple_, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from lmaas.states import ClaimState
from lmaas.store.database import Database
from lmaas.store.scopes import CLAIMS, SYSTEM
from lmaas.store.tables import idempotency as rows
from lmaas.store.tables import tenants

#: The time for which a response is kept.
KEPT_FOR = timedelta(hours=24)
#: The time without a renewal after which a claim is abandoned, and another request may take it over.
ABANDONED_AFTER = timedelta(seconds=30)
#: After a restart of Postgres, claims could not be renewed for a while. Living gateways renew theirs within this time.
SERVER_STARTED: ColumnElement[Any] = func.pg_postmaster_start_time()
#: The time after which an abandoned claim is deleted.
FORGOTTEN_AFTER = timedelta(hours=1)
#: The limits of one tenant. Beyond them, its oldest responses are deleted early.
MAX_ANSWERS = 20_000
MAX_ANSWER_BYTES = 256 * 1024 * 1024
#: Rows that one statement deletes.
ROWS_AT_ONCE = 100


@dataclass(frozen=True, slots=True)
class Claim:
    """One request's claim on a tenant's key. `body_hash` is the SHA-256 of path and body; the request id fences out earlier owners."""

    tenant_id: str
    key: str
    body_hash: bytes
    request_id: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A response as the client received it. `body` is None if it was too large to be kept."""

    status: int
    content_type: str
    body: bytes | None


@dataclass(frozen=True, slots=True)
class Earlier:
    """The request that holds the key. `answer` is None while it runs, and if its body was different (`same` is False)."""

    request_id: str
    same: bool
    answer: Answer | None


def _not_seen_for(age: timedelta) -> ColumnElement[bool]:
    return rows.c.seen_at < func.now() - age


def _of(claim: Claim) -> ColumnElement[bool]:
    """Return the condition for the row of a claim, as long as no other request has taken it over."""
    return and_(rows.c.tenant_id == claim.tenant_id, rows.c.key == claim.key, rows.c.request_id == claim.request_id)


async def take(db: Database, claim: Claim) -> Earlier | None:
    """Claim a key. Returns None on success, otherwise the request that holds it. Of several concurrent claims, one succeeds.

    An expired response, and a claim whose gateway died, do not count. For a deleted tenant the result is that of a request that
    still runs.
    """
    values = {"tenant_id": tenants.c.id, "key": literal(claim.key), "body_hash": literal(claim.body_hash)}
    values |= {"request_id": literal(claim.request_id), "state": literal(ClaimState.RUNNING.value)}
    # The lock waits for a running deletion of the tenant. After a deletion, no new row of the tenant may be created.
    alive = select(*values.values()).where(tenants.c.id == claim.tenant_id, tenants.c.deleted_at.is_(None)).with_for_update(read=True)
    query = insert(rows).from_select(list(values), alive)
    changes: dict[str, Any] = {name: query.excluded[name] for name in ("body_hash", "request_id", "state", "seen_at", "created_at")}
    claiming = query.on_conflict_do_update(
        index_elements=["tenant_id", "key"],
        set_=changes | {"status": None, "content_type": None, "answer": None},
        where=or_(
            and_(rows.c.state == ClaimState.DONE, _not_seen_for(KEPT_FOR)),
            and_(rows.c.state == ClaimState.RUNNING, _not_seen_for(ABANDONED_AFTER), func.now() - ABANDONED_AFTER > SERVER_STARTED),
        ),
    ).returning(rows.c.request_id)
    same = rows.c.body_hash == claim.body_hash
    # The stored body, which may be megabytes, is not fetched for a different request.
    looking = select(rows.c.request_id, same, rows.c.state, rows.c.status, rows.c.content_type, case((same, rows.c.answer))).where(
        rows.c.tenant_id == claim.tenant_id, rows.c.key == claim.key
    )
    async with db.begin(claim.tenant_id) as connection:
        if (await connection.execute(claiming)).first() is not None:
            return None
        row = (await connection.execute(looking)).first()
    if row is None:
        # The claim has just been given up, or the tenant was deleted. A retry of the client gets the key, or the error about its API key.
        return Earlier("", True, None)
    request_id, is_same, state, status, content_type, body = row
    answer = Answer(status, content_type, body) if is_same and state == ClaimState.DONE else None
    return Earlier(request_id, is_same, answer)


async def keep(db: Database, claim: Claim, answer: Answer) -> bool:
    """Keep the response for a day from now. Doing so twice is not an error. Returns False if the claim was taken over or deleted."""
    async with db.begin(claim.tenant_id) as connection:
        return await keep_in(connection, claim, answer)


async def keep_in(connection: AsyncConnection, claim: Claim, answer: Answer) -> bool:
    """Keep the response as `keep` does, in a transaction of the claim's tenant."""
    values = {"state": ClaimState.DONE.value, "seen_at": func.now(), "status": answer.status, "content_type": answer.content_type}
    query = update(rows).where(_of(claim)).values(values | {"answer": answer.body}).returning(rows.c.key)
    return (await connection.execute(query)).first() is not None


async def give_up(db: Database, claim: Claim) -> None:
    """Delete the claim of a request whose response is not kept, so that the next request with its key runs."""
    async with db.begin(claim.tenant_id) as connection:
        # A response may have been kept although Postgres did not reply.
        await connection.execute(delete(rows).where(_of(claim), rows.c.state == ClaimState.RUNNING))


async def seen(db: Database, claims: list[Claim]) -> None:
    """Renew these claims, as a sign that their gateway lives."""
    for start in range(0, len(claims), 1000):
        ids = [(claim.tenant_id, claim.key, claim.request_id) for claim in claims[start : start + 1000]]
        own = tuple_(rows.c.tenant_id, rows.c.key, rows.c.request_id).in_(ids)
        async with db.begin(CLAIMS) as connection:
            await connection.execute(update(rows).where(own, rows.c.state == ClaimState.RUNNING).values(seen_at=func.now()))


async def delete_old(db: Database) -> int:
    """Delete some expired responses and abandoned claims. Returns how many were deleted, at most ROWS_AT_ONCE."""
    old = or_(
        and_(rows.c.state == ClaimState.DONE, _not_seen_for(KEPT_FOR)),
        and_(rows.c.state == ClaimState.RUNNING, _not_seen_for(FORGOTTEN_AFTER)),
    )
    # A claim that is taken over at the same time stays.
    portion = select(rows.c.tenant_id, rows.c.key).where(old).limit(ROWS_AT_ONCE).with_for_update(skip_locked=True)
    async with db.begin(SYSTEM) as connection:
        gone = await connection.execute(delete(rows).where(tuple_(rows.c.tenant_id, rows.c.key).in_(portion)))
    return gone.rowcount


async def delete_surplus(db: Database) -> int:
    """Delete some of each tenant's oldest answers beyond MAX_ANSWERS and MAX_ANSWER_BYTES. Returns how many were deleted."""
    size, done = func.coalesce(func.octet_length(rows.c.answer), 0), rows.c.state == ClaimState.DONE
    over = select(rows.c.tenant_id).where(done).group_by(rows.c.tenant_id)
    over = over.having(or_(func.count() > MAX_ANSWERS, func.sum(size) > MAX_ANSWER_BYTES))
    newest_first: dict[str, Any] = {"partition_by": rows.c.tenant_id, "order_by": (rows.c.seen_at.desc(), rows.c.key)}
    ranked = select(
        rows.c.tenant_id,
        rows.c.key,
        func.row_number().over(**newest_first).label("place"),
        func.sum(size).over(**newest_first).label("bytes"),
    )
    deleted = 0
    async with db.begin(SYSTEM) as connection:
        for tenant_id in (await connection.execute(over)).scalars().all():
            own = ranked.where(done, rows.c.tenant_id == tenant_id).subquery()
            surplus = (
                select(own.c.tenant_id, own.c.key).where(or_(own.c.place > MAX_ANSWERS, own.c.bytes > MAX_ANSWER_BYTES)).limit(ROWS_AT_ONCE)
            )
            # A key that has just been claimed again is skipped, because its request is running.
            deleted += (await connection.execute(delete(rows).where(done, tuple_(rows.c.tenant_id, rows.c.key).in_(surplus)))).rowcount
    return deleted
