"""The usage ledger: exactly one event per request."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Date, Select, cast, func, select, text
from sqlalchemy.exc import DataError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from lmaas.states import STAND_INS, UsageStatus, WorkClass
from lmaas.store.database import Database
from lmaas.store.paging import Part, rows_of
from lmaas.store.scopes import SYSTEM, AnyScope
from lmaas.store.tables import tenants, usage_events

#: The time within which `recent_waste` looks, so that it reads few events.
RECENT = timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class UsageEvent:
    """The end and the usage of one request. Tokens are those that the engine reported. Times are whole milliseconds.

    `tenant_id` is None for a probe. `model` is the name that the client requested, `adapter` the engine's name of the weights.
    """

    request_id: str
    tenant_id: str | None
    key_id: str | None
    base_model: str
    model: str
    adapter: str | None
    adapter_version: int | None
    status: UsageStatus
    code: str | None
    stream: bool
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_ms: int
    load_ms: int
    run_ms: int
    replica_id: str | None
    created_at: datetime
    #: What the tenant is charged, in picodollars (10⁻¹² $).
    charge_picousd: int = 0
    work: WorkClass = WorkClass.INTERACTIVE


@dataclass(frozen=True, slots=True)
class UsageRow:
    """One line of a usage report: a tenant's usage of one model on one day (UTC), by the class of the work. `tenant` is None for probes."""

    day: date
    tenant: str | None
    model: str
    work: WorkClass
    requests: int
    failed_requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    run_ms: int
    charge_picousd: int


@dataclass(frozen=True, slots=True)
class Waste:
    """Attempts without a result, of one tenant with one model on one day (UTC), by the class of the work and the reason (None while an
    attempt has not ended). Their tokens are not charged, and are not part of a usage report."""

    day: date
    tenant: str | None
    model: str
    work: WorkClass
    code: str | None
    attempts: int
    tokens: int
    run_ms: int


@dataclass(frozen=True, slots=True)
class PoolWaste:
    """Tokens of attempts without a result on the engines of one base model, by reason."""

    base_model: str
    code: str
    tokens: int


#: The columns of an event, and their types.
EVENT_COLUMNS = dict.fromkeys(UsageEvent.__slots__, "text") | {
    "adapter_version": "int",
    "stream": "boolean",
    "created_at": "timestamptz",
    **dict.fromkeys(("prompt_tokens", "cached_tokens", "completion_tokens"), "bigint"),
    **dict.fromkeys(("queue_ms", "load_ms", "run_ms", "charge_picousd"), "bigint"),
}
#: The end of a statement that adds events to `usage_events AS known`: an event replaces the stand-in of its request, and nothing else.
REPLACE_STAND_IN = f"""
    ON CONFLICT (request_id) DO UPDATE SET {", ".join(f"{name} = excluded.{name}" for name in EVENT_COLUMNS if name != "request_id")}
    WHERE known.status IN ({", ".join(f"'{status}'" for status in sorted(STAND_INS))})
"""
#: One statement for any number of events, which Postgres has parsed before.
_INSERT = text(
    f"""
    INSERT INTO usage_events AS known ({", ".join(EVENT_COLUMNS)})
    SELECT * FROM unnest({", ".join(f"CAST(:{name} AS {kind}[])" for name, kind in EVENT_COLUMNS.items())})
    {REPLACE_STAND_IN}
    """  # noqa: S608 (names of columns)
)


class UnrecordableEventError(Exception):
    """One of these events can never be recorded: its tenant is unknown, or a value is out of range."""


async def record_events(db: Database, events: list[UsageEvent]) -> None:
    """Write events, once each. All or none: raises UnrecordableEventError if one of them cannot be written."""
    if not events:
        return
    try:
        async with db.begin(SYSTEM) as connection:
            await insert_events(connection, events)
    except (IntegrityError, DataError) as error:
        raise UnrecordableEventError(str(error.orig)) from error


async def insert_events(connection: AsyncConnection, events: list[UsageEvent]) -> None:
    """Write events in a transaction, once each: a second event of a request is ignored, unless the first was a stand-in.

    A later stand-in never replaces a request's own event. Of two stand-ins, the later one remains.
    """
    # Only one event of each request, because Postgres refuses to change a row twice in one statement.
    latest: dict[str, UsageEvent] = {}
    for event in events:
        if event.request_id not in latest or latest[event.request_id].status in STAND_INS:
            latest[event.request_id] = event
    # In an order, so that two that write the same events cannot wait for each other: that of `batch_lines.end_lines`.
    ordered = sorted(latest.values(), key=lambda event: (event.tenant_id or "", event.request_id))
    await connection.execute(_INSERT, {name: [getattr(event, name) for event in ordered] for name in EVENT_COLUMNS})


