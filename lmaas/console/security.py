"""The headers of every response, and the check that a form comes from a page of the console."""

from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmaas.console.session import PATH

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # The paths of the console stay on this origin.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
#: Pages show a tenant's data. Static files name a time of their own.
NO_STORE = "no-store"


class SecurityHeaders:
    """Pure ASGI middleware that adds HEADERS to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", NO_STORE)
            await send(message)

        await self._app(scope, receive, send_with_headers)


def is_foreign(request: Request) -> bool:
    """Return whether another site's page has sent this request. Browsers name the origin with every POST."""
    origin = request.headers.get("origin")
    if origin is not None:
        return urlsplit(origin).netloc.lower() != request.headers.get("host", "").lower()
    return request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none")


def arrives_from_elsewhere(request: Request) -> bool:
    """Return whether a link on another site has led here, in which case the browser has not sent the session's cookie."""
    return request.headers.get("sec-fetch-site") == "cross-site" and request.headers.get("sec-fetch-mode", "navigate") == "navigate"


def safe_next(target: str) -> str:
    """Return an address to go on to after signing in: the given one if it is a page of the console, otherwise the overview."""
    tail = target.removeprefix(PATH)
    plain = target.startswith(PATH) and tail[:1] in ("", "/", "?") and len(target) <= 2000
    return target if plain and "\\" not in target and "//" not in tail.partition("?")[0] and target.isprintable() else PATH
