"""From a key to a principal."""

from lmaas.errors import Unauthenticated
from lmaas.gateway.cache import Changes, MomentCache
from lmaas.keys import PREFIX, hash_key
from lmaas.store.database import Database
from lmaas.store.tenants import find_principal
from lmaas.types import Principal

#: A revoked key works this much longer at most.
FRESH_S = 0.5
MAX_KEY_LENGTH = 200


class Authenticator:
    """Knows who holds a key. Known keys keep working for `grace_s` seconds while Postgres is away."""

    def __init__(self, db: Database, grace_s: float, changes: Changes | None = None) -> None:
        self._principals = MomentCache[str, Principal](
            lambda key_hash: find_principal(db, key_hash), fresh_s=FRESH_S, grace_s=grace_s, changes=changes
        )

    async def __call__(self, authorization: str | None) -> Principal:
        """The principal of an `Authorization` header. Raises Unauthenticated, or Unavailable if the key is unknown here and
        Postgres is away."""
        scheme, _, key = (authorization or "").partition(" ")
        key = key.strip()
        # Anything that cannot be a key is not worth a question to the database.
        if scheme.lower() != "bearer" or not key.startswith(PREFIX) or len(key) > MAX_KEY_LENGTH:
            raise Unauthenticated
        principal = await self._principals.get(hash_key(key))
        if principal is None:
            raise Unauthenticated
        return principal
