"""Finds the principal of an API key."""

import time

from lmaas.errors import Forbidden, Unauthenticated
from lmaas.inference.cache import Changes, ReadCache
from lmaas.keys import PREFIX, hash_key
from lmaas.store.database import Database
from lmaas.store.tenants import find_principal
from lmaas.types import Principal

#: The longest time for which a revoked key still works.
FRESH_S = 0.5
MAX_KEY_LENGTH = 200


class Authenticator:
    """Caches the principals of keys. While Postgres is away, known keys keep working for `grace_s` seconds."""

    def __init__(self, db: Database, grace_s: float, changes: Changes | None = None) -> None:
        self._principals = ReadCache[str, Principal](
            lambda key_hash: find_principal(db, key_hash), fresh_s=FRESH_S, grace_s=grace_s, changes=changes
        )

    async def __call__(self, key: str | None) -> Principal:
        """Return the principal of an API key. Raises Unauthenticated, or Unavailable if the key is not cached and Postgres is away."""
        # Text that cannot be a key is rejected without a database query.
        if key is None or not key.startswith(PREFIX) or len(key) > MAX_KEY_LENGTH:
            raise Unauthenticated
        principal = await self._principals.get(hash_key(key))
        # A cached principal outlives its key.
        if principal is None or principal.has_expired(time.time()):
            raise Unauthenticated
        return principal


def tenant_of(principal: Principal) -> str:
    """Return the tenant of a key. Raises Forbidden for an operator's."""
    if principal.tenant_id is None:
        raise Forbidden("An operator's key cannot call models. Use a tenant's key.")
    return principal.tenant_id
