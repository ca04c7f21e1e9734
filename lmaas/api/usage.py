"""Handlers for reports of usage and of costs, and for single events."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any, TypeVar

from msgspec import Struct
from starlette.responses import Response

from lmaas.api.context import Api, ApiCall
from lmaas.api.csv_reports import PORTION, Columns, csv_response, dollars, wants_csv
from lmaas.api.operation import page_of
from lmaas.api.shapes.common import Page
from lmaas.api.shapes.usage import (
    PROBES,
    CheckQuery,
    Cogs,
    CogsLine,
    CogsQuery,
    CogsTotal,
    EngineMs,
    EventQuery,
    IdleCapacity,
    OperatorEventQuery,
    OperatorUsage,
    OperatorUsageEvent,
    OperatorUsageQuery,
    Reconciliation,
    ReportQuery,
    Usage,
    UsageCheck,
    UsageDifference,
    UsageEvent,
    UsageQuery,
)
from lmaas.errors import Forbidden, InvalidRequest, NotFound
from lmaas.metering import cogs
from lmaas.metering.pricing import microusd
from lmaas.states import Dimension, EnginePhase, UsageDimension
from lmaas.store import engine_time, usage, usage_days
from lmaas.store.paging import Part
from lmaas.store.scopes import OPERATOR, AnyScope
from lmaas.store.usage import EventFilter
from lmaas.store.usage_days import UsageFilter, UsageRow
from lmaas.types import Role

Dimensions = TypeVar("Dimensions", Dimension, UsageDimension)

#: The lines of a cost report, at most. It is made in memory.
MAX_COGS_LINES = 100_000
#: The days that one comparison with the ledger takes, at most.
MAX_CHECKED_DAYS = 31
#: The decimals of picodollars and of micro-dollars.
PICO, MICRO = 12, 6
#: The name of engine time that no tenant used.
NO_TENANT = "(no tenant)"


async def report_usage(api: Api, call: ApiCall[None, UsageQuery]) -> Page[Usage] | Response:
    """Report the usage of one's own tenant, or with a key for inference that of the key."""
    return await _report(api, call, call.tenant_id, _own_key(call), Usage)


async def report_all_usage(api: Api, call: ApiCall[None, OperatorUsageQuery]) -> Page[OperatorUsage] | Response:
    """Report the usage of one tenant or of all, with the attempts that were wasted."""
    return await _report(api, call, await _scope_of(api, call.query.tenant), call.query.key, OperatorUsage)


async def _report(api: Api, call: ApiCall[None, Any], scope: AnyScope, key_id: str | None, kind: type[Usage]) -> Page[Any] | Response:
    asked: UsageQuery = call.query
    _check_period(asked)
    by = _dimensions(asked.by, UsageDimension)
    if kind is OperatorUsage and UsageDimension.ADAPTER in by:
        by = [dimension for dimension in UsageDimension if dimension in (*by, UsageDimension.TENANT)]
    wanted = UsageFilter(asked.since, asked.until, key_id, asked.model, asked.adapter, asked.work)

    async def rows(part: Part) -> list[UsageRow]:
        return await usage_days.report(api.db, scope, by, part, wanted=wanted, with_waste=kind is OperatorUsage)

    if wants_csv(call, asked):
        columns = _usage_columns(by, with_waste=kind is OperatorUsage)
        return await csv_response(call, _filename("usage", asked), columns, _portions(rows, lambda row: row.cursor))
    found = await rows(Part(asked.limit, asked.after))
    return page_of([kind(**_shown(row, by, kind)) for row in found], [row.cursor for row in found], asked.limit)


def _own_key(call: ApiCall[None, Any]) -> str | None:
    """Return the requested key, or None for the usage of all keys. A key for inference sees only its own usage.

    Raises Forbidden.
    """
    asked: str | None = call.query.key
    if call.principal.role is not Role.INFERENCE:
        return asked
    if asked not in (None, call.principal.key_id):
        raise Forbidden("A key of the role inference sees only its own usage. Leave out 'key', or use a key of the role tenant_admin.")
    return call.principal.key_id


