"""Leases of batch lines: what waits for which pool, and who runs it. Nothing of a line's content is read here."""

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import text

from lmaas.store.database import Database
from lmaas.store.runners import COUNT_FREED, LOCK_ORDER, BatchLease, hold
from lmaas.store.scopes import LEASES

#: The most entries of a backlog that are read at a time.
MAX_BACKLOG = 5_000
#: Lines with more bytes than this are leased only as far as the runner has room for their bytes.
LARGE_BYTES = 16 * 1024
#: A line with which so many runners were lost may be the reason for that. A runner leases few such lines at a time, so that those that only
#: happened to be leased are not taken for the reason.
SUSPECT_LOSSES = 2
#: More bytes than all lines of a batch have.
ANY_BYTES = 2**62
#: The longest message about an early stop.
MAX_MESSAGE = 1_000

#: A batch whose lines run.
_RUNS = "batch.status = 'in_progress' AND batch.stop_code IS NULL AND batch.expires_at > now()"
#: Of each tenant the oldest, so that the batches of one tenant do not hide those of others.
_BACKLOG = text(
    f"""
    SELECT tenant_id, batch_id, pool_id, pending, key_id, endpoint, input_file_id, expires_at, left_s FROM (
        SELECT pool.tenant_id, pool.batch_id, pool.pool_id, pool.pending, batch.key_id, batch.endpoint, batch.input_file_id,
            batch.expires_at, CAST(extract(epoch FROM batch.expires_at - now()) AS float8) AS left_s, batch.created_at,
            row_number() OVER (PARTITION BY pool.tenant_id, pool.pool_id ORDER BY batch.created_at, batch.id) AS turn
        FROM batches AS batch JOIN batch_pools AS pool ON pool.tenant_id = batch.tenant_id AND pool.batch_id = batch.id
        WHERE {_RUNS} AND pool.pending > 0 ORDER BY turn, batch.created_at, batch.id LIMIT :count
    ) AS offer ORDER BY created_at, batch_id
    """  # noqa: S608 (a condition of ours)
)
_CLAIM = text(
    f"""
    WITH held AS MATERIALIZED (SELECT id FROM job_runners WHERE id = :runner FOR KEY SHARE),
    open AS MATERIALIZED (
        SELECT batch.tenant_id, batch.id, wanted.count
        FROM batches AS batch JOIN unnest(CAST(:tenants AS text[]), CAST(:batches AS text[]), CAST(:counts AS int[]))
            AS wanted (tenant_id, batch_id, count) ON batch.tenant_id = wanted.tenant_id AND batch.id = wanted.batch_id
        WHERE {_RUNS} AND EXISTS (SELECT FROM held) ORDER BY {LOCK_ORDER} FOR NO KEY UPDATE OF batch
    ), next AS MATERIALIZED (
        SELECT line.* FROM open CROSS JOIN LATERAL (
            SELECT tenant_id, batch_id, position, byte_length, attempt - given_back >= {SUSPECT_LOSSES} AS suspect FROM batch_lines
            WHERE tenant_id = open.tenant_id AND batch_id = open.id AND pool_id = :pool AND state = 'pending'
            ORDER BY position LIMIT open.count FOR UPDATE SKIP LOCKED
        ) AS line
    ), ranked AS (
        SELECT *, row_number() OVER (PARTITION BY suspect ORDER BY random()) AS turn,
            sum(byte_length) FILTER (WHERE byte_length > {LARGE_BYTES}) OVER (PARTITION BY tenant_id, batch_id ORDER BY position) AS large
        FROM next
    ), taken AS MATERIALIZED (
        SELECT tenant_id, batch_id, position FROM ranked
        WHERE (NOT suspect OR turn <= :suspects) AND (byte_length <= {LARGE_BYTES} OR large - byte_length < CAST(:large_bytes AS bigint))
    ), claimed AS (
        UPDATE batch_lines AS line SET state = 'running', runner_id = :runner, attempt = attempt + 1 FROM taken
        WHERE line.tenant_id = taken.tenant_id AND line.batch_id = taken.batch_id AND line.position = taken.position
        RETURNING line.tenant_id, line.batch_id, line.position, line.attempt, line.given_back, line.byte_offset,
            line.byte_length, line.tokens
    ), counted AS (
        UPDATE batch_pools AS pool SET pending = pool.pending - sums.lines, pending_tokens = pool.pending_tokens - sums.tokens
        FROM (SELECT tenant_id, batch_id, count(*) AS lines, sum(tokens) AS tokens FROM claimed GROUP BY tenant_id, batch_id) AS sums
        WHERE pool.tenant_id = sums.tenant_id AND pool.batch_id = sums.batch_id AND pool.pool_id = :pool
    )
    SELECT tenant_id, batch_id, position, attempt, given_back, byte_offset, byte_length FROM claimed ORDER BY batch_id, position
    """  # noqa: S608 (a condition and an order of ours)
)
#: A condition by which statements find the lines that they are given: one look into the primary key for each, then each by its place. The
#: statistics of `batch_lines` are of other batches, so a plan must not depend on them: a line is not looked up by `runner_id` and `state`,
#: which have an index of all that runs, and this condition, which is always true, has the planner expect few lines, so that it joins them
#: first.
FEW = "{0}.batch_id = {0}.batch_id || '' AND {0}.batch_id = '' || {0}.batch_id"
_LOCK = text(
    f"""
    SELECT id FROM batches AS batch
    WHERE (tenant_id, id) IN (SELECT * FROM unnest(CAST(:tenants AS text[]), CAST(:batches AS text[])))
    ORDER BY {LOCK_ORDER} FOR NO KEY UPDATE
    """  # noqa: S608 (an order of ours)
)
_GIVE_BACK_LINES = text(
    f"""
    WITH given AS MATERIALIZED (
        SELECT * FROM unnest(CAST(:tenants AS text[]), CAST(:batches AS text[]), CAST(:positions AS int[]), CAST(:attempts AS int[]))
            AS given (tenant_id, batch_id, position, attempt)
    ), found AS MATERIALIZED (
        SELECT given.attempt, line.place FROM given CROSS JOIN LATERAL (
            SELECT ctid AS place FROM batch_lines WHERE tenant_id = given.tenant_id AND batch_id = given.batch_id
                AND position = given.position AND attempt = given.attempt AND runner_id = :runner LIMIT 1
        ) AS line WHERE {FEW.format("given")}
    ), freed AS (
        UPDATE batch_lines AS line SET state = 'pending', runner_id = NULL, given_back = given_back + 1
        FROM found WHERE line.ctid = found.place AND line.attempt = found.attempt
        RETURNING line.tenant_id, line.batch_id, line.pool_id, line.tokens
    ) {COUNT_FREED}
    """  # noqa: S608 (a condition of ours)
)
_LEASED = text(
    """
    SELECT tenant_id, batch_id, position, attempt, given_back, byte_offset, byte_length FROM batch_lines
    WHERE runner_id = :runner AND state = 'running'
    """
)
_STOPPED = text(
    """
    SELECT given.tenant_id, given.id, batch.stop_code IS NOT NULL
    FROM unnest(CAST(:tenants AS text[]), CAST(:batches AS text[])) AS given (tenant_id, id) LEFT JOIN batches AS batch
        ON batch.tenant_id = given.tenant_id AND batch.id = given.id AND batch.status = 'in_progress' AND batch.expires_at > now()
    WHERE batch.id IS NULL OR batch.stop_code IS NOT NULL
    """
)
_UNSETTLED = text(
    """
    SELECT tenant_id, id FROM batches AS batch
    WHERE ((status = 'cancelling' AND finalizing_at IS NULL) OR (status = 'in_progress' AND (stop_code IS NOT NULL OR expires_at <= now())))
        AND NOT EXISTS (SELECT FROM batch_lines WHERE tenant_id = batch.tenant_id AND batch_id = batch.id AND state = 'running')
    ORDER BY expires_at LIMIT 100
    """
)
_LOCK_UNSETTLED = text(
    """
    SELECT status, stop_code FROM batches WHERE tenant_id = :tenant AND id = :batch AND finalizing_at IS NULL
        AND (status = 'cancelling' OR (status = 'in_progress' AND (stop_code IS NOT NULL OR expires_at <= now())))
    FOR NO KEY UPDATE
    """
)
_ANY_RUNNING = text("SELECT EXISTS (SELECT FROM batch_lines WHERE tenant_id = :tenant AND batch_id = :batch AND state = 'running')")
_SETTLE = text(
    """
    UPDATE batches SET finalizing_at = now(),
        cancelled = CASE WHEN status = 'cancelling' THEN total - completed - failed ELSE cancelled END,
        expired = CASE WHEN status = 'in_progress' AND stop_code IS NULL THEN total - completed - failed ELSE expired END,
        failed = CASE WHEN status = 'in_progress' AND stop_code IS NOT NULL THEN total - completed ELSE failed END,
        stop_code = CASE WHEN status = 'in_progress' THEN coalesce(stop_code, 'batch_expired') ELSE 'batch_cancelled' END,
        status = CASE WHEN status = 'in_progress' THEN 'finalizing' ELSE status END
    WHERE tenant_id = :tenant AND id = :batch
    """
)
_EMPTY_POOLS = text("UPDATE batch_pools SET pending = 0, pending_tokens = 0 WHERE tenant_id = :tenant AND batch_id = :batch")
_STOP = text(
    """
    UPDATE batches SET stop_code = :code, stop_message = :message
    WHERE tenant_id = :tenant AND id = :batch AND status = 'in_progress' AND stop_code IS NULL
    """
)
_CLAIM_BATCH = text(
    """
    WITH held AS MATERIALIZED (SELECT id FROM job_runners WHERE id = :runner FOR KEY SHARE)
    UPDATE batches SET runner_id = :runner, attempt = attempt + 1 WHERE EXISTS (SELECT FROM held) AND (tenant_id, id) = (
        SELECT tenant_id, id FROM batches AS batch
        WHERE runner_id IS NULL
            AND (status IN ('validating', 'finalizing') OR (status = 'cancelling' AND finalizing_at IS NOT NULL))
            AND (tenant_id, id) NOT IN (SELECT * FROM unnest(CAST(:tenants AS text[]), CAST(:batches AS text[])))
        ORDER BY (
            SELECT count(*) FROM batches AS busy WHERE busy.tenant_id = batch.tenant_id AND busy.runner_id IS NOT NULL
        ), created_at, id LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED
    ) RETURNING tenant_id, id, attempt, losses, status
    """
)
_GIVE_BACK_OTHERS = text(
    """
    UPDATE batches SET runner_id = NULL WHERE runner_id = :runner
        AND (tenant_id, id) NOT IN (SELECT * FROM unnest(CAST(:tenants AS text[]), CAST(:batches AS text[])))
    """
)
_GIVE_BACK_BATCH = text(
    "UPDATE batches SET runner_id = NULL WHERE tenant_id = :tenant AND id = :batch AND runner_id = :runner AND attempt = :attempt"
)


