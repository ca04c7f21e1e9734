"""The session of a person: a short-lived API key in a cookie, and whose it is."""

import asyncio
import hashlib
import hmac
import time
from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from lmaas.api.table import SHOW_OPERATOR_SESSION, SHOW_SESSION
from lmaas.console.api import ApiConnections
from lmaas.errors import ApiError
from lmaas.keys import PREFIX, hash_key
from lmaas.types import Role

COOKIE = "lmaas_session"
PATH = "/console"
#: The time for which the owner of a session is cached. Each call of the API checks the session itself.
FRESH_S = 5.0
MAX_KNOWN = 10_000
MAX_KEY_LENGTH = 200


@dataclass(frozen=True, slots=True)
class Person:
    """The owner of a session. `tenant` is None for an operator; `name` is empty for a session of a key."""

    key: str
    role: Role
    tenant: str | None
    name: str
    expires_at: datetime

    @property
    def is_operator(self) -> bool:
        """True if the person is an operator."""
        return self.role is Role.OPERATOR

    @property
    def csrf_token(self) -> str:
        """The token that every form of this session has to send."""
        return hmac.new(self.key.encode(), b"lmaas console: forms", hashlib.sha256).hexdigest()

    def sent(self, token: str) -> bool:
        """Return whether this is the session's token."""
        return hmac.compare_digest(token.encode(), self.csrf_token.encode())


class Sessions:
    """Finds the person of a session's key, by the API."""

    def __init__(self, connections: ApiConnections) -> None:
        self._connections = connections
        #: By the hash of the key: the time of the request, and its result.
        self._known: OrderedDict[str, tuple[float, Person]] = OrderedDict()

    async def person(self, key: str) -> Person | None:
        """Return the person of a session, or None if it has ended or the key is none. Raises ApiError if that is not known."""
        if not key.startswith(PREFIX) or len(key) > MAX_KEY_LENGTH or not key.isascii() or not key.isprintable():
            return None
        digest = hash_key(key)
        known = self._known.get(digest)
        if known is not None and time.monotonic() - known[0] < FRESH_S and known[1].expires_at.timestamp() > time.time():
            return known[1]
        asked = time.monotonic()
        shown = await self._shown(key)
        if shown is None:
            self._known.pop(digest, None)
            return None
        person = Person(key, Role(shown["role"]), shown["tenant"], shown["name"], datetime.fromisoformat(shown["expires_at"]))
        self._known[digest] = (asked, person)
        self._known.move_to_end(digest)
        while len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return person

    def forget(self, key: str) -> None:
        """Forget the cached owner of this session."""
        self._known.pop(hash_key(key), None)

    async def _shown(self, key: str) -> dict[str, Any] | None:
        client = self._connections.with_key(key)
        answers = await asyncio.gather(client.send(SHOW_SESSION), client.send(SHOW_OPERATOR_SESSION), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, dict):
                return answer
        # One of the two refuses the other role's sessions with 403, both refuse an ended one with 401 and a plain key with 404.
        for answer in answers:
            if not isinstance(answer, ApiError) or answer.status not in (401, 403, 404):
                raise answer if isinstance(answer, BaseException) else TypeError(answer)
        return None


def is_secure(request: Request) -> bool:
    """Return whether the browser sent the request over TLS, to this process or to a proxy before it."""
    return request.headers.get("x-forwarded-proto", request.url.scheme).split(",")[0].strip().lower() == "https"


def set_cookie(request: Request, response: Response, key: str, max_age_s: int) -> None:
    """Give the browser the session."""
    response.set_cookie(COOKIE, key, max_age=max_age_s, path=PATH, secure=is_secure(request), httponly=True, samesite="strict")


def clear_cookie(request: Request, response: Response) -> None:
    """Take the session from the browser."""
    response.delete_cookie(COOKIE, path=PATH, secure=is_secure(request), httponly=True, samesite="strict")