async def _scope_of(api: Api, tenant: str | None) -> AnyScope:
    """Return the scope of the tenant that an operator names, also of a deleted one, or of all. Raises NotFound."""
    if tenant is None:
        return OPERATOR
    owner = await usage_days.find_owner(api.db, tenant)
    if owner is None:
        raise NotFound(f"There is no tenant with the id or name '{tenant}'. A deleted tenant is found by its id.", code="tenant_not_found")
    return owner


def _check_period(asked: ReportQuery | CogsQuery | CheckQuery) -> None:
    if asked.since is not None and asked.until is not None and asked.since > asked.until:
        raise InvalidRequest(
            f"'since' ({asked.since}) is after 'until' ({asked.until}). Exchange the two days.", code="out_of_range", param="since"
        )


def _dimensions(asked: str, known: type[Dimensions]) -> list[Dimensions]:
    """Return the dimensions in their order. Raises InvalidRequest for an unknown one."""
    names = [name.strip() for name in asked.split(",")]
    if not set(names) <= set(known):
        raise InvalidRequest(f"'by' must be some of {', '.join(known)}, separated by commas.", code="out_of_range", param="by")
    return [dimension for dimension in known if dimension in names]


def _filename(name: str, period: ReportQuery | CogsQuery) -> str:
    days = [str(day) for day in (period.since, period.until) if day is not None]
    return f"{'-'.join([name, *days])}.csv"


Item = TypeVar("Item")


async def _portions(read: Callable[[Part], Any], place: Callable[[Item], str]) -> AsyncIterator[Sequence[Item]]:
    """Yield all items of a list, which `read` reads in parts. No transaction is open while a portion is sent."""
    after = None
    while True:
        found = await read(Part(PORTION, after))
        yield found[:PORTION]
        if len(found) <= PORTION:
            return
        after = place(found[PORTION - 1])


_GROUP_FIELDS: dict[UsageDimension, tuple[str, ...]] = {
    UsageDimension.DAY: ("day",),
    UsageDimension.MONTH: ("month",),
    UsageDimension.TENANT: ("tenant_id", "tenant"),
    UsageDimension.KEY: ("key_id", "key"),
    UsageDimension.MODEL: ("model",),
    UsageDimension.ADAPTER: ("adapter",),
    UsageDimension.WORK: ("work",),
}
_FIGURES = ("requests", "failed_requests", "unpriced_requests", "prompt_tokens", "cached_tokens", "completion_tokens", "run_ms")


def _group(row: UsageRow, by: Sequence[UsageDimension]) -> dict[str, Any]:
    shown = {name: getattr(row, name) for dimension in by for name in _GROUP_FIELDS[dimension]}
    return shown if row.month is None else shown | {"month": _month(row.month)}


def _month(first: date) -> str:
    return f"{first:%Y-%m}"


def _shown(row: UsageRow, by: Sequence[UsageDimension], kind: type[Usage]) -> dict[str, Any]:
    shown = _group(row, by) | {name: getattr(row, name) for name in _FIGURES} | {"charge_microusd": microusd(row.charge_picousd)}
    return shown | ({"wasted_tokens": sum(row.waste.values()), "waste": dict(row.waste)} if kind is OperatorUsage else {})


def _usage_columns(by: Sequence[UsageDimension], *, with_waste: bool) -> Columns[UsageRow]:
    names = [name for dimension in by for name in _GROUP_FIELDS[dimension]]
    columns: dict[str, Callable[[UsageRow], Any]] = {name: _getter(name) for name in (*names, *_FIGURES)}
    if "month" in columns:
        columns["month"] = lambda row: None if row.month is None else _month(row.month)
    if "tenant" in columns:
        columns["tenant"] = lambda row: PROBES if row.tenant_id is None else row.tenant
    columns["charge_usd"] = lambda row: dollars(row.charge_picousd, PICO)
    if with_waste:
        columns |= {"wasted_tokens": lambda row: sum(row.waste.values()), "waste": lambda row: row.waste}
    return columns


def _getter(name: str) -> Callable[[Any], Any]:
    return lambda item: getattr(item, name)


