"""The backlog of batches: the lines of each pool that wait, read without counting them."""

from dataclasses import dataclass

from sqlalchemy import BigInteger, cast, func, select

from lmaas.store.database import Database
from lmaas.store.runners import RUNNER_LOST_S
from lmaas.store.scopes import SYSTEM
from lmaas.store.tables import batch_pools, batches, job_runners

#: Deadlines within the same period of this many seconds are reported together, by the earliest.
PERIOD_S = 900


@dataclass(frozen=True, slots=True)
class WaitingLines:
    """Lines of a pool that wait and whose deadlines are close to each other: the seconds until the earliest deadline, the number of lines,
    and the sum of their estimated tokens. `waited_s` are the seconds since the first of their batches was created."""

    pool_id: str
    due_s: float
    lines: int
    tokens: int
    waited_s: float


async def waiting_lines(db: Database) -> tuple[dict[str, list[WaitingLines]], bool]:
    """Return the waiting lines of all pools by the pool's id, those with the earliest deadline first, and whether a job runner can run
    them. Lines past their deadline are left out."""
    columns, batch, runner = batch_pools.c, batches.c, job_runners.c
    left_s = func.extract("epoch", batch.expires_at - func.now())
    period = cast(func.floor(func.extract("epoch", batch.expires_at) / PERIOD_S), BigInteger)
    seen = runner.seen_at > func.now() - func.make_interval(0, 0, 0, 0, 0, 0, RUNNER_LOST_S)
    sums = [func.sum(each) for each in (columns.pending, columns.pending_tokens)]
    waited_s = func.extract("epoch", func.now() - func.min(batch.created_at))
    query = (
        select(columns.pool_id, func.min(left_s), *sums, waited_s, select(runner.id).where(seen).exists())
        .join_from(batch_pools, batches)
        .where(batch.status == "in_progress", batch.expires_at > func.now(), columns.pending > 0)
        .group_by(columns.pool_id, period)
        .order_by(func.min(batch.expires_at))
    )
    async with db.begin(SYSTEM) as connection:
        rows = (await connection.execute(query)).all()
    found: dict[str, list[WaitingLines]] = {}
    for pool_id, due_s, lines, tokens, waited, _ in rows:
        found.setdefault(pool_id, []).append(WaitingLines(pool_id, float(due_s), int(lines), int(tokens), float(waited)))
    return found, all(row[-1] for row in rows)


async def done_tokens(db: Database) -> dict[str, dict[str, int]]:
    """Return what engines have processed of the batches that have not ended, in estimated tokens: pool → batch → tokens."""
    columns = batch_pools.c
    query = (
        select(columns.pool_id, columns.batch_id, columns.done_tokens)
        .join_from(batch_pools, batches)
        .where(batches.c.status.in_(("in_progress", "cancelling", "finalizing")))
    )
    async with db.begin(SYSTEM) as connection:
        rows = (await connection.execute(query)).all()
    found: dict[str, dict[str, int]] = {}
    for pool_id, batch_id, tokens in rows:
        found.setdefault(pool_id, {})[batch_id] = int(tokens)
    return found
