"""Handlers for usage and costs."""

import asyncio
from typing import Any

from lmaas.api.context import Api, ApiCall
from lmaas.api.operation import page_of
from lmaas.api.shapes.common import List, Page, Paging
from lmaas.api.shapes.usage import (
    Cogs,
    CogsLine,
    CogsQuery,
    CogsTotal,
    EngineMs,
    IdleCapacity,
    OperatorEvents,
    OperatorPeriod,
    OperatorUsage,
    OperatorUsageEvent,
    Period,
    Reconciliation,
    Usage,
    UsageEvent,
)
from lmaas.errors import InvalidRequest
from lmaas.metering import cogs
from lmaas.metering.pricing import microusd
from lmaas.states import Dimension, EnginePhase
from lmaas.store import engine_time, usage
from lmaas.store.paging import Part
from lmaas.store.scopes import OPERATOR, AnyScope
from lmaas.store.tenants import get_tenant

#: The reason of a wasted attempt that has not ended, or whose result is about to be stored.
UNFINISHED = "unfinished"


async def _scope_of(api: Api, tenant: str | None) -> AnyScope:
    """Return the scope of the tenant that an operator asks for, or of all."""
    return OPERATOR if tenant is None else (await get_tenant(api.db, tenant)).id


async def report_usage(api: Api, call: ApiCall[None, Period]) -> List[Usage]:
    """Report the use of one's own tenant."""
    rows = await usage.report(api.db, call.tenant_id, since=call.query.since, until=call.query.until)
    return List(data=[Usage(**_shown(row)) for row in rows])


async def report_all_usage(api: Api, call: ApiCall[None, OperatorPeriod]) -> List[OperatorUsage]:
    """Report the use of one tenant or of all, with the attempts that were wasted."""
    scope, period = await _scope_of(api, call.query.tenant), call.query
    rows = await usage.report(api.db, scope, since=period.since, until=period.until)
    waste: dict[tuple[Any, ...], dict[str, int]] = {}
    for each in await usage.list_waste(api.db, scope, since=period.since, until=period.until):
        by_code = waste.setdefault((each.day, each.tenant, each.model, each.work), {})
        by_code[each.code or UNFINISHED] = by_code.get(each.code or UNFINISHED, 0) + each.tokens
    lines = [(_shown(row), waste.pop((row.day, row.tenant, row.model, row.work), {})) for row in rows]
    # A model of which a tenant has only wasted attempts on a day has a line as well.
    for (day, tenant, model, work), by_code in waste.items():
        lines.append((_shown(usage.UsageRow(day, tenant, model, work, *[0] * 7)), by_code))
    return List(data=[OperatorUsage(**shown, wasted_tokens=sum(codes.values()), waste=codes) for shown, codes in lines])


def _shown(row: usage.UsageRow) -> dict[str, Any]:
    shown = {name: getattr(row, name) for name in usage.UsageRow.__slots__ if name != "charge_picousd"}
    return shown | {"charge_microusd": microusd(row.charge_picousd)}


async def list_events(api: Api, call: ApiCall[None, Paging]) -> Page[UsageEvent]:
    """Return a page of the events of one's own tenant, newest first, without what only operators see."""
    return await _events(api, call.tenant_id, call.query, UsageEvent, with_waste=False)


async def list_all_events(api: Api, call: ApiCall[None, OperatorEvents]) -> Page[OperatorUsageEvent]:
    """Return a page of the events of one tenant or of all, newest first."""
    return await _events(api, await _scope_of(api, call.query.tenant), call.query, OperatorUsageEvent, with_waste=True)


async def _events(api: Api, scope: AnyScope, asked: Paging, kind: type[UsageEvent], *, with_waste: bool) -> Page[Any]:
    rows = await usage.list_events(api.db, scope, Part(asked.limit, asked.after), with_waste=with_waste)
    shown = [kind(**{name: getattr(row, name) for name in kind.__struct_fields__}) for row in rows]
    return page_of(shown, [row.request_id for row in rows], asked.limit)


async def report_cogs(api: Api, call: ApiCall[None, CogsQuery]) -> Cogs:
    """Report engine time, its cost, the charge and the margin, by some of the dimensions."""
    asked = call.query.by.split(",")
    if not set(asked) <= set(Dimension):
        raise InvalidRequest(f"'by' must name some of: {','.join(Dimension)}.", code="out_of_range", param="by")
    # An adapter's name is unique only within its tenant.
    by = [name for name in Dimension if name in asked or (name is Dimension.TENANT and Dimension.ADAPTER in asked)]
    since, until = call.query.since, call.query.until
    # In a thread, because every tenant's stream waits for the event loop.
    found = await asyncio.to_thread(
        cogs.report,
        await engine_time.list_engine_time(api.db, since=since, until=until),
        await engine_time.list_work(api.db, since=since, until=until),
        await engine_time.list_charges(api.db, since=since, until=until),
        by,
    )
    return Cogs(
        by=by,
        data=[CogsLine(**_who(line, by), **_money(line)) for line in found.lines],
        total=CogsTotal(**_money(found.total)),
        idle_capacity=_idle_capacity(found.total.ms),
        reconciliation=Reconciliation(engine_ms=found.engine_ms, allocated_ms=found.allocated_ms, unallocated_ms=found.unallocated_ms),
    )


def _idle_capacity(ms: dict[EnginePhase, int]) -> IdleCapacity:
    used = ms[EnginePhase.BACKGROUND]
    whole = used + ms[EnginePhase.IDLE]
    return IdleCapacity(ms=whole, used_ms=used, used_ratio=round(used / whole, 4) if whole else None)


def _who(line: cogs.Shown, by: list[Dimension]) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    if Dimension.DAY in by:
        shown["day"] = line.day
    if Dimension.TENANT in by and line.consumer is not None:
        shown |= {"tenant_id": line.consumer.tenant_id, "tenant": line.consumer.tenant}
    if Dimension.ADAPTER in by and line.consumer is not None:
        shown |= {"base_model": line.consumer.base_model, "adapter": line.consumer.adapter}
    if Dimension.WORK in by and line.consumer is not None:
        shown["work"] = line.consumer.work
    return shown


def _money(line: cogs.Shown) -> dict[str, Any]:
    return {
        "engine_ms": EngineMs(total=sum(line.ms.values()), **{phase.value: ms for phase, ms in line.ms.items()}),
        "cost_microusd": line.cost_microusd,
        "charge_microusd": line.charge_microusd,
        "margin_microusd": line.margin_microusd,
        "margin_ratio": line.margin_ratio,
    }
