"""Signing in with an API key, and signing out."""

import time
from datetime import datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from lmaas.api.table import CREATE_OPERATOR_SESSION, CREATE_SESSION, END_OPERATOR_SESSION, END_SESSION
from lmaas.console.page import read_form
from lmaas.console.security import is_foreign, safe_next
from lmaas.console.session import COOKIE, PATH, clear_cookie, set_cookie
from lmaas.console.site import SIGN_IN, Site
from lmaas.errors import ApiError
from lmaas.keys import PREFIX

_MAX_BYTES = 64 * 1024
_NO_KEY = f"This is not an API key of this service: those begin with {PREFIX}. Copy it again."


class SignIn:
    """The pages for signing in and out."""

    def __init__(self, site: Site, providers: tuple[tuple[str, str], ...] = ()) -> None:
        """`providers` are the labels and addresses of other ways to sign in."""
        self._site, self._providers = site, providers

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        return [
            Route(SIGN_IN, self._show, methods=["GET"]),
            Route(SIGN_IN, self._sign_in, methods=["POST"]),
            Route(f"{PATH}/sign-out", self._sign_out, methods=["POST"]),
        ]

    def page(self, request: Request, *, status: int = 200, error: str = "", message: str = "") -> Response:
        """Return the sign-in page. `error` stands beside the key, `message` above the form."""
        target = safe_next(request.query_params.get("next", PATH))
        text = self._site.templates.render("sign_in.html", next=target, error=error, message=message, providers=self._providers)
        return HTMLResponse(text, status)

    async def _show(self, request: Request) -> Response:
        try:
            known = await self._site.sessions.person(request.cookies.get(COOKIE, ""))
        except ApiError as error:
            return self.page(request, message=error.message)
        return self.page(request) if known is None else RedirectResponse(safe_next(request.query_params.get("next", PATH)), 303)

    async def _sign_in(self, request: Request) -> Response:
        if is_foreign(request):
            return self._site.plain("This form does not come from the console. Open the sign-in page again.", 403)
        form = await read_form(request, _MAX_BYTES)
        key = form.get("key")
        await form.close()
        key = key.strip() if isinstance(key, str) else ""
        if not key:
            return self.page(request, status=400, error="Type or paste an API key.")
        if not key.startswith(PREFIX) or not key.isascii() or not key.isprintable() or " " in key:
            return self.page(request, status=400, error=_NO_KEY)
        try:
            session = await self._session_of(key)
        except ApiError as error:
            if error.status == 401:
                return self.page(request, status=401, error="This key is not valid: it was mistyped, was revoked or has expired.")
            return self.page(request, status=error.status, message=error.message)
        response = RedirectResponse(safe_next(request.query_params.get("next", PATH)), 303)
        give_session(request, response, session)
        return response

    async def _session_of(self, key: str) -> dict[str, Any]:
        """Make a session of a tenant's key, or of an operator's. Raises ApiError."""
        client = self._site.connections.with_key(key)
        try:
            return await client.send(CREATE_SESSION, {})
        except ApiError as error:
            if error.status != 403:
                raise
            try:
                return await client.send(CREATE_OPERATOR_SESSION, {})
            except ApiError as second:
                raise (error if second.status == 403 else second) from None

    async def _sign_out(self, request: Request) -> Response:
        if is_foreign(request):
            return self._site.plain("This form does not come from the console.", 403)
        sessions, key = self._site.sessions, request.cookies.get(COOKIE, "")
        response = RedirectResponse(SIGN_IN, 303)
        try:
            person = await sessions.person(key)
            if person is not None:
                form = await read_form(request, _MAX_BYTES)
                token = form.get("csrf")
                await form.close()
                if not isinstance(token, str) or not person.sent(token):
                    return self._site.plain("This form is too old. Go back, reload the page and sign out again.", 403)
                await self._site.connections.with_key(key).send(END_OPERATOR_SESSION if person.is_operator else END_SESSION)
                sessions.forget(key)
        except ApiError as error:
            if error.status != 401:
                return self._site.plain(f"You are still signed in. {error.message}", 503, retry=PATH)
        clear_cookie(request, response)
        return response


def give_session(request: Request, response: Response, session: dict[str, Any]) -> None:
    """Give the browser a session that the API has made, for as long as it is valid."""
    left_s = datetime.fromisoformat(session["expires_at"]).timestamp() - time.time()
    set_cookie(request, response, session["key"], max(1, int(left_s)))
