"""Money, for operators: what engines cost, what was charged, the margin, and who caused idle time."""

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import Response

from lmaas.api.table import REPORT_COGS
from lmaas.console.api import Unread
from lmaas.console.command import command
from lmaas.console.page import NO_FIELDS, OPERATORS, Fields, Page, Section, Visit, get
from lmaas.console.reports import MICROUSD, chart, csv, period

PATH = "/money"
GROUPS = (
    ("tenant", "tenant"),
    ("tenant,adapter", "tenant and adapter"),
    ("model", "model"),
    ("day", "day"),
    ("month", "month"),
    ("work", "kind of work"),
)
#: The most lines that the page shows, those with the highest cost. The CSV has all.
MAX_LINES = 100
#: The most tenants of the table of idle time.
MAX_IDLE = 20


def _query(visit: Visit) -> dict[str, str]:
    asked = visit.query.get("by", "")
    return period(visit) | {"by": asked if asked in {name for name, _ in GROUPS} else GROUPS[0][0]}


async def show(visit: Visit) -> Response:
    """Show costs, charges and margins of a period. The report takes seconds for many tenants and adapters, so the page comes first and then
    requests it (`whole`)."""
    query = _query(visit)
    shown = command(visit, "cogs", *(word for name in ("since", "until", "by") if query[name] for word in (f"--{name}", query[name])))
    frame: dict[str, Any] = {"query": query, "groups": GROUPS, "command": shown}
    if not visit.query.get("whole"):
        return visit.render("money.html", whole=False, errors=NO_FIELDS, **frame)
    days = period(visit)
    calls = {
        "report": visit.api.send(REPORT_COGS, query=query),
        "idle": visit.api.send(REPORT_COGS, query=days | {"by": "tenant,model"}),
    }
    if query["by"] != "day":
        calls["daily"] = visit.api.send(REPORT_COGS, query=days | {"by": "day"})
    found = await visit.api.read_all(**calls)
    found.setdefault("daily", found["report"])
    errors = Fields({each.param: each.message for each in found.values() if isinstance(each, Unread) and each.param in query})
    return visit.render(
        "money_part.html" if visit.is_part else "money.html",
        status=400 if errors else 200,
        whole=True,
        errors=errors,
        lines=_lines(found["report"], query["by"]),
        most=MAX_LINES,
        causes=_causes(found["idle"]),
        chart=_chart(found["daily"]),
        **frame,
        **found,
    )


def _lines(report: Mapping[str, Any] | Unread, by: str) -> list[Mapping[str, Any]]:
    """Return the lines to show: the newest days first, or the most expensive ones."""
    if isinstance(report, Unread):
        return []
    name = by if by in ("day", "month") else "cost_microusd"
    return sorted(report["data"], key=lambda line: line[name], reverse=True)[:MAX_LINES]


def _causes(report: Mapping[str, Any] | Unread) -> list[dict[str, Any]]:
    """Return whose idle time cost how much, the most expensive first. Each line of the report is about one model, and so about one rate."""
    if isinstance(report, Unread):
        return []
    found: dict[str | None, dict[str, Any]] = {}
    for line in report["data"]:
        time = line["engine_ms"]
        cause = found.setdefault(line["tenant"], {"tenant": line["tenant"], "idle_ms": 0, "cost_microusd": 0})
        cause["idle_ms"] += time["idle"]
        cause["cost_microusd"] += round(line["cost_microusd"] * time["idle"] / time["total"]) if time["total"] else 0
    idle = [cause for cause in found.values() if cause["idle_ms"]]
    return sorted(idle, key=lambda cause: (cause["cost_microusd"], cause["idle_ms"]), reverse=True)[:MAX_IDLE]


def _chart(report: Mapping[str, Any] | Unread) -> dict[str, Any] | None:
    if isinstance(report, Unread):
        return None
    lines: Sequence[Mapping[str, Any]] = report["data"]
    return chart(lines, (("cost", "cost_microusd"), ("charge", "charge_microusd"), ("margin", "margin_microusd")), "$", MICROUSD)


async def show_csv(visit: Visit) -> Response:
    """Return the report as CSV."""
    return await csv(visit, REPORT_COGS, _query(visit))


PAGE = Page(PATH, "Money", Section.OPERATIONS, OPERATORS, (get(PATH, show), get(f"{PATH}.csv", show_csv)))
