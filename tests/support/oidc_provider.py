"""An OIDC provider for tests, served on a port: PKCE by authlib, tokens signed by joserfc."""

import asyncio
import functools
import json
import secrets
import time
from base64 import b64decode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote_plus, urlencode

from authlib.oauth2.rfc7636 import create_s256_code_challenge
from joserfc import jwt
from joserfc.jwk import RSAKey
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from lmaas.private_server import serve_privately
from tests.support.conditions import until
from tests.support.processes import free_port

CLIENT_ID, CLIENT_SECRET = "lmaas-console", "a secret / with : signs"


@functools.cache
def made_key(kid: str) -> RSAKey:
    """Return a key, which takes a while to make."""
    return RSAKey.generate_key(2048, {"kid": kid})


@dataclass
class Provider:
    """A provider with one person who is always signed in. Its responses can be made wrong."""

    issuer: str
    claims: dict[str, Any] = field(default_factory=dict)
    #: Changes of the ID token's claims; a value of None removes one.
    wrong: dict[str, Any] = field(default_factory=dict)
    #: The contents of the userinfo response, if any.
    userinfo: dict[str, Any] = field(default_factory=dict)
    key: RSAKey = field(default_factory=lambda: made_key("first"))
    #: The key that signs, if it is not the one that is published.
    signing_key: RSAKey | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    codes: dict[str, dict[str, str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    public: bool = False

    def app(self) -> Starlette:
        """Return the application with its endpoints."""
        return Starlette(
            routes=[
                Route("/.well-known/openid-configuration", self._configuration),
                Route("/keys", self._keys),
                Route("/authorize", self._authorize),
                Route("/token", self._token, methods=["POST"]),
                Route("/userinfo", self._userinfo),
            ]
        )

    async def _configuration(self, _: Request) -> Response:
        self.asked.append("configuration")
        names = {"authorization_endpoint": "authorize", "token_endpoint": "token", "jwks_uri": "keys", "userinfo_endpoint": "userinfo"}
        addresses = {name: f"{self.issuer}/{path}" for name, path in names.items()}
        return JSONResponse({"issuer": self.issuer, "response_types_supported": ["code"]} | addresses | self.metadata)

    async def _keys(self, _: Request) -> Response:
        return JSONResponse({"keys": [self.key.as_dict(private=False, alg="RS256", use="sig")]})

    async def _authorize(self, request: Request) -> Response:
        asked = dict(request.query_params)
        assert asked["response_type"] == "code"
        assert asked["client_id"] == CLIENT_ID
        assert asked["code_challenge_method"] == "S256"
        assert "openid" in asked["scope"].split()
        code = secrets.token_urlsafe(16)
        self.codes[code] = asked
        return RedirectResponse(f"{asked['redirect_uri']}?{urlencode({'code': code, 'state': asked['state']})}", 302)

    async def _token(self, request: Request) -> Response:
        given = {name: values[0] for name, values in parse_qs((await request.body()).decode()).items()}
        asked = self.codes.pop(given.get("code", ""), None)
        if (
            asked is None
            or given["redirect_uri"] != asked["redirect_uri"]
            or create_s256_code_challenge(given["code_verifier"]) != asked["code_challenge"]
            or not self._knows(request, given)
        ):
            return JSONResponse({"error": "invalid_grant"}, 400)
        now = int(time.time())
        claims = {"iss": self.issuer, "aud": CLIENT_ID, "sub": "person-1", "iat": now, "exp": now + 300, "nonce": asked["nonce"]}
        claims = {name: value for name, value in (claims | self.claims | self.wrong).items() if value is not None}
        key = self.signing_key or self.key
        header = {"alg": "RS256", "kid": key.kid}
        return JSONResponse(
            {"access_token": "the-access-token", "token_type": "Bearer", "expires_in": 300, "id_token": jwt.encode(header, claims, key)}
        )

    def _knows(self, request: Request, given: dict[str, str]) -> bool:
        if self.public:
            return given.get("client_id") == CLIENT_ID and "authorization" not in request.headers
        # Both are encoded as in a form (RFC 6749, 2.3.1).
        given_id, _, given_secret = b64decode(request.headers.get("authorization", "").removeprefix("Basic ")).decode().partition(":")
        return (unquote_plus(given_id), unquote_plus(given_secret)) == (CLIENT_ID, CLIENT_SECRET)

    async def _userinfo(self, request: Request) -> Response:
        assert request.headers["authorization"] == "Bearer the-access-token"
        return Response(json.dumps({"sub": "person-1"} | self.userinfo), media_type="application/json")


@asynccontextmanager
async def provider() -> AsyncIterator[Provider]:
    """Run a provider on a port of its own."""
    port = free_port()
    made = Provider(f"http://127.0.0.1:{port}")
    task = asyncio.create_task(serve_privately(made.app(), "127.0.0.1", port), name="provider")

    async def listens() -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        writer.close()
        return True

    try:
        await until(listens, every_s=0.01)
        yield made
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
