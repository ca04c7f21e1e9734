"""Job runners and their leases.

A runner has one row, which it renews. What it leases names the runner and the number of the lease (`attempt`), and is free again once the
runner's row is gone. So a lease costs nothing while it lasts, and a runner that was suspended for too long cannot write with an old one.
Transactions lock in one order: the runner, then batches by their tenants' and their own ids, then lines, then the rest.
"""

from dataclasses import dataclass, field

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from lmaas.store.database import Database, new_id
from lmaas.store.scopes import LEASES, SYSTEM

#: The order in which a transaction locks the rows of `batches AS batch`.
LOCK_ORDER = 'batch.tenant_id COLLATE "C", batch.id COLLATE "C"'
#: A runner that was not seen for this time is lost: what it leased is free again.
RUNNER_LOST_S = 15

_REGISTER = text("INSERT INTO job_runners (id) VALUES (:runner)")
_SEEN = text("UPDATE job_runners SET seen_at = now() WHERE id = :runner RETURNING id")
_HELD = text("SELECT id FROM job_runners WHERE id = :runner FOR KEY SHARE")
_LOST = text(
    "SELECT id FROM job_runners WHERE seen_at < now() - make_interval(secs => :lost_s) ORDER BY seen_at LIMIT 1 FOR UPDATE SKIP LOCKED"
)
_GOING = text("SELECT id FROM job_runners WHERE id = :runner FOR UPDATE")
_FORGET = text("DELETE FROM job_runners WHERE id = :runner")
_LOCK_BATCHES = text(
    f"""
    SELECT id FROM batches AS batch WHERE (tenant_id, id) IN (
        SELECT tenant_id, batch_id FROM batch_lines WHERE runner_id = :runner AND state = 'running'
        UNION SELECT tenant_id, id FROM batches WHERE runner_id = :runner
    ) ORDER BY {LOCK_ORDER} FOR NO KEY UPDATE
    """  # noqa: S608 (an order of ours)
)
#: Counts lines that wait again: those of the expression `freed` (tenant_id, batch_id, pool_id, tokens).
COUNT_FREED = """
    UPDATE batch_pools AS pool SET pending = pool.pending + sums.lines, pending_tokens = pool.pending_tokens + sums.tokens
    FROM (
        SELECT tenant_id, batch_id, pool_id, count(*) AS lines, sum(tokens) AS tokens FROM freed GROUP BY tenant_id, batch_id, pool_id
    ) AS sums WHERE pool.tenant_id = sums.tenant_id AND pool.batch_id = sums.batch_id AND pool.pool_id = sums.pool_id
"""
_FREE_LINES = text(
    f"""
    WITH freed AS (
        UPDATE batch_lines SET state = 'pending', runner_id = NULL WHERE runner_id = :runner AND state = 'running'
        RETURNING tenant_id, batch_id, pool_id, tokens
    ) {COUNT_FREED}
    """  # noqa: S608 (a statement of ours)
)
#: The other tables whose rows have leases. `lost` is 1 if the runner was lost, 0 if it ended by itself.
_FREE_ROWS = tuple(
    text(f"UPDATE {table} SET runner_id = NULL, losses = losses + :lost WHERE runner_id = :runner")  # noqa: S608 (names of ours)
    for table in ("batches", "background_responses")
)
_FREE_DELIVERIES = text("UPDATE webhook_deliveries SET runner_id = NULL WHERE runner_id = :runner")


class LeaseLost(Exception):
    """The runner or its lease is no longer valid: another runner may have the work. Nothing was written."""


@dataclass(frozen=True, slots=True)
class BatchLease:
    """A runner's lease of a batch that it validates or finalizes. Every write names it.

    `losses` is the number of runners that were lost while they leased it.
    """

    tenant_id: str
    batch_id: str
    runner_id: str
    attempt: int
    losses: int = field(default=0, compare=False)


async def register(db: Database) -> str:
    """Add a runner, and return its id. Raises Unavailable."""
    runner_id = new_id("run")
    async with db.begin(SYSTEM) as connection:
        await connection.execute(_REGISTER, {"runner": runner_id})
    return runner_id


async def seen(db: Database, runner_id: str) -> None:
    """Record that a runner lives. Raises LeaseLost if it was declared lost, and Unavailable."""
    async with db.begin(SYSTEM) as connection:
        if (await connection.execute(_SEEN, {"runner": runner_id})).first() is None:
            raise LeaseLost(runner_id)


async def hold(connection: AsyncConnection, runner_id: str) -> None:
    """Keep the runner from being declared lost until the end of this transaction. Raises LeaseLost if it was."""
    if (await connection.execute(_HELD, {"runner": runner_id})).first() is None:
        raise LeaseLost(runner_id)


async def end(db: Database, runner_id: str) -> None:
    """Remove a runner that ends, and free what it still leases."""
    async with db.begin(LEASES) as connection:
        if (await connection.execute(_GOING, {"runner": runner_id})).first() is not None:
            await _free(connection, runner_id, lost=False)


async def free_lost(db: Database, lost_s: float = RUNNER_LOST_S) -> str | None:
    """Declare lost one runner that was not seen for `lost_s` seconds, and free what it leased. Returns its id, None if there is none."""
    async with db.begin(LEASES) as connection:
        runner_id = (await connection.execute(_LOST, {"lost_s": lost_s})).scalar()
        if runner_id is not None:
            await _free(connection, runner_id, lost=True)
    return runner_id


async def _free(connection: AsyncConnection, runner_id: str, *, lost: bool) -> None:
    """Free what a runner leases, and remove its row, which this transaction has locked."""
    which = {"runner": runner_id}
    for statement in (_LOCK_BATCHES, _FREE_LINES, _FREE_DELIVERIES):
        await connection.execute(statement, which)
    for statement in _FREE_ROWS:
        await connection.execute(statement, which | {"lost": int(lost)})
    await connection.execute(_FORGET, which)
