"""The usage ledger: exactly one event per request. Triggers keep its sums by day (`lmaas.store.usage_days`) in the same transaction."""

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from sqlalchemy import ColumnElement, Date, cast, false, func, or_, select, text
from sqlalchemy.exc import DataError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from lmaas.states import STAND_INS, UsageStatus, WorkClass
from lmaas.store.database import Database
from lmaas.store.paging import Part, rows_of
from lmaas.store.scopes import SYSTEM, AnyScope
from lmaas.store.tables import usage_days, usage_events

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
    #: The tenant's charge, in picodollars (10⁻¹² $).
    charge_picousd: int = 0
    work: WorkClass = WorkClass.INTERACTIVE

    @property
    def adapter_name(self) -> str | None:
        """The adapter's name without a version, None for a base model."""
        return None if self.adapter is None else self.model.partition("@")[0]


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


@dataclass(frozen=True, slots=True)
class EventFilter:
    """The requested events of the ledger; None: all. Days are those of arrival (UTC), both inclusive. `adapter` is a name without a
    version, `model` that of a base model."""

    since: date | None = None
    until: date | None = None
    key_id: str | None = None
    model: str | None = None
    adapter: str | None = None
    work: WorkClass | None = None
    status: UsageStatus | None = None
    request_id: str | None = None

    @property
    def is_narrow(self) -> bool:
        """True if events may be rare among those of the same days, and are not found by their id."""
        return self.request_id is None and any((self.key_id, self.model, self.adapter, self.work, self.status))

    def conditions(self) -> list[ColumnElement[bool]]:
        """Return the conditions on `usage_events`."""
        columns = usage_events.c
        found = []
        if self.since is not None:
            found.append(columns.created_at >= _midnight(self.since))
        if self.until is not None and self.until < date.max:
            found.append(columns.created_at < _midnight(self.until + timedelta(days=1)))
        if self.adapter is not None:
            found += [columns.adapter.is_not(None), func.split_part(columns.model, "@", 1) == self.adapter]
        equal = {"key_id": self.key_id, "base_model": self.model, "work": self.work, "status": self.status, "request_id": self.request_id}
        return found + [columns[name] == value for name, value in equal.items() if value is not None]


def _midnight(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC)


#: All events.
EVERY = EventFilter()


async def list_events(
    db: Database, scope: AnyScope, part: Part | None = None, *, wanted: EventFilter = EVERY, with_waste: bool = True
) -> list[UsageEvent]:
    """List the wanted events, or a part of them, newest first: of one tenant by its id, or with OPERATOR of all. Wasted attempts are left
    out by default.

    Raises InvalidRequest for a part after an event that is not one of the list.
    """
    columns = usage_events.c
    owned = [columns.tenant_id == scope] if isinstance(scope, str) else []
    if not with_waste:
        owned.append(columns.status != UsageStatus.WASTED)
    query = select(*(columns[name] for name in UsageEvent.__slots__)).where(*owned, *wanted.conditions())
    async with db.begin(scope) as connection:
        if part is not None and wanted.is_narrow:
            # Both are read at one time, so that the days have the same events as their sums.
            await connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
            query = query.where(await _on_days(connection, scope, part, wanted, with_waste=with_waste))
        rows = await rows_of(connection, query, part, columns.created_at, columns.request_id, *owned, newest_first=True)
    return [UsageEvent(*row) for row in rows]


async def _on_days(
    connection: AsyncConnection, scope: AnyScope, part: Part, wanted: EventFilter, *, with_waste: bool
) -> ColumnElement[bool]:
    """Return the condition that events are of days that have enough of the wanted ones for a part, by the daily sums. So few events that
    are not wanted are read, however rare the wanted ones are."""
    sums = usage_days.c
    equal = {"key_id": wanted.key_id, "base_model": wanted.model, "adapter": wanted.adapter, "work": wanted.work, "status": wanted.status}
    conditions = [sums[name] == value for name, value in equal.items() if value is not None]
    conditions += [sums.tenant_id == scope] if isinstance(scope, str) else []
    conditions += [] if with_waste else [sums.status != UsageStatus.WASTED]
    conditions += [sums.day >= wanted.since] if wanted.since is not None else []
    conditions += [sums.day <= wanted.until] if wanted.until is not None else []
    if part.after is not None:
        # If there is no such event, the list reports it.
        of_place = select(cast(func.timezone("UTC", usage_events.c.created_at), Date)).where(usage_events.c.request_id == part.after)
        conditions.append(sums.day <= of_place.scalar_subquery())
    requests = func.sum(sums.requests)
    query = select(sums.day, requests).where(*conditions).group_by(sums.day).having(requests != 0).order_by(sums.day.desc())
    spans: list[tuple[date, date]] = []
    found = 0
    for number, (day, count) in enumerate((await connection.execute(query)).all()):
        # Days that follow each other are one span.
        last = spans.pop()[1] if spans and spans[-1][0] - day == timedelta(days=1) else day
        spans.append((day, last))
        # Some events of the first day may be before the place.
        found += int(count) if number > 0 or part.after is None else 0
        if found > part.limit:
            break
    times = usage_events.c.created_at
    return or_(false(), *((times >= _midnight(first)) & (times < _midnight(last + timedelta(days=1))) for first, last in spans))
