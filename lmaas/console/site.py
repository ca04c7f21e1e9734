"""The frame around all pages: who visits, what a visitor may see, and what is shown if that fails."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from urllib.parse import urlencode, urlsplit

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from lmaas.api.table import LIST_TENANTS
from lmaas.console.api import ApiConnections
from lmaas.console.page import UPLOAD, Page, PageRoute, Visit, read_form
from lmaas.console.rendering import Templates
from lmaas.console.security import arrives_from_elsewhere, is_foreign, safe_next
from lmaas.console.session import COOKIE, PATH, Person, Sessions
from lmaas.errors import ApiError, LmaasError

SIGN_IN = f"{PATH}/sign-in"
MAX_TENANT = 200
_FORGED = "This form does not come from the console, or it is too old. Go back, reload the page and send it again."


@dataclass(frozen=True, slots=True)
class Site:
    """The common services of all pages, built by `lmaas.console.app`."""

    pages: tuple[Page, ...]
    templates: Templates
    connections: ApiConnections
    sessions: Sessions
    #: The largest body of a form with files, whatever its page takes.
    max_upload_bytes: int

    def routes(self) -> list[BaseRoute]:
        """Return the routes of all pages."""
        by_path: dict[str, dict[str, tuple[Page, PageRoute]]] = {}
        for page in self.pages:
            for route in page.routes:
                by_path.setdefault(route.path, {})[route.method] = (page, route)
        # A path without parameters goes before one with some.
        ordered = sorted(by_path, key=lambda path: path.count("{"))
        return [Route(PATH + path, self._endpoint(by_path[path]), methods=list(by_path[path])) for path in ordered]

    def _endpoint(self, methods: dict[str, tuple[Page, PageRoute]]) -> Callable[[Request], Awaitable[Response]]:
        async def serve(request: Request) -> Response:
            page, route = methods["GET" if request.method == "HEAD" else request.method]
            return await self._serve(request, page, route)

        return serve

    async def _serve(self, request: Request, page: Page, route: PageRoute) -> Response:
        if route.method == "POST" and is_foreign(request):
            return self.plain(_FORGED, 403)
        try:
            person = await self.sessions.person(request.cookies.get(COOKIE, ""))
        except ApiError as error:
            return self.plain(error.message, 503, retry=_address(request))
        if person is None:
            return self._to_sign_in(request, page)
        visit = self.visit(request, person, page)
        try:
            return await self._visit(visit, route)
        except (ApiError, LmaasError) as error:
            if error.status == 401:
                self.sessions.forget(person.key)
                return self._to_sign_in(request, page)
            return self._failed(visit, int(error.status), error.message)

    async def _visit(self, visit: Visit, route: PageRoute) -> Response:
        if visit.person.role not in visit.page.roles:
            return self._failed(visit, 403, "Your role does not allow this page.")
        if route.method == "GET":
            if visit.page.of_tenant and visit.tenant is None:
                return await _choose_tenant(visit)
            return await route.handler(visit)
        form = await read_form(visit.request, min(route.max_bytes, self.max_upload_bytes))
        try:
            token = visit.request.headers.get("x-csrf-token") or form.get("csrf")
            if not isinstance(token, str) or not visit.person.sent(token):
                return self._failed(visit, 403, _FORGED)
            if visit.page.of_tenant and visit.tenant is None:
                return self._failed(visit, 400, "Choose a tenant first.")
            return await route.handler(replace(visit, form_data=form))
        finally:
            await form.close()

    def visit(self, request: Request, person: Person, page: Page) -> Visit:
        """Return the visit of a person to a page."""
        tenant = (request.query_params.get("tenant", "")[:MAX_TENANT] or None) if person.is_operator else person.tenant
        api = self.connections.with_key(person.key, tenant if person.is_operator else None)
        pages = tuple(each for each in self.pages if person.role in each.roles)
        return Visit(request, person, api, page, self.templates, pages, tenant)

    def _to_sign_in(self, request: Request, page: Page) -> Response:
        """Lead to the sign-in page, which leads back."""
        if arrives_from_elsewhere(request) and COOKIE not in request.cookies and request.method == "GET":
            return self.once_more(_address(request))
        if request.headers.get("hx-request") == "true" or "x-csrf-token" in request.headers or UPLOAD in request.headers:
            return self.plain("Your session has ended. Sign in again.", 401)
        back = _address(request) if request.method in ("GET", "HEAD") else _page_before(request, page)
        return RedirectResponse(f"{SIGN_IN}?{urlencode({'next': back})}", 303)

    def once_more(self, address: str) -> Response:
        """Have the browser load an address of the console from a page of the console, so that it sends the session's cookie."""
        return HTMLResponse(self.templates.render("again.html", address=safe_next(address)))

    def plain(self, message: str, status: int, retry: str = "") -> Response:
        """Return a page without navigation, for a visitor who is not known."""
        return HTMLResponse(self.templates.render("plain.html", message=message, status=status, retry=retry), status)

    @staticmethod
    def _failed(visit: Visit, status: int, message: str) -> Response:
        retry = visit.here() if visit.request.method in ("GET", "HEAD") else ""
        return visit.render("error.html", status=status, message=message, retry=retry)


async def _choose_tenant(visit: Visit) -> Response:
    found = await visit.api.send(LIST_TENANTS, query={"limit": 100, "after": visit.query.get("after")})
    return visit.render("choose_tenant.html", tenants=found)


def _address(request: Request) -> str:
    return request.url.path + (f"?{request.url.query}" if request.url.query else "")


def _page_before(request: Request, page: Page) -> str:
    """Return the address of the page whose form was sent."""
    before = urlsplit(request.headers.get("referer", ""))
    if before.netloc.lower() != request.headers.get("host", "").lower() or before.path.startswith(SIGN_IN):
        return PATH + page.path
    return safe_next(before.path + (f"?{before.query}" if before.query else ""))
