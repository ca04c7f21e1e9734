"""Checks whether a tenant has really used what its limits per month allow, or other requests have only reserved it."""

import time
from collections.abc import Callable
from datetime import UTC, datetime

from lmaas.admission.limits import limited_scopes
from lmaas.admission.months import Months
from lmaas.inference.protocol import AnyInference
from lmaas.scheduling.client import Seed
from lmaas.types import Principal

#: For how long a figure of the ledger is used, because it is a sum over all events of a month, and the most figures that are kept.
FRESH_S, MAX_FIGURES = 5.0, 1_000


class Budgets:
    """Compares refused lines with the ledger, which has no reservations. It is the same for all runners and gateways."""

    def __init__(self, months: Months, clock: Callable[[], float] = time.monotonic) -> None:
        self._months, self._clock = months, clock
        self._known: dict[str, tuple[float, Seed]] = {}

    async def is_spent(self, principal: Principal, inference: AnyInference) -> bool:
        """Return whether an inference exceeds a limit per month of its tenant or key even if nothing is reserved. Raises Unavailable."""
        record = inference.record
        prompt, completion = inference.request.estimate(inference.model.base.max_model_len)
        cost = prompt * record.prompt_price + completion * record.completion_price
        for limits in limited_scopes(principal, rate_limited=False):
            used = await self._used(principal.tenant_id or "", limits.id)
            if limits.tokens_per_month is not None and used.tokens + prompt + completion > limits.tokens_per_month:
                return True
            if limits.budget_per_month is not None and used.cost_picousd + cost > limits.budget_per_month * 1_000_000:
                return True
        return False

    async def _used(self, tenant_id: str, scope: str) -> Seed:
        now, today = self._clock(), datetime.now(UTC)
        month = today.year * 100 + today.month
        at, used = self._known.get(scope, (float("-inf"), None))
        if used is None or used.month != month or now - at > FRESH_S:
            used = (await self._months.seeds(tenant_id, [scope], month))[scope]
            self._known.pop(scope, None)
            self._known[scope] = now, used
            while len(self._known) > MAX_FIGURES:
                del self._known[next(iter(self._known))]
        return used
