"""The lines of batches: from their validation to the output files.

A line is `pending`, then `running` with a lease of a runner, then `done` or `failed`. A line that never ran stays `pending` until its batch
is finalized: the batch's row has the reason.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from lmaas.store.conversations import NewTurn, add_turn, hold_tenant
from lmaas.store.database import Database
from lmaas.store.line_leases import FEW
from lmaas.store.responses import save_in
from lmaas.store.runners import LOCK_ORDER, BatchLease, hold
from lmaas.store.usage import EVENT_COLUMNS, REPLACE_STAND_IN, UsageEvent

#: Lines that one statement adds, and lines and bytes of answers that are read at a time.
ADDED_AT_ONCE = 2_000
READ_AT_ONCE, READ_BYTES = 500, 8 * 1024 * 1024

#: Not COPY, which Postgres refuses for tables with row-level security.
_ADD = text(
    """
    INSERT INTO batch_lines
        (tenant_id, batch_id, position, line, byte_offset, byte_length, custom_id, pool_id, tokens, state, status_code, answer)
    SELECT :tenant, :batch, new.* FROM unnest(
        CAST(:positions AS int[]), CAST(:lines AS int[]), CAST(:offsets AS bigint[]), CAST(:lengths AS int[]), CAST(:custom_ids AS text[]),
        CAST(:pools AS text[]), CAST(:tokens AS bigint[]), CAST(:states AS text[]), CAST(:codes AS int[]), CAST(:answers AS bytea[])
    ) AS new
    """
)
_ADD_POOLS = text(
    """
    INSERT INTO batch_pools (tenant_id, batch_id, pool_id, pending, pending_tokens)
    SELECT :tenant, :batch, new.* FROM unnest(CAST(:pools AS text[]), CAST(:pending AS int[]), CAST(:tokens AS bigint[])) AS new
    """
)
_SIZES = text(
    """
    SELECT position, coalesce(octet_length(answer), 0) FROM batch_lines
    WHERE tenant_id = :tenant AND batch_id = :batch AND position > :after ORDER BY position LIMIT :count
    """
)
_ROWS = text(
    """
    SELECT position, line, custom_id, state, request_id, status_code, answer FROM batch_lines
    WHERE tenant_id = :tenant AND batch_id = :batch AND position > :after AND position <= :last ORDER BY position
    """
)
_DELETE = tuple(
    text(f"DELETE FROM {table} WHERE tenant_id = :tenant AND batch_id = :batch")  # noqa: S608 (names of ours)
    for table in ("batch_lines", "batch_pools")
)

_EVENT = tuple(name for name in EVENT_COLUMNS if name != "tenant_id")
_GIVEN = {
    "batch_id": "text",
    "position": "int",
    "attempt": "int",
    "line_state": "text",
    "answer_id": "text",
    "status_code": "int",
    "answer": "bytea",
} | {name: EVENT_COLUMNS[name] for name in _EVENT}
#: An estimate counts as work of an engine up to this many times the line's real tokens. Estimates are as high as a tenant's limits, and
#: what one tenant's lines seem to show is used for the deadlines of all.
MAX_ESTIMATE = 8
#: The bytes of answers after which no more lines of a batch are begun, because Postgres and the disk of a runner hold them all.
MAX_ANSWER_BYTES = 8 * 1024**3
TOO_LARGE = "results_too_large"
_TOO_LARGE_MESSAGE = (
    f"The responses of this batch have more than {MAX_ANSWER_BYTES:,} bytes, the maximum. "
    "Send the requests that were not run in another batch."
)
#: Ends the lines of one tenant: their answers, their usage events and the counts of the batch and of its pools, all or nothing. A line
#: whose lease is not this runner's any more is left out, with its event.
_END = (
    f"""
