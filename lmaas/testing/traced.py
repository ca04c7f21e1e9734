"""The spans of a fake engine."""

import time

from starlette.types import ASGIApp, Receive, Scope, Send

from lmaas.tracing.context import received
from lmaas.tracing.export import span_writer
from lmaas.tracing.trace import Kind, only_root


class Traced:
    """Sends a span for each request with the header of a trace, as vLLM does."""

    def __init__(self, app: ASGIApp, url: str) -> None:
        self._app, self._url = app, url
        self._writer = span_writer(url, "lmaas-engine")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the whole life of the server."""
        if scope["type"] == "lifespan":
            with self._writer:
                await self._app(scope, receive, send)
            return
        began = time.monotonic()
        try:
            await self._app(scope, receive, send)
        finally:
            context = received(scope["headers"])
            if context is not None and context.sampled:
                request_id = next((value.decode() for name, value in scope["headers"] if name == b"x-request-id"), "")
                attributes = {"gen_ai.request.id": request_id}
                self._writer.add(only_root(context, "llm_request", Kind.SERVER, time.monotonic() - began, attributes))
