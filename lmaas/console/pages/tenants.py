"""Tenants, for operators: the list, a new one, limits, and deletion."""

import asyncio
from typing import Any, get_args

from starlette.responses import Response

from lmaas.api.shapes.tenants import Tier
from lmaas.api.table import CHANGE_TENANT, CREATE_TENANT, DELETE_TENANT, GET_TENANT, LIST_TENANTS, REPORT_ALL_USAGE
from lmaas.console.command import command
from lmaas.console.numbers import number_or_text
from lmaas.console.page import NO_FIELDS, OPERATORS, Fields, Page, Section, Visit, errors_of, get, post
from lmaas.console.pages.keys import LIMITS
from lmaas.console.reports import period
from lmaas.errors import ApiError

PATH = "/tenants"
PAGE_SIZE = 50
TIERS = get_args(Tier)
COUNTS = (("max_queued", "Requests that may wait"), ("max_adapters", "Adapters"))
_NUMBERS = tuple(name for name, _ in (*COUNTS, *LIMITS))
_FIELDS = ("name", "tier", *_NUMBERS)


async def show_list(visit: Visit) -> Response:
    """Show a page of the tenants, by name."""
    return await _list(visit, Fields({"tier": "standard"}))


async def _list(visit: Visit, form: Fields, errors: Fields = NO_FIELDS, status: int = 200) -> Response:
    query = {"limit": PAGE_SIZE, "after": visit.query.get("after")}
    found = await visit.api.read_all(tenants=visit.api.send(LIST_TENANTS, query=query))
    shown = command(visit, "tenant", "create", form.name or "NAME")
    return visit.render("tenants.html", status=status, form=form, errors=errors, tiers=TIERS, command=shown, **found)


async def create(visit: Visit) -> Response:
    """Create a tenant."""
    try:
        made = await visit.api.send(CREATE_TENANT, {"name": visit.form.name.strip(), "tier": visit.form.tier})
    except ApiError as error:
        if error.status == 401:
            raise
        return await _list(visit, visit.form, errors_of(error, _FIELDS), error.status)
    name = made["name"]
    return visit.redirect(f"{PATH}/{name}", f"The tenant {name} was created. Create its first key next.", tenant=name)


async def show(visit: Visit) -> Response:
    """Show a tenant with its limits and its usage of the last days."""
    return await _shown(visit, None)


async def _shown(visit: Visit, form: Fields | None, errors: Fields = NO_FIELDS, status: int = 200) -> Response:
    name = visit.path["name"]
    usage = visit.api.send(REPORT_ALL_USAGE, query=period(visit) | {"tenant": name, "by": "tenant"})
    tenant, found = await asyncio.gather(visit.api.send(GET_TENANT, tenant=name), visit.api.read_all(usage=usage))
    typed = form or Fields({field: "" if tenant[field] is None else str(tenant[field]) for field in _FIELDS})
    shown = command(visit, "tenant", "change", tenant["name"], "--max-queued", str(tenant["max_queued"]))
    context = {"each": tenant, "form": typed, "errors": errors, "tiers": TIERS, "limits": LIMITS, "counts": COUNTS, "command": shown}
    return visit.render("tenant.html", status=status, **context, **found)


async def change(visit: Visit) -> Response:
    """Change a tenant's tier and limits. An empty field puts the default back."""
    name = visit.path["name"]
    body: dict[str, Any] = {field: number_or_text(visit.form[field]) if visit.form[field].strip() else None for field in _NUMBERS}
    try:
        await visit.api.send(CHANGE_TENANT, body | {"tier": visit.form.tier}, tenant=name)
    except ApiError as error:
        if error.status in (401, 404):
            raise
        return await _shown(visit, visit.form, errors_of(error, _FIELDS), error.status)
    return visit.redirect(f"{PATH}/{name}", f"The tenant {name} was changed.")


async def delete(visit: Visit) -> Response:
    """Delete a tenant, if its name was typed."""
    name = visit.path["name"]
    tenant = await visit.api.send(GET_TENANT, tenant=name)
    if visit.form.confirmed.strip() != tenant["name"]:
        return await _shown(visit, None, Fields({"confirmed": f"Type the tenant's name, {tenant['name']}, to delete it."}), 400)
    await visit.api.send(DELETE_TENANT, tenant=tenant["id"])
    return visit.redirect(PATH, f"The tenant {tenant['name']} was deleted. Its usage stays for the bill.", tenant="")


PAGE = Page(
    PATH,
    "Tenants",
    Section.OPERATIONS,
    OPERATORS,
    (
        get(PATH, show_list),
        post(PATH, create),
        get(f"{PATH}/{{name}}", show),
        post(f"{PATH}/{{name}}/change", change),
        post(f"{PATH}/{{name}}/delete", delete),
    ),
)
