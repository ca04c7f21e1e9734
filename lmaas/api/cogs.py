"""What engines cost beside what tenants are charged, over HTTP."""

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from lmaas.api.context import Api, query_date
from lmaas.errors import InvalidRequest
from lmaas.http import JsonResponse
from lmaas.metering.cogs import DIMENSIONS, Shown, report
from lmaas.store import engine_time


async def cogs_report(api: Api, request: Request) -> Response:
    """Engine time, its cost, the charge and the margin, by day, tenant and adapter, or only some of these (`?by=day,tenant`)."""
    await api.operator(request)
    text = request.query_params.get("by", ",".join(DIMENSIONS))
    by = [name for name in DIMENSIONS if name in text.split(",")]
    if not by or not set(text.split(",")) <= set(DIMENSIONS):
        raise InvalidRequest(f"'by' must name some of: {','.join(DIMENSIONS)}.", code="out_of_range", param="by")
    if "adapter" in by and "tenant" not in by:
        # Adapters of two tenants may have the same name.
        by = [name for name in DIMENSIONS if name in {*by, "tenant"}]
    since, until = query_date(request, "since"), query_date(request, "until")
    # Beside the event loop, on which every tenant's stream waits.
    found = await asyncio.to_thread(
        report,
        await engine_time.list_engine_time(api.db, since=since, until=until),
        await engine_time.list_work(api.db, since=since, until=until),
        await engine_time.list_charges(api.db, since=since, until=until),
        by,
    )
    return JsonResponse(
        {
            "object": "cogs",
            "by": by,
            "data": [_who(line, by) | _shown(line) for line in found.lines],
            "total": _shown(found.total),
            "reconciliation": {
                "engine_ms": found.engine_ms,
                "allocated_ms": found.allocated_ms,
                "unallocated_ms": found.unallocated_ms,
            },
        }
    )


def _who(line: Shown, by: list[str]) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    if "day" in by:
        shown["day"] = line.day
    if "tenant" in by and line.consumer is not None:
        shown |= {"tenant_id": line.consumer.tenant_id, "tenant": line.consumer.tenant}
    if "adapter" in by and line.consumer is not None:
        shown |= {"base_model": line.consumer.base_model, "adapter": line.consumer.adapter}
    return shown


def _shown(line: Shown) -> dict[str, Any]:
    return {
        "engine_ms": {"total": sum(line.ms.values())} | {phase.value: ms for phase, ms in line.ms.items()},
        "cost_microusd": line.cost_microusd,
        "charge_microusd": line.charge_microusd,
        "margin_microusd": line.margin_microusd,
        "margin_ratio": line.margin_ratio,
    }
