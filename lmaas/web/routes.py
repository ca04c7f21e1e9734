"""OpenAI's endpoints, and those for load balancers and Prometheus."""

import asyncio
import functools
from collections.abc import Callable
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from lmaas.errors import Forbidden, InternalError, LmaasError, ModelNotFound, Unavailable
from lmaas.http import JsonResponse, api_key
from lmaas.inference.catalog import ListedModel
from lmaas.inference.delivery import Endpoint
from lmaas.inference.serving import Gateway, complete
from lmaas.protocols.parameters.request import EngineRequest, read_chat, read_completion
from lmaas.web.call import Call

CHAT = Endpoint("/v1/chat/completions", "chatcmpl")
COMPLETION = Endpoint("/v1/completions", "cmpl")


class Completions:
    """An ASGI endpoint that runs the pipeline."""

    def __init__(self, gateway: Gateway, endpoint: Endpoint, read: Callable[[dict[str, Any]], EngineRequest]) -> None:
        self._gateway, self._endpoint, self._read = gateway, endpoint, read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        try:
            await complete(self._gateway, Call(scope, receive, send), self._endpoint, self._read)
        except LmaasError as error:
            self._gateway.metrics.refused(self._endpoint.path, error.kind, error.error_code)
            raise
        except ClientDisconnect:
            raise  # no response is sent
        except Exception:
            self._gateway.metrics.refused(self._endpoint.path, InternalError.kind, InternalError.code)
            raise


def completions(gateway: Gateway) -> dict[str, Completions]:
    """Return the endpoints that nearly all requests go to, by path."""
    return {
        CHAT.path: Completions(gateway, CHAT, read_chat),
        COMPLETION.path: Completions(gateway, COMPLETION, read_completion),
    }


def routes(gateway: Gateway, ready: Callable[[], Any]) -> list[BaseRoute]:
    """Return the gateway's routes. `/readyz` awaits `ready`, which raises an error if a service is away."""
    return [
        *(Route(path, endpoint, methods=["POST"]) for path, endpoint in completions(gateway).items()),
        Route("/v1/models", functools.partial(_list_models, gateway)),
        Route("/v1/models/{model:path}", functools.partial(_get_model, gateway)),
        Route("/health", _alive),
        Route("/healthz", _alive),
        Route("/readyz", functools.partial(_ready, ready)),
        Route("/metrics", functools.partial(_metrics, gateway)),
    ]


async def _tenant(gateway: Gateway, request: Request) -> str:
    principal = await gateway.authenticate(api_key(request.scope["headers"]))
    if principal.tenant_id is None:
        raise Forbidden("An operator's key cannot call models. Use a tenant's key.")
    return principal.tenant_id


def _shown(model: ListedModel) -> dict[str, Any]:
    owner = "lmaas" if model.parent is None else "tenant"
    shown = {"id": model.name, "object": "model", "created": model.created, "owned_by": owner, "parent": model.parent}
    return shown | {"max_model_len": model.max_model_len}


async def _list_models(gateway: Gateway, request: Request) -> Response:
    models = await gateway.catalog.listed(await _tenant(gateway, request))
    return JsonResponse({"object": "list", "data": [_shown(model) for model in models]})


async def _get_model(gateway: Gateway, request: Request) -> Response:
    tenant_id, name = await _tenant(gateway, request), request.path_params["model"]
    served = await gateway.catalog.resolve(tenant_id, name)
    plain = name.partition("@")[0]
    for model in await gateway.catalog.listed(tenant_id):
        if model.name == plain:
            created = model.created if name == plain else served.created
            return JsonResponse(_shown(model) | {"id": name, "created": created})
    if served.version is None:
        raise ModelNotFound(name)
    # A pinned version of an adapter that has no live one.
    return JsonResponse(_shown(ListedModel(name, served.created, served.base.name, served.base.max_model_len)))


async def _alive(_: Request) -> Response:
    return JsonResponse({"status": "ok"})


async def _ready(ready: Callable[[], Any], _: Request) -> Response:
    try:
        async with asyncio.timeout(5):
            await ready()
    except TimeoutError:
        raise Unavailable("The database or the queue does not respond. Retry after 5 s.", retry_after_s=5) from None
    return JsonResponse({"status": "ready"})


async def _metrics(gateway: Gateway, _: Request) -> Response:
    return Response(generate_latest(gateway.metrics.registry), media_type=CONTENT_TYPE_LATEST)
