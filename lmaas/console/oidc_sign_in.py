"""Signing in with OIDC: the way to the provider and back, and the choice among several tenants."""

import base64
import hashlib
import hmac
import secrets
import time
from dataclasses import asdict
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from lmaas.api.table import CREATE_OPERATOR_SESSION
from lmaas.config import Settings
from lmaas.console.grants import Grant, Rule, grants_of, read_rules
from lmaas.console.oidc import Identity, OidcClient, Pending, SignInError
from lmaas.console.page import read_form
from lmaas.console.security import is_foreign, safe_next
from lmaas.console.session import PATH, is_secure
from lmaas.console.sign_in import SignIn, give_session
from lmaas.console.site import SIGN_IN, Site
from lmaas.errors import ApiError
from lmaas.types import Role

START = f"{SIGN_IN}/oidc"
CALLBACK = f"{START}/callback"
CHOOSE = f"{START}/choose"
#: The cookie of a sign-in that has begun. It comes back with the provider's redirect, for which `Lax` is needed.
COOKIE = "lmaas_oidc"
#: The time that a person has at the provider, and for the choice of a tenant.
PENDING_S = 600
#: Groups that the page of a person without a role names.
SHOWN_GROUPS = 20
_NO_KEY = "The console's own key is not valid. Ask an operator to set LMAAS_CONSOLE_KEY."
_AGAIN = "This sign-in was not begun in this browser, or it took too long. Sign in again."


class Choice(msgspec.Struct, frozen=True):
    """The roles from which a person who has signed in may choose, until a time in seconds since 1970."""

    name: str
    grants: list[tuple[str, str | None]]
    next: str
    until: float


class OidcSignIn:
    """The pages of the sign-in with OIDC."""

    def __init__(self, settings: Settings, site: Site, sign_in: SignIn) -> None:
        self._site, self._sign_in, self._client = site, sign_in, OidcClient(settings)
        self._rules: list[Rule] = read_rules(settings.console_oidc_roles)
        self._public_url = settings.console_public_url
        self._key = str(settings.console_key)

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        return [
            Route(START, self._start, methods=["GET"]),
            Route(CALLBACK, self._callback, methods=["GET"]),
            Route(CHOOSE, self._choose, methods=["POST"]),
        ]

    async def _start(self, request: Request) -> Response:
        """Lead to the provider."""
        target = safe_next(request.query_params.get("next", PATH))
        pending = Pending(secrets.token_urlsafe(24), secrets.token_urlsafe(24), secrets.token_urlsafe(48), target)
        try:
            address = await self._client.authorization_url(pending, self._redirect_uri(request))
        except SignInError as error:
            return self._sign_in.page(request, status=502, message=error.message)
        response = RedirectResponse(address, 303)
        text = base64.urlsafe_b64encode(msgspec.json.encode(asdict(pending))).decode()
        response.set_cookie(COOKIE, text, max_age=PENDING_S, path=START, secure=is_secure(request), httponly=True, samesite="lax")
        return response

    async def _callback(self, request: Request) -> Response:
        """Take the provider's code, and make a session if there is no choice."""
        response = await self._returned(request)
        response.delete_cookie(COOKIE, path=START)
        return response

    async def _returned(self, request: Request) -> Response:
        pending, query = _pending(request), request.query_params
        if pending is None or not hmac.compare_digest(pending.state.encode(), query.get("state", "").encode()):
            return self._sign_in.page(request, status=400, message=_AGAIN)
        if "code" not in query:
            reason = query.get("error", "no code")[:100]
            return self._sign_in.page(request, status=401, message=f"The identity provider did not sign you in ({reason}).")
        try:
            identity = await self._client.identity(query["code"], pending, self._redirect_uri(request))
        except SignInError as error:
            return self._sign_in.page(request, status=401, message=error.message)
        grants = grants_of(identity.groups, self._rules)
        if not grants:
            return self._sign_in.page(request, status=403, message=_without_role(identity))
        if len(grants) == 1:
            return await self._sign_in_as(request, identity.name, grants[0], pending.next)
        choice = Choice(identity.name, [(grant.role.value, grant.tenant) for grant in grants], pending.next, time.time() + PENDING_S)
        return HTMLResponse(
            self._site.templates.render("choose_grant.html", name=identity.name, grants=grants, choice=self._signed(choice), action=CHOOSE)
        )

    async def _choose(self, request: Request) -> Response:
        """Make a session of the tenant that was chosen."""
        if is_foreign(request):
            return self._site.plain(_AGAIN, 403)
        form = await read_form(request, 64 * 1024)
        sent, number = form.get("choice"), form.get("grant")
        await form.close()
        choice = self._checked(sent if isinstance(sent, str) else "")
        if choice is None or choice.until < time.time():
            return self._sign_in.page(request, status=400, message=_AGAIN)
        if not isinstance(number, str) or not number.isdecimal() or int(number) >= len(choice.grants):
            return self._sign_in.page(request, status=400, message="Choose one of the entries. Sign in again.")
        role, tenant = choice.grants[int(number)]
        return await self._sign_in_as(request, choice.name, Grant(Role(role), tenant), choice.next)

    async def _sign_in_as(self, request: Request, name: str, grant: Grant, target: str) -> Response:
        body: dict[str, Any] = {"role": grant.role.value, "subject": name}
        if grant.tenant is not None:
            body["tenant"] = grant.tenant
        try:
            session = await self._site.connections.with_key(self._key).send(CREATE_OPERATOR_SESSION, body)
        except ApiError as error:
            if error.status == 401:
                return self._sign_in.page(request, status=503, message=_NO_KEY)
            where = f" The tenant is {grant.tenant}." if grant.tenant is not None and error.status == 404 else ""
            return self._sign_in.page(request, status=error.status, message=error.message + where)
        # Not a redirect: after one, a browser that comes from the provider would not send the session's cookie.
        response = self._site.once_more(target)
        give_session(request, response, session)
        return response

    def _redirect_uri(self, request: Request) -> str:
        if self._public_url is not None:
            return self._public_url.rstrip("/") + CALLBACK
        return f"{'https' if is_secure(request) else 'http'}://{request.headers.get('host', '')}{CALLBACK}"

    def _signed(self, choice: Choice) -> str:
        text = base64.urlsafe_b64encode(msgspec.json.encode(choice))
        return f"{text.decode()}.{self._signature(text)}"

    def _checked(self, sent: str) -> Choice | None:
        text, _, signature = sent.partition(".")
        if not sent.isascii() or not hmac.compare_digest(signature, self._signature(text.encode())):
            return None
        return msgspec.json.decode(base64.urlsafe_b64decode(text), type=Choice)

    def _signature(self, text: bytes) -> str:
        return hmac.new(self._key.encode(), b"lmaas console: choice of a tenant\0" + text, hashlib.sha256).hexdigest()


def _pending(request: Request) -> Pending | None:
    try:
        return msgspec.json.decode(base64.urlsafe_b64decode(request.cookies.get(COOKIE, "")), type=Pending)
    except (ValueError, msgspec.DecodeError):
        return None


def _without_role(identity: Identity) -> str:
    if not identity.groups:
        return f"You are signed in as {identity.name}, but the identity provider names no groups of yours. Ask an operator."
    shown = ", ".join(identity.groups[:SHOWN_GROUPS])
    return f"You are signed in as {identity.name}, but none of your groups has a role here: {shown}. Ask an operator."
