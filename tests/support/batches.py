"""Batches as rows, for tests that need no input file."""

import dataclasses
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import text

from lmaas.states import UsageStatus, WorkClass
from lmaas.store.batch_lines import EndedLine, NewLine, add_lines
from lmaas.store.database import Database, new_id
from lmaas.store.line_leases import LeasedLine
from lmaas.store.scopes import SYSTEM
from lmaas.store.usage import UsageEvent

_BATCH = text(
    """
    INSERT INTO batches
        (tenant_id, id, dialect, endpoint, key_id, input_file_id, completion_window, metadata, status, total, in_progress_at, expires_at)
    VALUES (:tenant, :id, 'openai', :endpoint, :key, :file, '24h', '{}', :status, :total, now(), now() + make_interval(secs => :left_s))
    """
)


async def make_batch(
    db: Database,
    tenant_id: str,
    lines: Sequence[NewLine],
    *,
    key_id: str = "key_1",
    status: str = "in_progress",
    left_s: float = 86_400,
    endpoint: str = "/v1/chat/completions",
    file_id: str = "file-1",
) -> str:
    """Store a batch with these lines, with the rights of `db`, and return its id."""
    batch_id = new_id("batch")
    values = {"tenant": tenant_id, "id": batch_id, "endpoint": endpoint, "key": key_id, "file": file_id, "status": status}
    async with db.begin(SYSTEM) as connection:
        await connection.execute(_BATCH, values | {"total": len(lines), "left_s": left_s})
        await add_lines(connection, tenant_id, batch_id, lines)
    return batch_id


def some_lines(count: int, pool_id: str, tokens: int = 10) -> list[NewLine]:
    """Return lines for a pool."""
    return [NewLine(number + 1, 100 * number, 99, f"line-{number}", pool_id, tokens) for number in range(count)]


def ended(lease: LeasedLine, *, event: bool = True, state: str = "done", answer: bytes = b'{"ok": true}') -> EndedLine:
    """Return the end of a leased line."""
    request_id = f"req_{lease.batch_id}_{lease.position}_{lease.attempt}"
    own = usage_event(request_id, lease.tenant_id) if event else None
    return EndedLine(
        lease.tenant_id, lease.batch_id, lease.position, lease.attempt, state, request_id, 200 if state == "done" else 400, answer, own
    )


def usage_event(request_id: str, tenant_id: str, **changes: Any) -> UsageEvent:
    """Return the event of a completed line: 5 tokens of a prompt and 7 generated ones."""
    event = UsageEvent(
        request_id,
        tenant_id,
        "key_1",
        "base",
        "base",
        None,
        None,
        UsageStatus.COMPLETED,
        None,
        False,
        5,
        2,
        7,
        1,
        0,
        20,
        "rep_1",
        datetime.now(UTC),
        12,
        WorkClass.BACKGROUND,
    )
    return dataclasses.replace(event, **changes)


async def batch_row(db: Database, batch_id: str) -> Any:
    """Return the row of a batch, as the superuser."""
    async with db.begin(SYSTEM) as connection:
        return (await connection.execute(text("SELECT * FROM batches WHERE id = :id"), {"id": batch_id})).one()


async def line_rows(db: Database, batch_id: str) -> Sequence[Any]:
    """Return the rows of a batch's lines in the order of their positions, as the superuser."""
    async with db.begin(SYSTEM) as connection:
        return (await connection.execute(text("SELECT * FROM batch_lines WHERE batch_id = :id ORDER BY position"), {"id": batch_id})).all()


async def pending(db: Database, batch_id: str) -> dict[str, tuple[int, int]]:
    """Return a batch's backlog: lines and tokens by pool."""
    query = text("SELECT pool_id, pending, pending_tokens FROM batch_pools WHERE batch_id = :id")
    async with db.begin(SYSTEM) as connection:
        return {row.pool_id: (row.pending, row.pending_tokens) for row in await connection.execute(query, {"id": batch_id})}