WITH given AS MATERIALIZED (
    SELECT * FROM unnest({", ".join(f"%{'b' if kind == 'bytea' else 's'}::{kind}[]" for kind in _GIVEN.values())}) AS given ({
        ", ".join(_GIVEN)
    })
), locked AS MATERIALIZED (
    SELECT id FROM batches AS batch WHERE tenant_id = %s AND id IN (SELECT batch_id FROM given) ORDER BY {LOCK_ORDER} FOR NO KEY UPDATE
), found AS MATERIALIZED (
    SELECT given.*, line.place FROM given CROSS JOIN LATERAL (
        SELECT ctid AS place FROM batch_lines WHERE tenant_id = %s AND batch_id = given.batch_id AND position = given.position
            AND attempt = given.attempt AND runner_id = %s LIMIT 1
    ) AS line WHERE {FEW.format("given")} AND (SELECT count(*) FROM locked) > 0
), ended AS (
    UPDATE batch_lines AS line SET state = line_state, runner_id = NULL, request_id = answer_id, status_code = found.status_code,
        answer = found.answer
    FROM found WHERE line.ctid = found.place AND line.attempt = found.attempt
    RETURNING found.*, line.pool_id, line.tokens
), ledger AS (
    INSERT INTO usage_events AS known (tenant_id, {", ".join(_EVENT)})
    SELECT %s, {", ".join(_EVENT)} FROM ended WHERE request_id IS NOT NULL ORDER BY request_id COLLATE "C"
    {REPLACE_STAND_IN}
), worked AS (
    UPDATE batch_pools AS pool SET done_tokens = pool.done_tokens + sums.tokens
    FROM (
        SELECT batch_id, pool_id, sum(least(tokens, {MAX_ESTIMATE} * (prompt_tokens + completion_tokens))) AS tokens
        FROM ended WHERE line_state = 'done' AND prompt_tokens IS NOT NULL GROUP BY batch_id, pool_id
    ) AS sums
    WHERE pool.tenant_id = %s AND pool.batch_id = sums.batch_id AND pool.pool_id = sums.pool_id
), counted AS (
    SELECT batch_id, count(*) FILTER (WHERE line_state = 'done') AS done, count(*) FILTER (WHERE line_state = 'failed') AS failed,
        coalesce(sum(prompt_tokens), 0) AS prompt, coalesce(sum(cached_tokens), 0) AS cached,
        coalesce(sum(completion_tokens), 0) AS completion, sum(octet_length(answer)) AS bytes
    FROM ended GROUP BY batch_id
)
UPDATE batches AS batch SET completed = completed + counted.done, failed = batch.failed + counted.failed,
    prompt_tokens = prompt_tokens + prompt, cached_tokens = cached_tokens + cached, completion_tokens = completion_tokens + completion,
    answer_bytes = answer_bytes + counted.bytes, stop_code = CASE WHEN {{stopping}} THEN '{TOO_LARGE}' ELSE stop_code END,
    stop_message = CASE WHEN {{stopping}} THEN '{_TOO_LARGE_MESSAGE}' ELSE stop_message END,
    status = CASE WHEN {{ending}} THEN 'finalizing' ELSE status END, finalizing_at = CASE WHEN {{ending}} THEN now() ELSE finalizing_at END