async def list_events(api: Api, call: ApiCall[None, EventQuery]) -> Page[UsageEvent] | Response:
    """Return a page of the events of one's own tenant, or with a key for inference of the key, newest first, without what only operators
    see."""
    return await _events(api, call, call.tenant_id, _own_key(call), UsageEvent)


async def list_all_events(api: Api, call: ApiCall[None, OperatorEventQuery]) -> Page[OperatorUsageEvent] | Response:
    """Return a page of the events of one tenant or of all, newest first."""
    return await _events(api, call, await _scope_of(api, call.query.tenant), call.query.key, OperatorUsageEvent)


async def _events(api: Api, call: ApiCall[None, Any], scope: AnyScope, key_id: str | None, kind: type[UsageEvent]) -> Page[Any] | Response:
    asked: EventQuery = call.query
    _check_period(asked)
    wanted = EventFilter(asked.since, asked.until, key_id, asked.model, asked.adapter, asked.work, asked.status, asked.request_id)

    async def rows(part: Part) -> list[usage.UsageEvent]:
        return await usage.list_events(api.db, scope, part, wanted=wanted, with_waste=kind is OperatorUsageEvent)

    if wants_csv(call, asked):
        return await csv_response(call, _filename("usage-events", asked), _event_columns(kind), _portions(rows, lambda row: row.request_id))
    found = await rows(Part(asked.limit, asked.after))
    return page_of([_shown_event(row, kind) for row in found], [row.request_id for row in found], asked.limit)


#: Fields whose names differ between the API and the ledger.
_OF_LEDGER = {"adapter": "adapter_name", "engine_adapter": "adapter"}


def _shown_event(row: usage.UsageEvent, kind: type[UsageEvent]) -> UsageEvent:
    return kind(**{name: getattr(row, _OF_LEDGER.get(name, name)) for name in kind.__struct_fields__})


def _event_columns(kind: type[Struct]) -> Columns[usage.UsageEvent]:
    columns: dict[str, Callable[[usage.UsageEvent], Any]] = {}
    for name in kind.__struct_fields__:
        if name == "charge_picousd":
            columns["charge_usd"] = lambda row: dollars(row.charge_picousd, PICO)
        elif name == "tenant_id":
            columns[name] = lambda row: row.tenant_id or PROBES
        else:
            columns[name] = _getter(_OF_LEDGER.get(name, name))
    return columns


async def check_usage(api: Api, call: ApiCall[None, CheckQuery]) -> UsageCheck:
    """Compare the daily sums of some days with the ledger."""
    _check_period(call.query)
    until = call.query.until or datetime.now(UTC).date()
    since = call.query.since or until - timedelta(days=1)
    if since > until or (until - since).days >= MAX_CHECKED_DAYS:
        raise InvalidRequest(
            f"A comparison takes at most {MAX_CHECKED_DAYS} days, and {since} to {until} is not such a period. Ask for fewer days.",
            code="out_of_range",
            param="since",
        )
    events, differences = 0, []
    for number in range((until - since).days + 1):
        day = since + timedelta(days=number)
        count, found = await usage_days.compare(api.db, day)
        events += count
        differences += [UsageDifference(day=day, table=one.table, group=dict(one.group), more=dict(one.more)) for one in found]
    return UsageCheck(since=since, until=until, events=events, differences=differences)