class Offer(NamedTuple):
    """Lines of one batch that wait for one pool. `left_s` is the time to the batch's deadline."""

    tenant_id: str
    batch_id: str
    pool_id: str
    pending: int
    key_id: str
    endpoint: str
    input_file_id: str | None
    expires_at: datetime
    left_s: float


class LeasedLine(NamedTuple):
    """A line that a runner leases, and the position of its bytes in the input file. `attempt` is the number of the lease, from 1."""

    tenant_id: str
    batch_id: str
    position: int
    attempt: int
    given_back: int
    byte_offset: int
    byte_length: int

    @property
    def losses(self) -> int:
        """The number of runners that were lost while they leased it."""
        return self.attempt - self.given_back - 1


async def backlog(db: Database) -> list[Offer]:
    """Return what waits, oldest batches first. Raises Unavailable."""
    async with db.begin(LEASES) as connection:
        return [Offer(*row) for row in await connection.execute(_BACKLOG, {"count": MAX_BACKLOG})]


async def claim_lines(
    db: Database,
    runner_id: str,
    pool_id: str,
    counts: Mapping[tuple[str, str], int],
    large_bytes: int = ANY_BYTES,
    suspects: int = MAX_BACKLOG,
) -> list[LeasedLine]:
    """Lease up to so many lines of each batch (tenant's and batch's id) in the order in which they are to run, for one pool.

    Of each batch's large lines, as many are leased as begin within `large_bytes`, so at least one. Of the lines that may have been the
    reason why runners were lost, at most `suspects` are leased; chance decides which.

    Raises LeaseLost if the runner was declared lost, and Unavailable.
    """
    values = {
        "runner": runner_id,
        "pool": pool_id,
        "tenants": [tenant_id for tenant_id, _ in counts],
        "batches": [batch_id for _, batch_id in counts],
        "counts": list(counts.values()),
        "large_bytes": large_bytes,
        "suspects": suspects,
    }
    async with db.begin(LEASES) as connection:
        found = [LeasedLine(*row) for row in await connection.execute(_CLAIM, values)]
        if not found:
            await hold(connection, runner_id)
    return found


