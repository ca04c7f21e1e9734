"""The endpoints of the client protocols, and those for load balancers and Prometheus."""

import asyncio
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from lmaas.config import Settings
from lmaas.errors import InternalError, LmaasError, Unavailable
from lmaas.http import PRINCIPAL, ROUTE, JsonResponse, metrics_response, parse_json
from lmaas.inference.counting import Counting, TokenCounts
from lmaas.inference.protocol import INFERENCE, AnyProtocol, Inference
from lmaas.inference.request_traces import RequestTraces
from lmaas.inference.serving import Inferences
from lmaas.observability import COUNTED, GatewayMetrics
from lmaas.web.auth import Authenticator, tenant_of
from lmaas.web.background import Background
from lmaas.web.call import Call
from lmaas.web.idempotency import Idempotency
from lmaas.web.models import model_routes


@dataclass(frozen=True, slots=True)
class Gateway:
    """The common services of the endpoints, built in the composition root."""

    settings: Settings
    authenticate: Authenticator
    idempotency: Idempotency
    inferences: Inferences
    background: Background
    metrics: GatewayMetrics
    protocols: Sequence[AnyProtocol]
    counts: TokenCounts
    countings: Sequence[Counting]
    traces: RequestTraces | None = None


class Endpoint(ABC):
    """An ASGI endpoint that serves the requests to one path of a protocol."""

    def __init__(self, gateway: Gateway, path: str) -> None:
        self._gateway, self._path = gateway, path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        metrics = self._gateway.metrics
        if self._gateway.traces is not None:
            scope[ROUTE] = self._path
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
        call.note(PRINCIPAL, principal)
        tenant_id = tenant_of(principal)
        body = await call.body(gateway.settings.max_body_bytes)
        inference = Inference(call.request_id, protocol, protocol.read(parse_json(body, texts=protocol.texts)))
        call.note(INFERENCE, inference)
        if gateway.traces is not None:
            gateway.traces.begin(inference, call.headers)
        claim = gateway.idempotency.wanted(call, tenant_id, protocol.path, body)
        if inference.request.background:
            await gateway.background.create(principal, inference, body, call, claim)
            return
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
        call.note(PRINCIPAL, principal)
        tenant_of(principal)
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
        *model_routes(gateway.authenticate, gateway.inferences.catalog),
        Route("/health", _alive),
        Route("/healthz", _alive),
        Route("/readyz", functools.partial(_ready, ready)),
        Route("/metrics", functools.partial(_metrics, gateway)),
    ]


async def _alive(_: Request) -> Response:
    return JsonResponse({"status": "ok"})


async def _ready(ready: Callable[[], Any], _: Request) -> Response:
    try:
        async with asyncio.timeout(5):
            await ready()
    except TimeoutError:
        raise Unavailable("The database or the queue does not respond. Retry after 5 s.", retry_after_s=5) from None
    return JsonResponse({"status": "ready"})


async def _metrics(gateway: Gateway, request: Request) -> Response:
    return metrics_response(gateway.metrics.registry, request)
