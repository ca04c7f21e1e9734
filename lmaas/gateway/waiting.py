"""Why requests for a pool wait, in words that are for tenants: never a path, a machine or an engine's own words."""

import asyncio

from lmaas.errors import Unavailable
from lmaas.gateway.cache import MomentCache
from lmaas.store.database import Database
from lmaas.store.pools import is_blocked
from lmaas.store.replicas import failed_starts

FRESH_S = 1.0
GRACE_S = 10.0
#: Nobody waits longer for an explanation.
PATIENCE_S = 0.2
#: How the reasons of replicas begin, and what tenants are told instead.
CAUSES = {
    "the engine ended": "its process ended early",
    "the engine was not ready within": "it was not ready in time",
    "the engine does not generate": "it does not generate",
    "its supervisor could not be started": "no process could be started for it",
    "its supervisor is gone": "its process ended early",
}
NO_MACHINE = "every machine is busy with other models"


class Waiting:
    """Explains waits. One question a second for each pool, and only while somebody waits for it."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._reasons = MomentCache[str, str](self._ask, fresh_s=FRESH_S, grace_s=GRACE_S)

    async def why(self, pool_id: str) -> str:
        """What keeps this pool's engines from starting; empty if nothing does, or nobody knows."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await self._reasons.get(pool_id) or ""
        except (Unavailable, TimeoutError):
            return ""

    async def explained(self, late: Unavailable, pool_id: str) -> Unavailable:
        """The error of a request past its deadline, with what kept its engines from starting."""
        reason = await self.why(pool_id)
        if not reason:
            return late
        message = f"There was no capacity for this request before its deadline: {reason}. Please try again later."
        return Unavailable(message, code=late.error_code, retry_after_s=max(30.0, late.retry_after_s or 0.0))

    async def _ask(self, pool_id: str) -> str:
        failed = await failed_starts(self._db, pool_id)
        if failed is not None:
            cause = next((told for begins, told in CAUSES.items() if failed.reason.startswith(begins)), "an error on our side")
            times = "" if failed.count == 1 else f" ({failed.count} times in a row)"
            return f"the model's engine fails to start{times}: {cause}"
        return NO_MACHINE if await is_blocked(self._db, pool_id) else ""
