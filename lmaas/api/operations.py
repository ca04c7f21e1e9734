"""Replicas and usage over HTTP."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from lmaas.api.context import Api, audited, query_date
from lmaas.audit import Action
from lmaas.errors import InvalidRequest, NotFound
from lmaas.http import JsonResponse
from lmaas.metering.pricing import microusd
from lmaas.store import replicas, usage
from lmaas.store.scopes import OPERATOR, AnyScope
from lmaas.store.tenants import get_tenant

MAX_EVENTS = 1000


async def list_replicas(api: Api, request: Request) -> Response:
    """The replicas that exist; with `?ended=true` also the last ones that ended, and why."""
    await api.operator(request)
    names = await replicas.model_names(api.db)
    found = await replicas.list_replicas(api.db, ended=request.query_params.get("ended") == "true")
    return JsonResponse({"object": "list", "data": [shown_replica(row, names) for row in found]})


def shown_replica(row: replicas.Replica, names: dict[str, str]) -> dict[str, Any]:
    """A replica as the API shows it. `start` says where the time of its start went, in ms, once it is ready."""
    return {
        "object": "replica",
        "id": row.id,
        "base_model": names[row.base_model_id],
        "desired": row.desired,
        "observed": row.observed,
        "url": row.url,
        "reason": row.reason,
        "created_at": row.created_at.isoformat(),
        "ready_at": row.ready_at.isoformat() if row.ready_at else None,
        "ended_at": row.ended_at.isoformat() if row.ended_at else None,
        "start": row.start,
    }


async def show_replica(api: Api, request: Request) -> Response:
    """One replica, also one that has ended."""
    await api.operator(request)
    row = await replicas.get_replica(api.db, request.path_params["replica"])
    if row is None:
        raise NotFound("The replica does not exist.", code="replica_not_found")
    return JsonResponse(shown_replica(row, await replicas.model_names(api.db)))


async def stop_replica(api: Api, request: Request) -> Response:
    """Drain a replica and stop it. If there is demand, the controller starts another."""
    principal = await api.operator(request)
    replica_id = request.path_params["replica"]
    audit = audited(request, principal, Action.REPLICA_STOP)
    if not await replicas.desire_stop(api.db, replica_id, OPERATOR, audit=audit):
        raise NotFound("The replica does not exist, or has ended.", code="replica_not_found")
    return JsonResponse({"object": "replica", "id": replica_id, "desired": "stopped"})


async def _asked_scope(api: Api, request: Request) -> AnyScope:
    """Return whose usage a request asks for: the key's own tenant; for an operator the one of `?tenant=`, or all."""
    if request.scope["path"].startswith("/admin/"):
        await api.operator(request)
        name = request.query_params.get("tenant")
        return (await get_tenant(api.db, name)).id if name else OPERATOR
    tenant_id, _ = await api.tenant(request, manage=False)
    return tenant_id


async def usage_report(api: Api, request: Request) -> Response:
    """Requests, tokens and charges by day, tenant and model. What belongs to no tenant is the engines' probes."""
    scope = await _asked_scope(api, request)
    rows = await usage.report(api.db, scope, since=query_date(request, "since"), until=query_date(request, "until"))
    names = [name for name in usage.UsageRow.__slots__ if name != "charge_picousd"]
    data = [
        {"object": "usage", **{name: getattr(row, name) for name in names}, "charge_microusd": microusd(row.charge_picousd)} for row in rows
    ]
    return JsonResponse({"object": "list", "data": data})


async def usage_events(api: Api, request: Request) -> Response:
    """The latest events of the ledger, one for each request."""
    scope = await _asked_scope(api, request)
    text = request.query_params.get("limit", "100")
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not 0 < int(text) <= MAX_EVENTS:
        raise InvalidRequest(f"'limit' must be between 1 and {MAX_EVENTS}.", code="out_of_range", param="limit")
    rows = await usage.list_events(api.db, scope, int(text))
    # The engine's name of an adapter is nobody's business but the operator's.
    hidden = set() if request.scope["path"].startswith("/admin/") else {"adapter", "replica_id"}
    data = [
        {"object": "usage_event", **{name: getattr(row, name) for name in usage.UsageEvent.__slots__ if name not in hidden}}
        | {"created_at": row.created_at.isoformat()}
        for row in rows
    ]
    return JsonResponse({"object": "list", "data": data})
