"""The job runner's health and metrics endpoints. They are off unless LMAAS_JOBS_PORT is set, and belong in a private network."""

import functools

from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lmaas.http import JsonResponse, metrics_response
from lmaas.jobs.runner import Runner
from lmaas.private_server import serve_privately


def status_app(runner: Runner, registry: CollectorRegistry) -> Starlette:
    """Return the application with `/healthz` and `/metrics`."""
    return Starlette(
        routes=[Route("/healthz", functools.partial(_health, runner)), Route("/metrics", functools.partial(_metrics, registry))]
    )


async def _health(runner: Runner, _: Request) -> Response:
    return JsonResponse({"status": "ok", "runner": runner.id})


async def _metrics(registry: CollectorRegistry, request: Request) -> Response:
    return metrics_response(registry, request)


async def serve_status(runner: Runner, registry: CollectorRegistry, host: str, port: int) -> None:
    """Serve the endpoints until cancelled."""
    await serve_privately(status_app(runner, registry), host, port)
