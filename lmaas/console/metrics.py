"""The console's metrics."""

import time

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: The bounds of the time until the first byte of a page, in seconds.
BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2.5, 5, 20)


class ConsoleMetrics:
    """The metrics of one console, in a registry of their own. They name no tenants and no pages' parameters."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "lmaas_console_requests", "Requests by route and class of their status.", ("route", "status"), registry=self.registry
        )
        self.first_byte = Histogram(
            "lmaas_console_first_byte_seconds",
            "From a request's arrival to the first byte of its page.",
            buckets=BOUNDS_S,
            registry=self.registry,
        )


class Measured:
    """Pure ASGI middleware that counts and times requests."""

    def __init__(self, app: ASGIApp, metrics: ConsoleMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()

        async def measured(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.first_byte.observe(time.perf_counter() - began)
                # Starlette puts the route that matched into the scope: a bounded set, unlike paths.
                route = getattr(scope.get("route"), "path", "none")
                self._metrics.requests.labels(route, f"{message['status'] // 100}xx").inc()
            await send(message)

        await self._app(scope, receive, measured)
