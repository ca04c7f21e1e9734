"""Reports of usage from the daily sums of the ledger, and the comparison of these sums with the ledger."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Date, FromClause, Subquery, case, cast, func, literal, select, text, tuple_
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncConnection

from lmaas.errors import InvalidRequest
from lmaas.states import UsageDimension, UsageStatus, WorkClass
from lmaas.store.database import Database
from lmaas.store.paging import Part
from lmaas.store.scopes import OPERATOR, AnyScope
from lmaas.store.tables import api_keys, tenants, usage_days

#: The reason of a wasted attempt that has not ended, or whose result is about to be stored.
UNFINISHED = "unfinished"
#: The differences that a comparison lists, at most.
MAX_DIFFERENCES = 100
_LAST_DAY = date(9999, 12, 31)
#: The days that are read at first for a part of a report by day. Each time that they are not enough, four times as many are read.
FEW_DAYS = 2


@dataclass(frozen=True, slots=True)
class UsageFilter:
    """The usage that a report is about; None: all. Days are those of arrival (UTC), both inclusive. `model` is the name of a base model,
    `adapter` a name without a version."""

    since: date | None = None
    until: date | None = None
    key_id: str | None = None
    model: str | None = None
    adapter: str | None = None
    work: WorkClass | None = None

    def conditions(self) -> list[ColumnElement[bool]]:
        """Return the conditions on `usage_days`."""
        columns = usage_days.c
        equal = {"key_id": self.key_id, "base_model": self.model, "adapter": self.adapter, "work": self.work}
        found = [columns[name] == value for name, value in equal.items() if value is not None]
        found += [columns.day >= self.since] if self.since is not None else []
        return found + ([columns.day <= self.until] if self.until is not None else [])


#: All usage.
EVERYTHING = UsageFilter()


@dataclass(frozen=True, slots=True)
class UsageRow:
    """One line of a usage report. Of the first fields, those that the lines are not grouped by are None. `month` is its first day.

    Without a tenant, the usage is that of probes; without an adapter, that of the base model itself. `unpriced_requests` used tokens, and
    cost nothing because no price was set. `waste` are the tokens of attempts without a result, by reason; they are in no other figure.
    `cursor` is the place of the line in its report.
    """

    day: date | None
    month: date | None
    tenant_id: str | None
    tenant: str | None
    key_id: str | None
    key: str | None
    model: str | None
    adapter: str | None
    work: WorkClass | None
    requests: int
    failed_requests: int
    unpriced_requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    run_ms: int
    charge_picousd: int
    waste: Mapping[str, int]
    cursor: str


_GROUPS: dict[UsageDimension, tuple[str, ColumnElement[Any]]] = {
    UsageDimension.DAY: ("day", usage_days.c.day),
    UsageDimension.MONTH: ("month", cast(func.date_trunc("month", usage_days.c.day), Date)),
    UsageDimension.TENANT: ("tenant_id", usage_days.c.tenant_id),
    UsageDimension.KEY: ("key_id", usage_days.c.key_id),
    UsageDimension.MODEL: ("base_model", usage_days.c.base_model),
    UsageDimension.ADAPTER: ("adapter", usage_days.c.adapter),
    UsageDimension.WORK: ("work", usage_days.c.work),
}
_SUMS = ("requests", "unpriced", "prompt_tokens", "cached_tokens", "completion_tokens", "run_ms", "charge_picousd")


async def report(
    db: Database,
    scope: AnyScope,
    by: Sequence[UsageDimension],
    part: Part | None = None,
    *,
    wanted: UsageFilter = EVERYTHING,
    with_waste: bool = False,
) -> list[UsageRow]:
    """Return the usage of one tenant by its id, or with OPERATOR of all and of probes, grouped by some dimensions, or a part of it.

    Lines are in the order of the dimensions, the newest day first. With `with_waste`, they have wasted attempts, and groups with nothing
    else are lines as well. Raises InvalidRequest `invalid_cursor` for a part after something that is no cursor of this report.
    """
    by = [dimension for dimension in UsageDimension if dimension in by]
    conditions = wanted.conditions()
    if isinstance(scope, str):
        conditions.append(usage_days.c.tenant_id == scope)
    if not with_waste:
        conditions.append(usage_days.c.status != UsageStatus.WASTED)
    place = None if part is None or part.after is None else _read_cursor(part.after, by)
    async with db.begin(scope) as connection:
        if part is None or by[0] is not UsageDimension.DAY:
            limit = None if part is None else part.limit + 1
            return await _read(connection, by, conditions, place, limit)
        # The newest days come first, so a part needs only some of them.
        if place is not None:
            conditions.append(usage_days.c.day <= _LAST_DAY - timedelta(days=place[0]))
        first, last = (await connection.execute(select(func.min(usage_days.c.day), func.max(usage_days.c.day)).where(*conditions))).one()
        rows: list[UsageRow] = []
        days = FEW_DAYS
        while last is not None and last >= first and len(rows) <= part.limit:
            begin = max(first, last - timedelta(days=min(days, (last - first).days + 1) - 1))
            within = [*conditions, usage_days.c.day >= begin, usage_days.c.day <= last]
            rows += await _read(connection, by, within, place, part.limit + 1 - len(rows))
            last, days = begin - timedelta(days=1), 4 * days
        return rows


async def _read(
    connection: AsyncConnection,
    by: Sequence[UsageDimension],
    conditions: Sequence[ColumnElement[bool]],
    place: list[Any] | None,
    limit: int | None,
) -> list[UsageRow]:
    """Return the lines of a report after a place, at most `limit`."""
    grouped = _grouped(by, conditions)
    order = [expression for dimension in by for expression in _order(dimension, grouped)]
    has_tenant, has_key = UsageDimension.TENANT in by, UsageDimension.KEY in by
    names = [
        (tenants.c.name if has_tenant else literal(None)).label("tenant"),
        (api_keys.c.name if has_key else literal(None)).label("key"),
    ]
    source: FromClause = grouped
    if has_tenant:
        source = source.outerjoin(tenants, grouped.c.tenant_id == tenants.c.id)
    if has_key:
        source = source.outerjoin(api_keys, grouped.c.key_id == api_keys.c.id)
    query = select(grouped, *names, *order).select_from(source).order_by(*order).limit(limit)
    if place is not None:
        query = query.where(tuple_(*order) > tuple_(*place))
    rows = (await connection.execute(query)).all()
    return [_row(row._mapping, by, list(row[-len(order) :])) for row in rows]


def _grouped(by: Sequence[UsageDimension], conditions: Sequence[ColumnElement[bool]]) -> Subquery:
    """Return the figures of each group."""
    groups = [_GROUPS[dimension][1].label(_GROUPS[dimension][0]) for dimension in by]
    columns = usage_days.c
    sums = [func.sum(columns[name]).label(name) for name in _SUMS]
    # A group of events that were all replaced is left with zeros.
    query = select(*groups, columns.status, columns.code, *sums).where(*conditions)
    ends = query.group_by(*(_GROUPS[dimension][1] for dimension in by), columns.status, columns.code).having(
        func.sum(columns.requests) != 0
    )
    of_end = ends.subquery("ends")
    is_waste = of_end.c.status == UsageStatus.WASTED
    has_failed = of_end.c.status.in_((UsageStatus.FAILED, UsageStatus.EXPIRED))
    figures = [func.coalesce(func.sum(of_end.c[name]).filter(~is_waste), 0).label(name) for name in _SUMS]
    failed = func.coalesce(func.sum(of_end.c.requests).filter(has_failed), 0).label("failed")
    tokens = of_end.c.prompt_tokens + of_end.c.completion_tokens
    waste = func.jsonb_object_agg(func.coalesce(of_end.c.code, UNFINISHED), tokens, type_=JSONB).filter(is_waste).label("waste")
    names = [of_end.c[_GROUPS[dimension][0]] for dimension in by]
    return select(*names, *figures, failed, waste).group_by(*names).subquery("grouped")


def _order(dimension: UsageDimension, grouped: Subquery) -> list[ColumnElement[Any]]:
    """Return what lines are ordered by, ascending and without nulls: as many values as `_PLACES` has types."""
    value = grouped.c[_GROUPS[dimension][0]]
    match dimension:
        case UsageDimension.DAY | UsageDimension.MONTH:
            return [literal(_LAST_DAY, Date) - value]
        case UsageDimension.TENANT:
            return [case((value.is_(None), 1), else_=0), func.coalesce(tenants.c.name, ""), func.coalesce(value, "")]
        case UsageDimension.WORK:
            return [case((value == WorkClass.INTERACTIVE, 0), else_=1)]
        case _:
            return [func.coalesce(value, "")]


_PLACES: dict[UsageDimension, tuple[type, ...]] = {
    UsageDimension.DAY: (int,),
    UsageDimension.MONTH: (int,),
    UsageDimension.TENANT: (int, str, str),
    UsageDimension.KEY: (str,),
    UsageDimension.MODEL: (str,),
    UsageDimension.ADAPTER: (str,),
    UsageDimension.WORK: (int,),
}


def _row(found: Mapping[Any, Any], by: Sequence[UsageDimension], place: list[Any]) -> UsageRow:
    work = found.get("work")
    return UsageRow(
        day=found.get("day"),
        month=found.get("month"),
        tenant_id=found.get("tenant_id"),
        tenant=found["tenant"],
        key_id=found.get("key_id"),
        key=found["key"],
        model=found.get("base_model"),
        adapter=found.get("adapter"),
        work=None if work is None else WorkClass(work),
        requests=int(found["requests"]),
        failed_requests=int(found["failed"]),
        unpriced_requests=int(found["unpriced"]),
        prompt_tokens=int(found["prompt_tokens"]),
        cached_tokens=int(found["cached_tokens"]),
        completion_tokens=int(found["completion_tokens"]),
        run_ms=int(found["run_ms"]),
        charge_picousd=int(found["charge_picousd"]),
        waste=found["waste"] or {},
        cursor=_cursor(by, place),
    )


def _cursor(by: Sequence[UsageDimension], place: list[Any]) -> str:
    """Return the place of a line in a report as text."""
    return base64.urlsafe_b64encode(json.dumps([",".join(by), *place]).encode()).decode().rstrip("=")


def _read_cursor(cursor: str, by: Sequence[UsageDimension]) -> list[Any]:
    """Return the place that `_cursor` wrote. Raises InvalidRequest for anything else, also for the place in another report."""
    try:
        found = json.loads(base64.b64decode(cursor + "=" * (-len(cursor) % 4), b"-_", validate=True))
    except (ValueError, RecursionError):
        found = None
    kinds = [kind for dimension in by for kind in _PLACES[dimension]]
    if not isinstance(found, list) or found[:1] != [",".join(by)] or [type(value) for value in found[1:]] != kinds:
        raise _no_cursor()
    if not all(0 <= value < _LAST_DAY.toordinal() if isinstance(value, int) else _is_storable(value) for value in found[1:]):
        raise _no_cursor()
    return found[1:]


def _is_storable(text: str) -> bool:
    """Return whether Postgres can have a text: one without a null character and without halves of surrogate pairs."""
    return not any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in text)


def _no_cursor() -> InvalidRequest:
    return InvalidRequest("'after' must be the 'last_id' of a page of the same report.", code="invalid_cursor", param="after")


async def month_total(db: Database, tenant_id: str, year: int, month: int, *, key_id: str | None = None) -> tuple[int, int]:
    """Return the tokens and picodollars that a tenant, or one of its keys, has used in a calendar month (UTC), without wasted attempts."""
    columns = usage_days.c
    tokens = func.sum(columns.prompt_tokens + columns.completion_tokens)
    query = select(func.coalesce(tokens, 0), func.coalesce(func.sum(columns.charge_picousd), 0)).where(
        columns.tenant_id == tenant_id,
        columns.day >= date(year, month, 1),
        columns.day < date(year + month // 12, month % 12 + 1, 1),
        columns.status != UsageStatus.WASTED,
    )
    if key_id is not None:
        query = query.where(columns.key_id == key_id)
    async with db.begin(tenant_id) as connection:
        used, cost = (await connection.execute(query)).one()
    return int(used), int(cost)


async def find_owner(db: Database, id_or_name: str) -> str | None:
    """Return the id of a tenant by its id, also of a deleted one, or by the name of one that is not deleted."""
    is_id = tenants.c.id == id_or_name
    query = select(tenants.c.id).where(is_id | ((tenants.c.name == id_or_name) & tenants.c.deleted_at.is_(None)))
    async with db.begin(OPERATOR) as connection:
        return (await connection.execute(query.order_by(is_id.desc()).limit(1))).scalar_one_or_none()


@dataclass(frozen=True, slots=True)
class Difference:
    """A group of which the sums of one day differ from the ledger: the group's fields, and for each figure that differs what the ledger
    has more. `table` is `usage_days` or `work_days`."""

    table: str
    group: Mapping[str, str | None]
    more: Mapping[str, int]


_DAY_GROUP = ("tenant_id", "key_id", "base_model", "adapter", "work", "status", "code")
_WORK_GROUP = ("replica_id", "tenant_id", "base_model", "adapter", "work")
_WORK_SUMS = ("run_ms", "load_ms")
_ADAPTER = "CASE WHEN adapter IS NOT NULL THEN split_part(model, '@', 1) END"
_STARTED = "((created_at + (queue_ms + load_ms) * interval '1 millisecond') AT TIME ZONE 'UTC')::date"
_OF_DAY = f"""
    SELECT 1, tenant_id, key_id, base_model, {_ADAPTER}, work, status, CASE WHEN status = 'wasted' THEN code END, 1,
        CASE WHEN charge_picousd = 0 AND prompt_tokens + completion_tokens > 0 AND status IN ('completed', 'aborted', 'failed', 'lost')
            THEN 1 ELSE 0 END,
        prompt_tokens, cached_tokens, completion_tokens, run_ms, charge_picousd
    FROM usage_events WHERE created_at >= :begin AND created_at < :end
