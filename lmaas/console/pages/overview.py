"""The overview: usage of today and this month against the budget, what runs, and what failed."""

from datetime import timedelta
from typing import Any

from starlette.responses import Response

from lmaas.api.table import (
    GET_OWN_TENANT,
    GET_TENANT,
    LIST_ALL_EVENTS,
    LIST_BATCHES,
    LIST_EVENTS,
    LIST_MODELS,
    LIST_REPLICAS,
    REPORT_ALL_USAGE,
    REPORT_USAGE,
)
from lmaas.console.api import Unread
from lmaas.console.command import command
from lmaas.console.page import EVERYONE, Page, Section, Visit, get
from lmaas.console.reports import DAYS, MICROUSD, chart, today

#: The failed requests that are shown, of the last FAILED_DAYS.
FAILED, FAILED_DAYS = 5, 7
#: The newest batches, and the replicas, among which those that run are looked for.
BATCHES, REPLICAS = 20, 50
OPEN = frozenset({"validating", "in_progress", "finalizing", "cancelling"})
FIGURES = ("requests", "failed_requests", "unpriced_requests", "prompt_tokens", "completion_tokens", "charge_microusd")


async def show(visit: Visit) -> Response:
    """Show the overview."""
    of_all = visit.person.is_operator
    whose = {"tenant": visit.tenant} if of_all and visit.tenant else {}
    first = min(today() - timedelta(days=DAYS - 1), today().replace(day=1))
    calls: dict[str, Any] = {
        "days": visit.api.send(REPORT_ALL_USAGE if of_all else REPORT_USAGE, query={"by": "day", "since": first, "limit": 100, **whose}),
        "failed": visit.api.send(
            LIST_ALL_EVENTS if of_all else LIST_EVENTS,
            query={"status": "failed", "since": today() - timedelta(days=FAILED_DAYS - 1), "limit": FAILED, **whose},
        ),
    }
    if not of_all:
        calls["owner"] = visit.api.send(GET_OWN_TENANT)
    elif visit.tenant:
        calls["owner"] = visit.api.send(GET_TENANT, tenant=visit.tenant)
    found = await visit.api.read_all(**calls, **_running(visit))
    days = [] if isinstance(found["days"], Unread) else found["days"]["data"]
    month = [line for line in days if line["day"] >= str(today().replace(day=1))]
    return visit.render(
        "overview.html",
        today=_sums([line for line in days if line["day"] == str(today())]),
        month=_sums(month),
        budget=_budget(found.get("owner")),
        charge_chart=chart(days, (("charge", "charge_microusd"),), "$", MICROUSD),
        request_chart=chart(days, (("requests", "requests"), ("failed", "failed_requests"))),
        command=command(visit, *(["--tenant", visit.tenant] if of_all and visit.tenant else []), "usage", "--by", "day"),
        open_states=OPEN,
        **found,
    )


async def show_running(visit: Visit) -> Response:
    """Show the part of the page about running work, which htmx polls."""
    found = await visit.api.read_all(**_running(visit))
    return visit.render("overview_running.html", open_states=OPEN, **found)


def _running(visit: Visit) -> dict[str, Any]:
    """Return the calls about what runs: pools and replicas for an operator, otherwise the tenant's batches."""
    if visit.person.is_operator and not visit.tenant:
        return {
            "models": visit.api.send(LIST_MODELS, query={"limit": REPLICAS}),
            "replicas": visit.api.send(LIST_REPLICAS, query={"limit": REPLICAS}),
        }
    return {"batches": visit.api.send(LIST_BATCHES, query={"limit": BATCHES})}


def _sums(lines: list[dict[str, Any]]) -> dict[str, int]:
    return {name: sum(line[name] for line in lines) for name in FIGURES}


def _budget(owner: dict[str, Any] | Unread | None) -> int | None:
    """Return the tenant's budget of a month in micro-dollars, if it has one."""
    return None if owner is None or isinstance(owner, Unread) else owner["effective_limits"]["budget_per_month"]


PAGE = Page("", "Overview", Section.HOME, EVERYONE, (get("", show), get("/running", show_running)))