async def report(db: Database, scope: AnyScope, *, since: date | None = None, until: date | None = None) -> list[UsageRow]:
    """Return usage by day, tenant, model and class of work, newest day first: for one tenant by its id, or with OPERATOR for all, including
    probes. Wasted attempts are left out.

    Days are UTC, both inclusive.
    """
    columns = usage_events.c
    figures = [
        func.count(),
        func.count().filter(columns.status.in_((UsageStatus.FAILED, UsageStatus.EXPIRED))),
        *map(func.sum, (columns.prompt_tokens, columns.cached_tokens, columns.completion_tokens, columns.run_ms, columns.charge_picousd)),
    ]
    query, group = _report(scope, since, until, figures)
    query = query.where(columns.status != UsageStatus.WASTED).group_by(*group)
    async with db.begin(scope) as connection:
        rows = [tuple(row) for row in await connection.execute(query)]
    return [UsageRow(row[0], row[1], row[2], WorkClass(row[3]), *(int(value) for value in row[4:])) for row in rows]


async def list_waste(db: Database, scope: AnyScope, *, since: date | None = None, until: date | None = None) -> list[Waste]:
    """Return the wasted attempts of these days (UTC, both inclusive), newest day first, of one tenant by its id, or with OPERATOR of
    all."""
    columns = usage_events.c
    tokens = func.sum(columns.prompt_tokens + columns.completion_tokens)
    query, group = _report(scope, since, until, [columns.code, func.count(), tokens, func.sum(columns.run_ms)])
    query = query.where(columns.status == UsageStatus.WASTED).group_by(*group, columns.code).order_by(columns.code)
    async with db.begin(scope) as connection:
        rows = [tuple(row) for row in await connection.execute(query)]
    return [Waste(row[0], row[1], row[2], WorkClass(row[3]), row[4], *(int(value) for value in row[5:])) for row in rows]


async def recent_waste(db: Database) -> list[PoolWaste]:
    """Return what was wasted by attempts that began within RECENT. Attempts without a reason are left out, because their results may be
    about to be stored."""
    columns = usage_events.c
    tokens = func.sum(columns.prompt_tokens + columns.completion_tokens)
    query = (
        select(columns.base_model, columns.code, tokens)
        .where(columns.status == UsageStatus.WASTED, columns.code.is_not(None), columns.created_at > func.now() - RECENT)
        .group_by(columns.base_model, columns.code)
    )
    async with db.begin(SYSTEM) as connection:
        return [PoolWaste(row[0], row[1], int(row[2])) for row in await connection.execute(query)]


def _report(
    scope: AnyScope, since: date | None, until: date | None, figures: Sequence[ColumnElement[Any]]
) -> tuple[Select[Any], list[ColumnElement[Any]]]:
    """Return a query for figures by day, tenant, model and class of work, and what to group it by."""
    columns = usage_events.c
    day = cast(func.timezone("UTC", columns.created_at), Date)
    query = (
        select(day, tenants.c.name, columns.model, columns.work, *figures)
        .join_from(usage_events, tenants, columns.tenant_id == tenants.c.id, isouter=True)
        .order_by(day.desc(), tenants.c.name.asc().nulls_last(), columns.model, columns.work.desc())
    )
    if isinstance(scope, str):
        query = query.where(columns.tenant_id == scope)
    if since is not None:
        query = query.where(day >= since)
    if until is not None:
        query = query.where(day <= until)
    return query, [day, tenants.c.id, tenants.c.name, columns.model, columns.work]


async def month_total(db: Database, tenant_id: str, year: int, month: int, *, key_id: str | None = None) -> tuple[int, int]:
    """Return the tokens and picodollars that a tenant, or one of its keys, has used in a calendar month (UTC), without wasted attempts."""
    columns = usage_events.c
    begin, end = datetime(year, month, 1, tzinfo=UTC), datetime(year + month // 12, month % 12 + 1, 1, tzinfo=UTC)
    query = select(
        func.coalesce(func.sum(columns.prompt_tokens + columns.completion_tokens), 0), func.coalesce(func.sum(columns.charge_picousd), 0)
    ).where(
        columns.tenant_id == tenant_id,
        columns.created_at >= begin,
        columns.created_at < end,
        columns.status != UsageStatus.WASTED,
    )
    if key_id is not None:
        query = query.where(columns.key_id == key_id)
    async with db.begin(tenant_id) as connection:
        tokens, cost = (await connection.execute(query)).one()
    return int(tokens), int(cost)


async def list_events(db: Database, scope: AnyScope, part: Part | None = None, *, with_waste: bool = True) -> list[UsageEvent]:
    """Return the events, or a part of them, newest first: of one tenant by its id, or with OPERATOR of all. Wasted attempts are left out
    unless they are asked for.

    Raises InvalidRequest for a part after an unknown one.
    """
    columns = usage_events.c
    owned = [columns.tenant_id == scope] if isinstance(scope, str) else []
    if not with_waste:
        owned.append(columns.status != UsageStatus.WASTED)
    query = select(*(columns[name] for name in UsageEvent.__slots__)).where(*owned)
    async with db.begin(scope) as connection:
        rows = await rows_of(connection, query, part, columns.created_at, columns.request_id, *owned, newest_first=True)
    return [UsageEvent(*row) for row in rows]
