"""The principals of the keys whose durable work runs."""

import time

from lmaas.inference.cache import Changes, ReadCache
from lmaas.store.database import Database
from lmaas.store.tenants import principal_of_key
from lmaas.types import Principal

#: The longest time for which the work of a revoked key still begins.
FRESH_S = 0.5


class Keys:
    """Caches the principals of keys by the tenant's and the key's id. While Postgres is away, known keys keep working for `grace_s`."""

    def __init__(self, db: Database, grace_s: float, changes: Changes) -> None:
        self._principals = ReadCache[tuple[str, str], Principal](
            lambda key: principal_of_key(db, *key), fresh_s=FRESH_S, grace_s=grace_s, changes=changes
        )

    async def __call__(self, tenant_id: str, key_id: str) -> Principal | None:
        """Return the principal, or None if the key was revoked or has expired, or its tenant was deleted. Raises Unavailable."""
        principal = await self._principals.get((tenant_id, key_id))
        return None if principal is None or principal.has_expired(time.time()) else principal
