"""The endpoints of the client protocols, the list of models, and the endpoints for load balancers and Prometheus."""

import asyncio
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from lmaas.config import Settings
from lmaas.errors import Forbidden, InternalError, LmaasError, ModelNotFound, Unavailable
from lmaas.http import JsonResponse, api_key, parse_json
from lmaas.inference.catalog import ListedModel
from lmaas.inference.counting import Counting, TokenCounts
from lmaas.inference.protocol import AnyProtocol, Inference
from lmaas.inference.serving import Inferences
from lmaas.observability import COUNTED, GatewayMetrics
from lmaas.types import Principal
from lmaas.web.auth import Authenticator
from lmaas.web.call import Call
from lmaas.web.idempotency import Idempotency


@dataclass(frozen=True, slots=True)
class Gateway:
    """What the endpoints use, built in the composition root."""

    settings: Settings
    authenticate: Authenticator
    idempotency: Idempotency
    inferences: Inferences
    metrics: GatewayMetrics
    protocols: Sequence[AnyProtocol]
    counts: TokenCounts
    countings: Sequence[Counting]


class Endpoint(ABC):
    """An ASGI endpoint that serves the requests to one path of a protocol."""

    def __init__(self, gateway: Gateway, path: str) -> None:
        self._gateway, self._path = gateway, path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        metrics = self._gateway.metrics
        try:
            await self._serve(Call(scope, receive, send))
        except LmaasError as error:
            metrics.refused(self._path, error.kind, error.error_code)
            raise
        except ClientDisconnect:
            raise  # no response is sent
        except Exception:
            metrics.refused(self._path, InternalError.kind, InternalError.code)
            raise

    @abstractmethod
    async def _serve(self, call: Call) -> None:
        """Read the request and send its response."""


class InferenceEndpoint(Endpoint):
    """Serves the inferences of one protocol."""

    def __init__(self, gateway: Gateway, protocol: AnyProtocol) -> None:
        super().__init__(gateway, protocol.path)
        self._protocol = protocol

    async def _serve(self, call: Call) -> None:
        gateway, protocol = self._gateway, self._protocol
        principal = await gateway.authenticate(call.api_key)
        tenant_id = _tenant_of(principal)
        body = await call.body(gateway.settings.max_body_bytes)
        inference = Inference(call.request_id, protocol, protocol.read(parse_json(body, texts=protocol.texts)))
        claim = gateway.idempotency.wanted(call, tenant_id, protocol.path, body)
        del body  # is not held while the request waits
        if claim is None:
            await gateway.inferences.serve(principal, inference, call)
            return
        async with gateway.idempotency.claimed(call, claim) as sink:
            if sink is not None:
                await gateway.inferences.serve(principal, inference, sink)


class TokensEndpoint(Endpoint):
    """Reports the tokens of prompts in the shape of one protocol. An `Idempotency-Key` has no effect: a count changes nothing."""

    def __init__(self, gateway: Gateway, counting: Counting) -> None:
        super().__init__(gateway, counting.path)
        self._counting = counting

    async def _serve(self, call: Call) -> None:
        gateway, counting = self._gateway, self._counting
        principal = await gateway.authenticate(call.api_key)
        _tenant_of(principal)
        asked = counting.read(parse_json(await call.body(gateway.settings.max_body_bytes), texts=counting.texts))
        answer = await gateway.counts.serve(principal, counting, asked, call)
        text = msgspec.json.encode(answer)
        gateway.metrics.requests.counted(counting.path, COUNTED)
        await call.start(200, {"content-type": "application/json", "content-length": str(len(text))})
        await call.finish(text)


def endpoints(gateway: Gateway) -> dict[str, Endpoint]:
    """Return the endpoints of the protocols by path. Nearly all requests go to them."""
    found: dict[str, Endpoint] = {protocol.path: InferenceEndpoint(gateway, protocol) for protocol in gateway.protocols}
    return found | {counting.path: TokensEndpoint(gateway, counting) for counting in gateway.countings}


def routes(gateway: Gateway, ready: Callable[[], Any]) -> list[BaseRoute]:
    """Return the gateway's routes. `/readyz` awaits `ready`, which raises an error if a service is away."""
    return [
        *(Route(path, endpoint, methods=["POST"]) for path, endpoint in endpoints(gateway).items()),
        Route("/v1/models", functools.partial(_list_models, gateway)),
        Route("/v1/models/{model:path}", functools.partial(_get_model, gateway)),
        Route("/health", _alive),
        Route("/healthz", _alive),
        Route("/readyz", functools.partial(_ready, ready)),
        Route("/metrics", functools.partial(_metrics, gateway)),
    ]


async def _tenant(gateway: Gateway, request: Request) -> str:
    return _tenant_of(await gateway.authenticate(api_key(request.scope["headers"])))


def _tenant_of(principal: Principal) -> str:
    """Return the tenant of a key. Raises Forbidden for an operator's."""
    if principal.tenant_id is None:
        raise Forbidden("An operator's key cannot call models. Use a tenant's key.")
    return principal.tenant_id


def _shown(model: ListedModel) -> dict[str, Any]:
    owner = "lmaas" if model.parent is None else "tenant"
    shown = {"id": model.name, "object": "model", "created": model.created, "owned_by": owner, "parent": model.parent}
    return shown | {"max_model_len": model.max_model_len}


async def _list_models(gateway: Gateway, request: Request) -> Response:
    models = await gateway.inferences.catalog.listed(await _tenant(gateway, request))
    return JsonResponse({"object": "list", "data": [_shown(model) for model in models]})


async def _get_model(gateway: Gateway, request: Request) -> Response:
    tenant_id, name = await _tenant(gateway, request), request.path_params["model"]
    served = await gateway.inferences.catalog.resolve(tenant_id, name)
    plain = name.partition("@")[0]
    for model in await gateway.inferences.catalog.listed(tenant_id):
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
