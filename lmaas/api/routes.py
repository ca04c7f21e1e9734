"""The routes of the tenant and operator APIs."""

import functools
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from lmaas.api import adapters, base_models, cogs, operations, tenants
from lmaas.api.context import Api
from lmaas.api.openapi import document
from lmaas.http import JsonResponse

Handler = Callable[[Api, Request], Awaitable[Response]]

ADAPTERS: list[tuple[str, str, Handler]] = [
    ("GET", "/adapters", adapters.list_adapters),
    ("POST", "/adapters", adapters.upload_adapter),
    ("GET", "/adapters/{name}", adapters.get_adapter),
    ("DELETE", "/adapters/{name}", adapters.delete_adapter),
    ("GET", "/adapters/{name}/versions", adapters.list_versions),
    ("POST", "/adapters/{name}/activate", adapters.activate_version),
]
KEYS: list[tuple[str, str, Handler]] = [
    ("GET", "/keys", tenants.list_keys),
    ("POST", "/keys", tenants.create_key),
    ("DELETE", "/keys/{key}", tenants.revoke_key),
]
#: For tenants' keys only: the keys of operators have no limits.
KEY_LIMITS: list[tuple[str, str, Handler]] = [("PATCH", "/keys/{key}", tenants.change_key)]
USAGE: list[tuple[str, str, Handler]] = [
    ("GET", "/usage", operations.usage_report),
    ("GET", "/usage/events", operations.usage_events),
]
OPERATOR: list[tuple[str, str, Handler]] = [
    ("GET", "/tenants", tenants.list_tenants),
    ("POST", "/tenants", tenants.create_tenant),
    ("GET", "/tenants/{tenant}", tenants.get_tenant),
    ("PATCH", "/tenants/{tenant}", tenants.change_tenant),
    ("DELETE", "/tenants/{tenant}", tenants.delete_tenant),
    *((method, "/tenants/{tenant}" + path, handler) for method, path, handler in ADAPTERS + KEYS + KEY_LIMITS),
    *KEYS,
    ("POST", "/check-adapter", adapters.check_adapter),
    ("GET", "/base-models", base_models.list_models),
    ("POST", "/base-models", base_models.create_model),
    ("GET", "/base-models/{model}", base_models.get_model),
    ("PATCH", "/base-models/{model}", base_models.change_model),
    ("DELETE", "/base-models/{model}", base_models.delete_model),
    ("GET", "/replicas", operations.list_replicas),
    ("GET", "/replicas/{replica}", operations.show_replica),
    ("DELETE", "/replicas/{replica}", operations.stop_replica),
    *USAGE,
    ("GET", "/cogs", cogs.cogs_report),
]
#: Every operation of the two APIs: method, path, handler.
OPERATIONS = [("/v1", *entry) for entry in ADAPTERS + KEYS + KEY_LIMITS + USAGE] + [("/admin/v1", *entry) for entry in OPERATOR]


def routes(api: Api) -> list[BaseRoute]:
    """Return the routes of both APIs, and of the document that describes them."""
    by_path: dict[str, dict[str, Handler]] = {}
    for prefix, method, path, handler in OPERATIONS:
        by_path.setdefault(prefix + path, {})[method] = handler
    spec = document([(method, prefix + path, handler) for prefix, method, path, handler in OPERATIONS])

    async def openapi(_: Request) -> Response:
        return JsonResponse(spec)

    return [
        Route("/openapi.json", openapi),
        *(Route(path, functools.partial(_dispatch, api, handlers), methods=list(handlers)) for path, handlers in by_path.items()),
    ]


async def _dispatch(api: Api, handlers: dict[str, Handler], request: Request) -> Response:
    # Starlette adds HEAD to GET.
    return await handlers["GET" if request.method == "HEAD" else request.method](api, request)
