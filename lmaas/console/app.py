"""The composition root of the console: a process of its own, so that a page never costs a stream its time."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from lmaas.config import Settings
from lmaas.console.api import ApiConnections
from lmaas.console.assets import Assets
from lmaas.console.metrics import ConsoleMetrics, Measured
from lmaas.console.oidc_sign_in import START as OIDC_START
from lmaas.console.oidc_sign_in import OidcSignIn
from lmaas.console.page import MAX_FORM_BYTES
from lmaas.console.registry import PAGES
from lmaas.console.rendering import Templates
from lmaas.console.security import SecurityHeaders, safe_next
from lmaas.console.session import PATH, Sessions
from lmaas.console.sign_in import SignIn
from lmaas.console.site import Site

DEFAULT_PORT = 8083
#: Requests at once; above it 503.
MAX_REQUESTS = 1000
_NOT_FOUND = "There is no such page. It may have been moved, or its object was deleted."
_UNEXPECTED = "The console failed to make this page. Its log says why. Try again, or report it."


def build_console(settings: Settings, transport: httpx.AsyncBaseTransport | None = None) -> ASGIApp:
    """Build the console's ASGI application. `transport` replaces the network in tests.

    Raises SettingsError for settings of OIDC that do not work.
    """
    connections = ApiConnections(settings.console_api_url or settings.base_url, transport)
    metrics, assets = ConsoleMetrics(), Assets(f"{PATH}/static")
    # The gateway refuses larger files. The rest is for the other fields.
    max_upload_bytes = max(settings.max_adapter_bytes, settings.max_file_bytes) + MAX_FORM_BYTES
    uses_oidc = settings.console_oidc_issuer is not None
    site = Site(PAGES, Templates(assets.url), connections, Sessions(connections), max_upload_bytes)
    sign_in = SignIn(site, ((settings.console_oidc_label, OIDC_START),) if uses_oidc else ())
    oidc = OidcSignIn(settings, site, sign_in).routes() if uses_oidc else []

    async def metrics_text(_: Request) -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def http_error(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        path = request.url.path
        if status == 404 and path.endswith("/") and path.startswith(f"{PATH}/"):
            return RedirectResponse(safe_next(path.rstrip("/")), 307)
        if not path.startswith(PATH):
            return PlainTextResponse("Not found. The console is at /console.", status)
        return site.plain(_NOT_FOUND if status == 404 else "This address does not take such a request.", status)

    async def unexpected(_: Request, __: Exception) -> Response:
        # Starlette raises the error again after this response, and uvicorn logs it.
        return site.plain(_UNEXPECTED, 500)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with connections:
            yield

    app = Starlette(
        routes=[
            Route("/healthz", _alive),
            Route("/metrics", metrics_text),
            assets.route,
            *sign_in.routes(),
            *oidc,
            *site.routes(),
        ],
        lifespan=lifespan,
        exception_handlers={HTTPException: http_error, Exception: unexpected},
    )
    app.router.redirect_slashes = False
    return SecurityHeaders(Measured(app, metrics))


async def _alive(_: Request) -> Response:
    return PlainTextResponse("ok")


async def run_console(settings: Settings) -> None:
    """Run a console until it is stopped."""
    config = uvicorn.Config(
        build_console(settings),
        host=settings.host,
        port=settings.console_port or DEFAULT_PORT,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        limit_concurrency=MAX_REQUESTS,
        timeout_graceful_shutdown=int(min(settings.drain_timeout_s, 10)) or 1,
    )
    await uvicorn.Server(config).serve()