async def leased_lines(db: Database, runner_id: str) -> list[LeasedLine]:
    """Return the lines that a runner leases. Raises Unavailable."""
    async with db.begin(LEASES) as connection:
        return [LeasedLine(*row) for row in await connection.execute(_LEASED, {"runner": runner_id})]


async def give_back_lines(db: Database, runner_id: str, lines: Collection[LeasedLine]) -> None:
    """Give back leased lines, which will be run again. Those that this runner no longer leases stay as they are. Raises Unavailable."""
    values = {
        "runner": runner_id,
        "tenants": [line.tenant_id for line in lines],
        "batches": [line.batch_id for line in lines],
        "positions": [line.position for line in lines],
        "attempts": [line.attempt for line in lines],
    }
    async with db.begin(LEASES) as connection:
        await connection.execute(_LOCK, {"tenants": values["tenants"], "batches": values["batches"]})
        await connection.execute(_GIVE_BACK_LINES, values)


async def stopped(db: Database, batches: Sequence[tuple[str, str]]) -> dict[tuple[str, str], bool]:
    """Return those of the batches of which no more lines are run, and whether those may end that an engine works on.

    They may if the batch was stopped early, and not if it was cancelled, has expired or is gone.
    """
    which = {"tenants": [tenant_id for tenant_id, _ in batches], "batches": [batch_id for _, batch_id in batches]}
    async with db.begin(LEASES) as connection:
        return {(tenant_id, batch_id): may_end for tenant_id, batch_id, may_end in await connection.execute(_STOPPED, which)}


