"""The overview: what was used today, and what it costs."""

from datetime import UTC, datetime
from typing import Any

from starlette.responses import Response

from lmaas.api.table import REPORT_ALL_USAGE, REPORT_USAGE
from lmaas.console.api import Unread
from lmaas.console.page import EVERYONE, Page, Section, Visit, get


async def show(visit: Visit) -> Response:
    """Show the figures of today."""
    day = datetime.now(UTC).date().isoformat()
    period: dict[str, Any] = {"since": day, "until": day}
    report = REPORT_ALL_USAGE if visit.person.is_operator else REPORT_USAGE
    if visit.person.is_operator and visit.tenant:
        period["tenant"] = visit.tenant
    found = await visit.api.read_all(usage=visit.api.send(report, query=period))
    lines = [] if isinstance(found["usage"], Unread) else found["usage"]["data"]
    today = {
        "requests": sum(line["requests"] for line in lines),
        "tokens": sum(line["prompt_tokens"] + line["completion_tokens"] for line in lines),
        "charge": sum(line["charge_microusd"] for line in lines),
    }
    return visit.render("overview.html", usage=found["usage"], today=today)


PAGE = Page("", "Overview", Section.HOME, EVERYONE, (get("", show),))
