"""The common parts of the report pages: periods, charts, and CSV as it comes from the API."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, date, datetime, timedelta
from typing import Any

import httpx
from starlette.responses import Response, StreamingResponse

from lmaas.api.operation import Operation
from lmaas.console.page import Visit

#: The days of a report by default.
DAYS = 30
#: The most days of a chart.
MAX_DAYS = 1000
MICROUSD = 1_000_000
_COPIED = ("content-type", "content-disposition")


def today() -> date:
    """Return the day (UTC)."""
    return datetime.now(UTC).date()


def period(visit: Visit) -> dict[str, str]:
    """Return the first and the last requested day: the last DAYS if there are none. The API checks them."""
    until = visit.query.get("until", "").strip()
    since = visit.query.get("since", "").strip()
    if not since and not until:
        return {"since": str(today() - timedelta(days=DAYS - 1)), "until": str(today())}
    return {"since": since, "until": until}


def chart(lines: Sequence[Mapping[str, Any]], series: Sequence[tuple[str, str]], unit: str = "", divisor: int = 1) -> dict[str, Any] | None:
    """Return the data of a chart by day (`ui.chart`), or None for fewer than two days. `series` are labels and the names of figures; days
    without a line are zero."""
    by_day = {str(line["day"]): line for line in lines}
    if not by_day:
        return None
    first, last = date.fromisoformat(min(by_day)), date.fromisoformat(max(by_day))
    days = [str(first + timedelta(days=number)) for number in range(min((last - first).days + 1, MAX_DAYS))]
    if len(days) < 2:
        return None

    def values(name: str) -> list[float]:
        return [by_day[day][name] / divisor if day in by_day else 0 for day in days]

    return {"x": days, "series": [{"label": label, "values": values(name)} for label, name in series], "unit": unit}


async def csv(visit: Visit, operation: Operation, query: Mapping[str, Any]) -> Response:
    """Return a report of the API as a file, as it comes. Raises ApiError."""
    exits = AsyncExitStack()
    address = visit.api.address(operation, {})
    upstream = await exits.enter_async_context(visit.api.stream("GET", address, query={**query, "format": "csv"}))
    headers = {name: value for name, value in upstream.headers.items() if name in _COPIED}
    return StreamingResponse(_content(upstream, exits), headers=headers)


async def _content(upstream: httpx.Response, exits: AsyncExitStack) -> AsyncIterator[bytes]:
    async with exits:
        async for chunk in upstream.aiter_bytes():
            yield chunk
