"""The reports about a waiting request: its position and the reason for its wait, without paths, machines or an engine's own messages."""

import asyncio
import math

from lmaas.errors import Unavailable
from lmaas.inference.cache import ReadCache
from lmaas.scheduling.leases import Standing
from lmaas.scheduling.states import WaitPhase
from lmaas.store.database import Database
from lmaas.store.pools import is_blocked
from lmaas.store.replicas import failed_starts

#: The time until a waiting streaming client gets its first comment, and the interval of later ones. Proxies close connections that are
#: silent for a minute.
FIRST_COMMENT_S = 1.0
COMMENT_EVERY_S = 10.0
FRESH_S = 1.0
GRACE_S = 10.0
#: The time that an explanation may take.
EXPLAIN_S = 0.2
#: The scheduler reports every second. After this time without a report, its last estimate is no longer passed on.
SILENT_S = 5.0
#: The beginnings of failed replicas' reasons, and the texts for tenants in their place.
CAUSES = {
    "the engine ended": "its process ended early",
    "the engine was not ready within": "it was not ready in time",
    "the engine stood still": "it was not ready in time",
    "the engine does not generate": "it does not generate",
    "the engine does not embed": "it does not embed",
    "its supervisor could not be started": "no process could be started for it",
    "its supervisor is gone": "its process ended early",
}
NO_MACHINE = "every machine is busy with other models"
SILENT = "queued: the queue does not report at present"
LOADING = "loading the adapter"


def comments(standing: Standing, reason: str, now: float) -> list[str]:
    """Return the comments of a stream that waits at `now` (monotonic seconds): its position, and what keeps its engine from starting.

    The first is `queued position=<n> estimated_wait_s=<s>`, followed by ` late_s=<s>` if the start or the turn takes longer than usual,
    ` start=unknown` if no start of this model has been seen yet, and ` cold_start=yes` while no engine of it is ready.
    """
    silent_s = now - standing.heard
    if silent_s > SILENT_S:
        return [SILENT, *([reason] if reason else [])]
    if standing.phase is WaitPhase.LOADING:
        return [LOADING]
    wait_s, late_s = standing.wait_ms / 1000, standing.late_ms / 1000
    if late_s > 0:
        wait_s, late_s = wait_s + silent_s, late_s + silent_s
    else:
        wait_s -= silent_s
    text = f"queued position={standing.position} estimated_wait_s={max(1, math.ceil(wait_s))}"
    if late_s >= 1:
        text += f" late_s={late_s:.0f}"
    if standing.assumed:
        text += " start=unknown"
    if standing.phase in (WaitPhase.STARTING, WaitPhase.ASKED):
        text += " cold_start=yes"
    return [text, *([reason] if reason else [])]


class WaitReasons:
    """Explains waits. It queries the database once a second for each pool, and only while requests wait for it."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._reasons = ReadCache[str, str](self._ask, fresh_s=FRESH_S, grace_s=GRACE_S)

    async def why(self, pool_id: str) -> str:
        """Return the reason why this pool's engines do not start. Empty if there is none, or if the database does not respond in time."""
        try:
            async with asyncio.timeout(EXPLAIN_S):
                return await self._reasons.get(pool_id) or ""
        except (Unavailable, TimeoutError):
            return ""

    async def explained(self, late: Unavailable, pool_id: str) -> Unavailable:
        """Return the error of a request past its deadline, with the reason why its engines did not start."""
        reason = await self.why(pool_id)
        if not reason:
            return late
        message = f"No engine had room for this request before its deadline: {reason}. Retry later."
        return Unavailable(message, code=late.error_code, retry_after_s=max(30.0, late.retry_after_s or 0.0))

    async def _ask(self, pool_id: str) -> str:
        failed = await failed_starts(self._db, pool_id)
        if failed is not None:
            cause = next((told for begins, told in CAUSES.items() if failed.reason.startswith(begins)), "an error on our side")
            times = "" if failed.count == 1 else f" ({failed.count} times in a row)"
            return f"the model's engine fails to start{times}: {cause}"
        return NO_MACHINE if await is_blocked(self._db, pool_id) else ""