async def report_cogs(api: Api, call: ApiCall[None, CogsQuery]) -> Cogs | Response:
    """Report engine time, its cost, the charge and the margin, by some of the dimensions."""
    _check_period(call.query)
    by = _dimensions(call.query.by, Dimension)
    if Dimension.ADAPTER in by:
        # An adapter's name is unique only within its tenant.
        by = [dimension for dimension in Dimension if dimension in (*by, Dimension.TENANT)]
    since, until = call.query.since, call.query.until
    # In a thread, because every tenant's stream waits for the event loop.
    found = await asyncio.to_thread(
        cogs.report,
        await engine_time.list_engine_time(api.db, since=since, until=until),
        await engine_time.list_work(api.db, since=since, until=until),
        await engine_time.list_charges(api.db, since=since, until=until),
        by,
    )
    if len(found.lines) > MAX_COGS_LINES:
        raise InvalidRequest(
            f"This report has {len(found.lines):,} lines, of at most {MAX_COGS_LINES:,}. Ask for fewer days, or group by less.",
            code="too_many_lines",
            param="by",
        )
    if wants_csv(call, call.query):
        return await csv_response(call, _filename("cogs", call.query), _cogs_columns(by), _whole(found.lines))
    return Cogs(
        by=by,
        data=[CogsLine(**_who(line, by), **_money(line)) for line in found.lines],
        total=CogsTotal(**_money(found.total)),
        idle_capacity=_idle_capacity(found.total.ms),
        reconciliation=Reconciliation(engine_ms=found.engine_ms, allocated_ms=found.allocated_ms, unallocated_ms=found.unallocated_ms),
    )


async def _whole(items: Sequence[Item]) -> AsyncIterator[Sequence[Item]]:
    for first in range(0, len(items), PORTION):
        yield items[first : first + PORTION]


def _idle_capacity(ms: dict[EnginePhase, int]) -> IdleCapacity:
    used = ms[EnginePhase.BACKGROUND]
    whole = used + ms[EnginePhase.IDLE]
    return IdleCapacity(ms=whole, used_ms=used, used_ratio=round(used / whole, 4) if whole else None)


def _who(line: cogs.Shown, by: Sequence[Dimension]) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    consumer = line.consumer
    if Dimension.DAY in by:
        shown["day"] = line.day
    if Dimension.MONTH in by and line.day is not None:
        shown["month"] = _month(line.day)
    if consumer is None:
        return shown
    if Dimension.TENANT in by:
        shown |= {"tenant_id": consumer.tenant_id, "tenant": consumer.tenant}
    if Dimension.ADAPTER in by or Dimension.MODEL in by:
        shown["base_model"] = consumer.base_model
    if Dimension.ADAPTER in by:
        shown["adapter"] = consumer.adapter
    if Dimension.WORK in by:
        shown["work"] = consumer.work
    return shown


def _money(line: cogs.Shown) -> dict[str, Any]:
    return {
        "engine_ms": EngineMs(total=sum(line.ms.values()), **{phase.value: ms for phase, ms in line.ms.items()}),
        "cost_microusd": line.cost_microusd,
        "charge_microusd": line.charge_microusd,
        "margin_microusd": line.margin_microusd,
        "margin_ratio": line.margin_ratio,
        "unpriced_requests": line.unpriced_requests,
    }


def _cogs_columns(by: Sequence[Dimension]) -> Columns[cogs.Shown]:
    """Return the columns of a cost report, the same for all reports by the same dimensions."""
    fields: dict[Dimension, tuple[str, ...]] = {Dimension.TENANT: ("tenant_id", "tenant"), Dimension.MODEL: ("base_model",)}
    fields |= {Dimension.ADAPTER: ("base_model", "adapter")}
    names = dict.fromkeys(name for dimension in by for name in fields.get(dimension, (dimension.value,)))

    def who(name: str) -> Callable[[cogs.Shown], Any]:
        if name == "tenant":
            return lambda line: _who(line, by).get("tenant") or NO_TENANT
        return lambda line: _who(line, by).get(name)

    def phase_ms(phase: EnginePhase) -> Callable[[cogs.Shown], int]:
        return lambda line: line.ms[phase]

    columns: dict[str, Callable[[cogs.Shown], Any]] = {name: who(name) for name in names}
    columns["engine_ms"] = lambda line: sum(line.ms.values())
    columns |= {f"{phase.value}_ms": phase_ms(phase) for phase in EnginePhase}
    columns |= {
        "cost_usd": lambda line: dollars(line.cost_microusd, MICRO),
        "charge_usd": lambda line: dollars(line.charge_microusd, MICRO),
        "margin_usd": lambda line: dollars(line.margin_microusd, MICRO),
        "margin_ratio": lambda line: line.margin_ratio,
        "unpriced_requests": lambda line: line.unpriced_requests,
    }
    return columns