"""  # noqa: S608 (expressions of ours)
_OF_WORK = f"""
    SELECT 1, replica_id, tenant_id, base_model, {_ADAPTER}, work, run_ms, load_ms FROM usage_events
    WHERE created_at >= CAST(:begin AS timestamptz) - interval '1 day' AND created_at < :end AND {_STARTED} = :day
        AND replica_id IS NOT NULL AND tenant_id IS NOT NULL
"""  # noqa: S608 (expressions of ours)


def _comparison(table: str, group: Sequence[str], sums: Sequence[str], ledger: str) -> str:
    """Return the statement that finds the groups of a day of which a table and the ledger have different sums."""
    columns = ", ".join((*group, *sums))
    more = ", ".join(f"sum(sign * {name}::numeric) AS {name}" for name in sums)
    differs = " OR ".join(f"sum(sign * {name}::numeric) <> 0" for name in sums)
    return f"""
        SELECT {", ".join(group)}, {more} FROM (
            {ledger} UNION ALL SELECT -1, {columns} FROM {table} WHERE day = :day
        ) AS both_sides (sign, {columns}) GROUP BY {", ".join(group)} HAVING {differs}
        ORDER BY {", ".join(group)} LIMIT {MAX_DIFFERENCES}
    """  # noqa: S608 (names of columns)


_COMPARISONS = (
    ("usage_days", _DAY_GROUP, _SUMS, text(_comparison("usage_days", _DAY_GROUP, _SUMS, _OF_DAY))),
    ("work_days", _WORK_GROUP, _WORK_SUMS, text(_comparison("work_days", _WORK_GROUP, _WORK_SUMS, _OF_WORK))),
)
_COUNT = text("SELECT count(*) FROM usage_events WHERE created_at >= :begin AND created_at < :end")


async def compare(db: Database, day: date) -> tuple[int, list[Difference]]:
    """Compare the sums of a day with the ledger, for an operator. Returns the number of its events, and the first MAX_DIFFERENCES of what
    differs in each table."""
    bounds = {"begin": f"{day} 00:00+00", "end": f"{day + timedelta(days=1)} 00:00+00"}
    found: list[Difference] = []
    async with db.begin(OPERATOR) as connection:
        events = int((await connection.execute(_COUNT, bounds)).scalar_one())
        for table, group, sums, statement in _COMPARISONS:
            for row in await connection.execute(statement, bounds | {"day": day}):
                more = {name: int(row._mapping[name]) for name in sums if row._mapping[name] != 0}
                found.append(Difference(table, {name: row._mapping[name] for name in group}, more))
    return events, found
