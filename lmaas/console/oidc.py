"""A client of an OIDC provider: discovery, the authorization code flow with PKCE, and the check of the ID token."""

import asyncio
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote_plus, urlsplit

import httpx
import msgspec
from authlib.oauth2.rfc6749.parameters import prepare_grant_uri
from authlib.oauth2.rfc7636 import create_s256_code_challenge
from joserfc import jwt
from joserfc.errors import InvalidKeyIdError, JoseError
from joserfc.jwk import KeySet

from lmaas.config import Settings
from lmaas.console.grants import groups_in
from lmaas.errors import SettingsError

#: The signatures that are accepted: of keys that the provider publishes, so that no shared secret and no `none` is among them.
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed25519")
#: The time for which the provider's document and keys are kept, and between two reads for a key that is not among them.
FRESH_S = 3600.0
AGAIN_S = 30.0
TIMEOUT_S = 10.0
#: The maximum deviation of the provider's clock.
LEEWAY_S = 60
MAX_BYTES = 1024 * 1024
MAX_NAME = 100


class SignInError(Exception):
    """A person could not be signed in. The message is for that person."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


@dataclass(frozen=True, slots=True)
class Identity:
    """A person who has signed in at the provider."""

    name: str
    groups: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pending:
    """The data that the browser keeps while the person is at the provider."""

    state: str
    nonce: str
    verifier: str
    next: str


@dataclass(frozen=True, slots=True)
class _Provider:
    read_at: float
    metadata: dict[str, Any]
    keys: KeySet


class OidcClient:
    """The console as a client of one provider."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError if a setting is missing."""
        if settings.console_oidc_issuer is None or settings.console_oidc_client_id is None or settings.console_key is None:
            raise SettingsError(
                "OIDC needs LMAAS_CONSOLE_OIDC_ISSUER, LMAAS_CONSOLE_OIDC_CLIENT_ID and LMAAS_CONSOLE_KEY, an operator's key."
            )
        self._issuer, self._id, self._secret = (
            settings.console_oidc_issuer,
            settings.console_oidc_client_id,
            settings.console_oidc_client_secret,
        )
        parts = urlsplit(self._issuer)
        if parts.scheme != "https" and parts.hostname not in ("127.0.0.1", "localhost", "::1"):
            raise SettingsError(f"LMAAS_CONSOLE_OIDC_ISSUER is {self._issuer!r}. Use an issuer whose address begins with https://.")
        self._scopes, self._claim = settings.console_oidc_scopes, settings.console_oidc_groups_claim
        self._provider: _Provider | None = None
        self._reading = asyncio.Lock()

    async def authorization_url(self, pending: Pending, redirect_uri: str) -> str:
        """Return the provider's address at which the person signs in. Raises SignInError if the provider does not respond."""
        provider = await self._read()
        return prepare_grant_uri(  # type: ignore[no-any-return]  # authlib has no types
            provider.metadata["authorization_endpoint"],
            self._id,
            "code",
            redirect_uri,
            self._scopes,
            pending.state,
            nonce=pending.nonce,
            code_challenge=create_s256_code_challenge(pending.verifier),
            code_challenge_method="S256",
        )

    async def identity(self, code: str, pending: Pending, redirect_uri: str) -> Identity:
        """Exchange the code that the provider has given, and return whose it is. Raises SignInError."""
        provider = await self._read()
        token = await self._exchange(provider, code, pending.verifier, redirect_uri)
        claims = await self._claims(token.get("id_token"), pending.nonce)
        if groups_in(claims, self._claim) is None and "userinfo_endpoint" in provider.metadata:
            claims = await self._userinfo(provider, str(token.get("access_token", "")), claims) | claims
        name = next((str(claims[each]) for each in ("preferred_username", "email", "name", "sub") if claims.get(each)), "")
        return Identity(name[:MAX_NAME], tuple(groups_in(claims, self._claim) or ()))

    async def _exchange(self, provider: _Provider, code: str, verifier: str, redirect_uri: str) -> dict[str, Any]:
        """Exchange the code for tokens (RFC 6749, 4.1.3, with RFC 7636)."""
        form = {"grant_type": "authorization_code", "code": code, "redirect_uri": redirect_uri, "code_verifier": verifier}
        basic: tuple[str, str] | None = None
        if self._secret is None:
            form["client_id"] = self._id
        elif "client_secret_basic" in provider.metadata.get("token_endpoint_auth_methods_supported", ["client_secret_basic"]):
            # Both are encoded as in a form (RFC 6749, 2.3.1).
            basic = (quote_plus(self._id), quote_plus(self._secret))
        else:
            form |= {"client_id": self._id, "client_secret": self._secret}
        async with httpx.AsyncClient(timeout=TIMEOUT_S) as http:
            request = http.build_request("POST", provider.metadata["token_endpoint"], data=form, headers={"accept": "application/json"})
            return await _json(http, request, auth=basic, refusal="The identity provider did not accept the sign-in. Try again.")

    async def _claims(self, token: Any, nonce: str) -> dict[str, Any]:
        """Check an ID token, and return its claims (OpenID Connect Core 1.0, 3.1.3.7)."""
        if not isinstance(token, str):
            raise SignInError("The identity provider sent no ID token. Ask for the scope 'openid' (LMAAS_CONSOLE_OIDC_SCOPES).")
        provider = await self._read()
        try:
            try:
                found = jwt.decode(token, provider.keys, algorithms=ALGORITHMS)
            except InvalidKeyIdError:
                # The key is not among those that were read. The provider may have new ones.
                found = jwt.decode(token, (await self._read(for_new_key=True)).keys, algorithms=ALGORITHMS)
            claims: dict[str, Any] = found.claims
            jwt.JWTClaimsRegistry(
                leeway=LEEWAY_S,
                iss={"essential": True, "value": self._issuer},
                aud={"essential": True, "value": self._id},
                exp={"essential": True},
                iat={"essential": True},
                sub={"essential": True},
                nonce={"essential": True, "value": nonce},
            ).validate(claims)
        except (JoseError, ValueError) as error:
            raise SignInError("The identity provider's ID token is not valid for this sign-in. Try again.") from error
        several = isinstance(claims["aud"], list) and len(claims["aud"]) > 1
        if (several or "azp" in claims) and claims.get("azp") != self._id:
            raise SignInError("The identity provider's ID token is for another client. Try again.")
        return claims

    async def _userinfo(self, provider: _Provider, access_token: str, claims: dict[str, Any]) -> dict[str, Any]:
        async with httpx.AsyncClient(timeout=TIMEOUT_S) as http:
            headers = {"authorization": f"Bearer {access_token}"}
            found = await _json(http, http.build_request("GET", provider.metadata["userinfo_endpoint"], headers=headers))
        if found.get("sub") != claims["sub"]:
            raise SignInError("The identity provider's answers are about two different persons. Try again.")
        return found

    async def _read(self, *, for_new_key: bool = False) -> _Provider:
        """Return the provider's document and keys, from the last hour unless a new key is looked for."""
        async with self._reading:
            age_s = time.monotonic() - self._provider.read_at if self._provider is not None else float("inf")
            if self._provider is not None and age_s < (AGAIN_S if for_new_key else FRESH_S):
                return self._provider
            async with httpx.AsyncClient(timeout=TIMEOUT_S) as http:
                address = self._issuer.rstrip("/") + "/.well-known/openid-configuration"
                metadata = await _json(http, http.build_request("GET", address))
                if metadata.get("issuer") != self._issuer:
                    raise SignInError("The identity provider names another issuer than LMAAS_CONSOLE_OIDC_ISSUER. Ask an operator.")
                try:
                    published = await _json(http, http.build_request("GET", metadata["jwks_uri"]))
                    keys = KeySet.import_key_set(published)  # type: ignore[arg-type]  # it checks them
                    self._provider = _Provider(time.monotonic(), metadata, keys)
                    str(metadata["authorization_endpoint"]), str(metadata["token_endpoint"])
                except (KeyError, ValueError, JoseError) as error:
                    raise SignInError("The identity provider's documents cannot be read. Ask an operator.") from error
            return self._provider


async def _json(
    http: httpx.AsyncClient, request: httpx.Request, *, auth: tuple[str, str] | None = None, refusal: str = ""
) -> dict[str, Any]:
    """Return the JSON object of the provider's answer. Raises SignInError, with the text `refusal` if the provider refuses (4xx)."""
    try:
        response = await http.send(request, auth=auth, stream=True)
        try:
            text = b""
            async for chunk in response.aiter_bytes():
                text += chunk
                if len(text) > MAX_BYTES:
                    raise SignInError("The identity provider's answer is too long. Ask an operator.")
        finally:
            await response.aclose()
        if refusal and 400 <= response.status_code < 500:
            raise SignInError(refusal)
        response.raise_for_status()
        found = msgspec.json.decode(text)
    except (httpx.HTTPError, ValueError) as error:
        raise SignInError("The identity provider does not respond. Try again in a few minutes, or sign in with a key.") from error
    if not isinstance(found, dict):
        raise SignInError("The identity provider's documents cannot be read. Ask an operator.")
    return found
