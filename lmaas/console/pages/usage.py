"""Usage and cost: by day, model, adapter and key, down to the single request, whose text is stored nowhere."""

from typing import Any

from starlette.responses import Response

from lmaas.api.table import LIST_ALL_EVENTS, LIST_EVENTS, REPORT_ALL_USAGE, REPORT_USAGE
from lmaas.console.api import Unread
from lmaas.console.command import command
from lmaas.console.page import EVERYONE, NO_FIELDS, Fields, Page, Section, Visit, get
from lmaas.console.reports import MAX_DAYS, MICROUSD, chart, csv, period
from lmaas.errors import NotFound
from lmaas.states import UsageStatus, WorkClass

PATH = "/usage"
REQUESTS = f"{PATH}/requests"
PAGE_SIZE = 100
GROUPS = (("model,adapter", "model and adapter"), ("day", "day"), ("month", "month"), ("key", "key"), ("work", "kind of work"))
OPERATORS_GROUPS = (("tenant", "tenant"), *GROUPS)
_FILTERS = ("key", "model", "adapter", "work")
_EVENT_FILTERS = (*_FILTERS, "status", "request_id")


def _report_query(visit: Visit) -> dict[str, Any]:
    """Return the query of the report for an address."""
    groups = OPERATORS_GROUPS if visit.person.is_operator else GROUPS
    asked = visit.query.get("by", "")
    by = asked if asked in {name for name, _ in groups} else groups[0][0]
    return period(visit) | {name: visit.query.get(name, "").strip() for name in _FILTERS} | {"by": by} | _tenant(visit)


def _event_query(visit: Visit) -> dict[str, Any]:
    """Return the query of the requests for an address. One request is found on any day."""
    given = {name: visit.query.get(name, "").strip() for name in _EVENT_FILTERS}
    anywhen = given["request_id"] and "since" not in visit.query
    days = {"since": "", "until": ""} if anywhen else period(visit)
    return days | given | _tenant(visit)


def _tenant(visit: Visit) -> dict[str, str]:
    return {"tenant": visit.tenant} if visit.person.is_operator and visit.tenant else {}


def _errors(query: dict[str, Any], *answers: Any) -> Fields:
    """Return the messages about fields of the filter."""
    return Fields({found.param: found.message for found in answers if isinstance(found, Unread) and found.param in query})


def _options(query: dict[str, Any], *names: str) -> list[str]:
    return [word for name in names if query.get(name) for word in (f"--{name.replace('_', '-')}", str(query[name]))]


def _command(visit: Visit, query: dict[str, Any], *words: str) -> str:
    tenant = ["--tenant", visit.tenant] if visit.person.is_operator and visit.tenant else []
    return command(visit, *tenant, "usage", *words, *_options(query, "since", "until", "by", *_EVENT_FILTERS))


async def show(visit: Visit) -> Response:
    """Show the report: its sums, charts by day, and a table by what was chosen."""
    query = _report_query(visit)
    operation = REPORT_ALL_USAGE if visit.person.is_operator else REPORT_USAGE
    daily = {**query, "by": "day", "limit": MAX_DAYS}
    found = await visit.api.read_all(
        days=visit.api.send(operation, query=daily),
        report=visit.api.send(operation, query={**query, "limit": PAGE_SIZE, "after": visit.query.get("after")}),
    )
    days = [] if isinstance(found["days"], Unread) else found["days"]["data"]
    names = ("requests", "failed_requests", "unpriced_requests", "prompt_tokens", "cached_tokens", "completion_tokens", "charge_microusd")
    errors = _errors(query, *found.values())
    charts = [
        ("Charge by day", chart(days, (("charge", "charge_microusd"),), "$", MICROUSD)),
        ("Tokens by day", chart(days, (("prompt", "prompt_tokens"), ("completion", "completion_tokens")))),
        ("Requests by day", chart(days, (("requests", "requests"), ("failed", "failed_requests")))),
    ]
    return visit.render(
        "usage.html",
        status=400 if errors else 200,
        query=query,
        errors=errors,
        charts=[each for each in charts if each[1] is not None],
        total={name: sum(line[name] for line in days) for name in names},
        groups=OPERATORS_GROUPS if visit.person.is_operator else GROUPS,
        works=[work.value for work in WorkClass],
        requests_of=_requests_of(visit, query),
        command=_command(visit, query),
        **found,
    )


def _requests_of(visit: Visit, query: dict[str, Any]) -> Any:
    """Return a function from a line of the report to the address of its requests."""

    def address(line: dict[str, Any]) -> str:
        chosen = {name: query[name] for name in ("since", "until", *_FILTERS)}
        if "day" in line:
            chosen |= {"since": line["day"], "until": line["day"]}
        for name, value in (("key", "key_id"), ("model", "model"), ("adapter", "adapter"), ("work", "work")):
            if line.get(value):
                chosen[name] = line[value]
        if visit.person.is_operator and line.get("tenant"):
            chosen["tenant"] = line["tenant"]
        return visit.href(REQUESTS, **chosen)

    return address


async def show_csv(visit: Visit) -> Response:
    """Return the report as CSV."""
    return await csv(visit, REPORT_ALL_USAGE if visit.person.is_operator else REPORT_USAGE, _report_query(visit))


async def show_requests(visit: Visit) -> Response:
    """Show a page of requests, the latest first."""
    query = _event_query(visit)
    operation = LIST_ALL_EVENTS if visit.person.is_operator else LIST_EVENTS
    asked = {**query, "limit": PAGE_SIZE, "after": visit.query.get("after")}
    found = await visit.api.read_all(events=visit.api.send(operation, query=asked))
    errors = _errors(query, *found.values())
    return visit.render(
        "usage_requests.html",
        status=400 if errors else 200,
        query=query,
        errors=errors,
        statuses=[status.value for status in UsageStatus],
        command=_command(visit, query, "--events"),
        **found,
    )


async def show_requests_csv(visit: Visit) -> Response:
    """Return the requests as CSV."""
    return await csv(visit, LIST_ALL_EVENTS if visit.person.is_operator else LIST_EVENTS, _event_query(visit))


async def show_request(visit: Visit) -> Response:
    """Show one request: how it ended, where its time went, and what it was charged."""
    request = visit.path["request"]
    found = await visit.api.send(LIST_ALL_EVENTS if visit.person.is_operator else LIST_EVENTS, query={"request_id": request, "limit": 1})
    if not found["data"]:
        raise NotFound("There is no such request in the ledger. A request appears there a few seconds after its end.")
    event = found["data"][0]
    shown = _command(visit, {"request_id": request}, "--events")
    return visit.render("usage_request.html", event=event, errors=NO_FIELDS, command=shown)


PAGE = Page(
    PATH,
    "Usage and cost",
    Section.ACCOUNT,
    EVERYONE,
    (
        get(PATH, show),
        get(f"{PATH}.csv", show_csv),
        get(REQUESTS, show_requests),
        get(f"{REQUESTS}.csv", show_requests_csv),
        get(f"{REQUESTS}/{{request}}", show_request),
    ),
)