FROM counted WHERE batch.tenant_id = %s AND batch.id = counted.batch_id
"""  # noqa: S608 (names of columns)
).format(
    ending="status = 'in_progress' AND completed + batch.failed + counted.done + counted.failed >= total",
    stopping="status = 'in_progress' AND stop_code IS NULL AND completed + batch.failed + counted.done + counted.failed < total "
    f"AND answer_bytes + counted.bytes > {MAX_ANSWER_BYTES}",
)
#: For ends with responses, which are stored only if the line is still leased. The locks are those of _END, in its order.
_LOCK = text(
    f"""
    SELECT id FROM batches AS batch WHERE tenant_id = :tenant AND id IN (SELECT unnest(CAST(:batches AS text[])))
    ORDER BY {LOCK_ORDER} FOR NO KEY UPDATE
    """  # noqa: S608 (an order of ours)
)
_LEASED = text(
    """
    SELECT line.batch_id, line.position
    FROM batch_lines AS line JOIN unnest(CAST(:batches AS text[]), CAST(:positions AS int[]), CAST(:attempts AS int[]))
        AS given (batch_id, position, attempt)
        ON line.batch_id = given.batch_id AND line.position = given.position AND line.attempt = given.attempt
    WHERE line.tenant_id = :tenant AND line.runner_id = :runner AND line.state = 'running' FOR NO KEY UPDATE OF line
    """
)


class NewLine(NamedTuple):
    """A line after its validation: its number in the input file from 1, and where its bytes are. One that is wrong has an `answer`, the
    JSON of its error, and `status_code` if the error is that of a response."""

    line: int
    byte_offset: int
    byte_length: int
    custom_id: str
    pool_id: str | None
    tokens: int
    status_code: int | None = None
    answer: bytes | None = None


class LineRow(NamedTuple):
    """A line as its output file describes it. It was not run if its state is `pending`."""

    position: int
    line: int
    custom_id: str
    state: str
    request_id: str | None
    status_code: int | None
    answer: bytes | None


@dataclass(frozen=True, slots=True)
class EndedLine:
    """The end of a leased line: `done`, or `failed`. `answer` is the body of the response, or the JSON of an error without a status.

    `event` is the usage event of the attempt, None if no engine was called. `turn` is the response that is to be stored, None for other
    answers.
    """

    tenant_id: str
    batch_id: str
    position: int
    attempt: int
    state: str
    request_id: str | None
    status_code: int | None
    answer: bytes
    event: UsageEvent | None
    turn: NewTurn | None = None

    @property
    def size_bytes(self) -> int:
        """Its size in memory."""
        return len(self.answer) + (0 if self.turn is None else self.turn.size_bytes)


async def add_lines(connection: AsyncConnection, tenant_id: str, batch_id: str, lines: Sequence[NewLine]) -> None:
    """Add the lines of a batch in the order in which they are to run, and its backlog."""
    which = {"tenant": tenant_id, "batch": batch_id}
    pools: dict[str, list[int]] = {}
    for first in range(0, len(lines), ADDED_AT_ONCE):
        portion = lines[first : first + ADDED_AT_ONCE]
        failed = [line.answer is not None for line in portion]
        for line, wrong in zip(portion, failed, strict=True):
            if not wrong and line.pool_id is not None:
                count = pools.setdefault(line.pool_id, [0, 0])
                count[0] += 1
                count[1] += line.tokens
        numbers, offsets, lengths, custom_ids, pool_ids, tokens, codes, answers = zip(*portion, strict=True)
        values = {
            "positions": list(range(first, first + len(portion))),
            "lines": list(numbers),
            "offsets": list(offsets),
            "lengths": list(lengths),
            "custom_ids": list(custom_ids),
            "pools": list(pool_ids),
            "tokens": list(tokens),
            "states": ["failed" if wrong else "pending" for wrong in failed],
            "codes": list(codes),
            "answers": list(answers),
        }
        await connection.execute(_ADD, which | values)
        await asyncio.sleep(0)
    if pools:
        sums = {"pools": list(pools), "pending": [count for count, _ in pools.values()], "tokens": [size for _, size in pools.values()]}
        await connection.execute(_ADD_POOLS, which | sums)


async def results(db: Database, lease: BatchLease) -> AsyncIterator[Sequence[LineRow]]:
    """Yield the lines of a batch in portions of at most READ_AT_ONCE lines and about READ_BYTES bytes. Raises LeaseLost."""
    which = {"tenant": lease.tenant_id, "batch": lease.batch_id}
    after = -1
    while True:
        async with db.begin(lease.tenant_id) as connection:
            await hold(connection, lease.runner_id)
            sizes = (await connection.execute(_SIZES, which | {"after": after, "count": READ_AT_ONCE})).all()
            if not sizes:
                return
            last, size = sizes[0][0], 0
            for position, length in sizes:
                size += length
                if size > READ_BYTES and position != sizes[0][0]:
                    break
                last = position
            rows = [LineRow(*row) for row in await connection.execute(_ROWS, which | {"after": after, "last": last})]
        yield rows
        after = last


async def delete_lines(connection: AsyncConnection, tenant_id: str, batch_id: str) -> None:
    """Delete the lines of a batch and its backlog."""
    for statement in _DELETE:
        await connection.execute(statement, {"tenant": tenant_id, "batch": batch_id})


async def end_lines(db: Database, runner_id: str, lines: Sequence[EndedLine]) -> None:
    """Store how lines ended, with their usage events, their responses and the counts of their batches. Raises Unavailable.

    The lines of a tenant are one transaction; those of all tenants without responses are one together. A line that this runner no longer
    leases stays as it is, and neither its event nor its response is stored. The batch whose last line this is becomes
    `finalizing`. A repetition has no effect.
    """
    by_tenant: dict[str, list[EndedLine]] = {}
    for line in lines:
        by_tenant.setdefault(line.tenant_id, []).append(line)
    # In the order of tenants, so that two runners, or a runner and the metering writer, cannot wait for each other.
    with_turns = {tenant_id for tenant_id, ended in by_tenant.items() if any(line.turn is not None for line in ended)}
    others = sorted(by_tenant.keys() - with_turns)
    if others:
        await db.execute_for_each(_END, [(tenant_id, _values(tenant_id, runner_id, by_tenant[tenant_id])) for tenant_id in others])
    for tenant_id in sorted(with_turns):
        await _end_with_turns(db, tenant_id, runner_id, by_tenant[tenant_id])


async def _end_with_turns(db: Database, tenant_id: str, runner_id: str, lines: Sequence[EndedLine]) -> None:
    """Store how lines of a tenant ended, and the responses of those that the runner still leases, all or nothing."""
    values = {
        "tenant": tenant_id,
        "runner": runner_id,
        "batches": [line.batch_id for line in lines],
        "positions": [line.position for line in lines],
        "attempts": [line.attempt for line in lines],
    }
    async with db.begin(tenant_id) as connection:
        if not await hold_tenant(connection, tenant_id):
            return  # its batches are deleted, too
        await connection.execute(_LOCK, {"tenant": tenant_id, "batches": values["batches"]})
        leased = {(batch_id, position) for batch_id, position in await connection.execute(_LEASED, values)}
        await connection.exec_driver_sql(_END, tuple(_values(tenant_id, runner_id, lines)))
        turns = [line.turn for line in lines if line.turn is not None and (line.batch_id, line.position) in leased]
        alone = [turn for turn in turns if turn.conversation_id is None]
        for kept_for in {turn.kept_for for turn in alone}:
            await save_in(connection, tenant_id, [turn.response for turn in alone if turn.kept_for == kept_for], kept_for)
        # In the order of conversations, so that two runners cannot wait for each other.
        for turn in sorted(turns, key=lambda turn: turn.conversation_id or ""):
            if turn.conversation_id is None:
                continue
            if not await add_turn(connection, tenant_id, turn.response, turn.conversation_id, turn.items, turn.kept_for):
                raise RuntimeError(f"the response {turn.response.id} is stored although its line has not ended")


def _values(tenant_id: str, runner_id: str, lines: Sequence[EndedLine]) -> list[object]:
    columns: list[object] = [
        [line.batch_id for line in lines],
        [line.position for line in lines],
        [line.attempt for line in lines],
        [line.state for line in lines],
        [line.request_id for line in lines],
        [line.status_code for line in lines],
        [line.answer for line in lines],
    ]
    columns += [[None if line.event is None else getattr(line.event, name) for line in lines] for name in _EVENT]
    return [*columns, tenant_id, tenant_id, runner_id, tenant_id, tenant_id, tenant_id]