async def unsettled(db: Database) -> list[tuple[str, str]]:
    """Return batches that stop before all of their lines have run, of which none runs, and that are not ready to be finalized yet."""
    async with db.begin(LEASES) as connection:
        return [(tenant_id, batch_id) for tenant_id, batch_id in await connection.execute(_UNSETTLED)]


async def settle(db: Database, tenant_id: str, batch_id: str) -> bool:
    """Make a batch that stops early ready to be finalized, once none of its lines runs. Returns whether it is."""
    which = {"tenant": tenant_id, "batch": batch_id}
    async with db.begin(tenant_id) as connection:
        if (await connection.execute(_LOCK_UNSETTLED, which)).first() is None:
            return False
        # A statement of its own, which sees what was committed before the lock.
        if (await connection.execute(_ANY_RUNNING, which)).scalar_one():
            return False
        await connection.execute(_SETTLE, which)
        await connection.execute(_EMPTY_POOLS, which)
    return True


async def stop_batch(db: Database, tenant_id: str, batch_id: str, code: str, message: str) -> None:
    """Run no more lines of a batch. Those that have not begun fail with this code."""
    async with db.begin(tenant_id) as connection:
        await connection.execute(_STOP, {"tenant": tenant_id, "batch": batch_id, "code": code, "message": message[:MAX_MESSAGE]})


async def claim_batch(db: Database, runner_id: str, later: Collection[tuple[str, str]] = ()) -> tuple[BatchLease, str] | None:
    """Lease a batch that is to be validated or finalized, and return the lease and the batch's status. Those in `later` are left out.

    The tenants of which the fewest batches are being worked on come first. Raises Unavailable.
    """
    values = {"runner": runner_id, "tenants": [tenant_id for tenant_id, _ in later], "batches": [batch_id for _, batch_id in later]}
    async with db.begin(LEASES) as connection:
        row = (await connection.execute(_CLAIM_BATCH, values)).first()
    if row is None:
        return None
    tenant_id, batch_id, attempt, losses, status = row
    return BatchLease(tenant_id, batch_id, runner_id, attempt, losses), status


async def give_back_other_batches(db: Database, runner_id: str, kept: Collection[tuple[str, str]]) -> None:
    """Give back the leases of all batches of a runner but those that are `kept`. Raises Unavailable."""
    values = {"runner": runner_id, "tenants": [tenant_id for tenant_id, _ in kept], "batches": [batch_id for _, batch_id in kept]}
    async with db.begin(LEASES) as connection:
        await connection.execute(_GIVE_BACK_OTHERS, values)


async def give_back_batch(db: Database, lease: BatchLease) -> None:
    """Give back the lease of a batch, if it is still valid. Raises Unavailable."""
    which = {"tenant": lease.tenant_id, "batch": lease.batch_id, "runner": lease.runner_id, "attempt": lease.attempt}
    async with db.begin(LEASES) as connection:
        await connection.execute(_GIVE_BACK_BATCH, which)
