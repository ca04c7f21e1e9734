"""Reports as CSV (RFC 4180) for spreadsheets: rows in the order of a report, sent as they are read."""

import asyncio
import csv
import io
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse

from lmaas.api.context import ApiCall
from lmaas.api.shapes.usage import CogsQuery, Format, ReportQuery
from lmaas.errors import LmaasError

log = logging.getLogger(__name__)

Item = TypeVar("Item")
#: The columns of a report, by their names in the first row.
Columns = Mapping[str, Callable[[Item], Any]]

MEDIA = "text/csv"
#: Items that are read at a time.
PORTION = 500
#: A spreadsheet takes a text that begins like this for a formula. Some also take the wide forms of these characters.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # noqa: RUF001 (these very characters)


def wants_csv(call: ApiCall[Any, Any], query: ReportQuery | CogsQuery) -> bool:
    """Return whether a call asks for CSV, by its query or its `Accept` header."""
    return query.format is Format.CSV or MEDIA in call.request.headers.get("accept", "").lower()


async def csv_response(call: ApiCall[Any, Any], filename: str, columns: Columns[Item], portions: AsyncIterator[Sequence[Item]]) -> Response:
    """Return a response with a row for each item. What goes wrong before the first items are there is raised."""
    headers = {"content-disposition": f'attachment; filename="{filename}"', "x-content-type-options": "nosniff"}
    if call.request.method == "HEAD":
        return Response(headers=headers, media_type=MEDIA)
    first = await anext(portions, ())
    return StreamingResponse(_rows(call, columns, first, portions), headers=headers, media_type=MEDIA)


async def _rows(
    call: ApiCall[Any, Any], columns: Columns[Item], first: Sequence[Item], rest: AsyncIterator[Sequence[Item]]
) -> AsyncIterator[bytes]:
    yield lines([list(columns)])
    try:
        # In a thread, because every tenant's stream waits for the event loop.
        yield await asyncio.to_thread(_encoded, columns, first)
        async for portion in rest:
            yield await asyncio.to_thread(_encoded, columns, portion)
    except LmaasError as error:
        # The body breaks off without its end, so the client sees that a part is missing.
        extra = {"request_id": call.request.scope["request_id"], "action": "report.download", "detail": error.message}
        log.warning("a report was cut off", extra=extra)
        raise ClientDisconnect from error


def _encoded(columns: Columns[Item], items: Iterable[Item]) -> bytes:
    return lines([[cell(value(item)) for value in columns.values()] for item in items])


def lines(rows: Iterable[Sequence[str]]) -> bytes:
    """Return rows of texts as CSV in UTF-8."""
    output = io.StringIO(newline="")
    csv.writer(output, lineterminator="\r\n").writerows(rows)
    return output.getvalue().encode(errors="replace")


def cell(value: Any) -> str:
    """Return a value as the text of a cell. A text that looks like a formula begins with an apostrophe."""
    match value:
        case None:
            text = ""
        case str():
            return f"'{value}" if value.startswith(_FORMULA) else str(value)
        case bool():
            text = "true" if value else "false"
        case datetime() | date():
            text = value.isoformat()
        case Mapping():
            text = "; ".join(f"{name} {count}" for name, count in value.items())
        case Decimal():
            text = f"{value:f}"
        case _:
            text = str(value)
    return text


def dollars(amount: int, digits: int) -> Decimal:
    """Return an amount of money, in units of 10 to the power of -`digits` dollars, as dollars with all its digits."""
    return Decimal(amount).scaleb(-digits)
