"""Events for webhooks when a part of a month's budget or tokens is used, decided from the ledger."""

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable
from datetime import UTC, date, datetime, timedelta
from itertools import groupby

from lmaas.admission.tiers import TIERS, tier
from lmaas.errors import Unavailable
from lmaas.store.budgets import Notice, Owner, add_notices, delete_old_notices, known_notices, list_owners, month_use
from lmaas.store.database import Database

log = logging.getLogger(__name__)

#: The parts of a limit that are reported, in percent.
THRESHOLDS = (50, 80, 100)
CHECK_S = 60.0
#: For how long the month before is checked after its end, because the usage of its last requests comes later.
LATE = timedelta(hours=1)
_PICO = 1_000_000


def allowed_of(owner: Owner) -> dict[str, int]:
    """Return the limits per month that hold for an owner, by name: for a tenant without its own, those of its tier. Limits of 0 count as
    none."""
    usual = tier(owner.tier).limits if owner.tier is not None else None
    found = {
        "tokens_per_month": owner.tokens_per_month or (usual and usual.tokens_per_month),
        "budget_per_month": owner.budget_per_month or (usual and usual.budget_per_month),
    }
    return {name: limit for name, limit in found.items() if limit}


def reached(owner: Owner, tokens: int, picousd: int, month: date) -> list[Notice]:
    """Return a notice for each part of each limit that an owner has used in a month."""
    used = {"tokens_per_month": tokens, "budget_per_month": picousd}
    found = []
    for name, allowed in allowed_of(owner).items():
        unit = _PICO if name == "budget_per_month" else 1
        for percent in THRESHOLDS:
            if used[name] * 100 >= allowed * unit * percent:
                found.append(Notice(owner.tenant_id, owner.id, month, name, percent, used[name] // unit, allowed))
    return found


def months(now: datetime) -> list[date]:
    """Return the months whose budgets are checked now, by their first days."""
    return sorted({moment.date().replace(day=1) for moment in (now - LATE, now)})


class BudgetEvents:
    """Adds the events of budgets, each once a month. Several controllers may do so at the same time."""

    def __init__(self, db: Database, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._db, self._clock = db, clock

    async def run(self) -> None:
        """Check once a minute until cancelled."""
        while True:
            try:
                await self.check()
            except Unavailable as error:
                log.warning("budgets cannot be checked now", extra={"action": "budgets", "detail": str(error)})
            await asyncio.sleep(CHECK_S)

    async def check(self) -> int:
        """Add the events that are due. Returns their number. Raises Unavailable."""
        tiers = [name for name, each in TIERS.items() if each.limits.tokens_per_month or each.limits.budget_per_month]
        owners = await list_owners(self._db, tiers)
        checked, count = months(self._clock()), 0
        for month in checked:
            used, known = await month_use(self._db, owners, month), await known_notices(self._db, month)
            for tenant_id, notices in _by_tenant(_new(owners, used, known, month)):
                count += await add_notices(self._db, tenant_id, notices)
        await delete_old_notices(self._db, checked[0])
        return count


def _new(
    owners: Iterable[Owner], used: dict[str, tuple[int, int]], known: Collection[tuple[str, str, str, int]], month: date
) -> list[Notice]:
    found = [notice for owner in owners if owner.id in used for notice in reached(owner, *used[owner.id], month)]
    return [notice for notice in found if notice.key not in known]


def _by_tenant(notices: list[Notice]) -> Iterable[tuple[str, list[Notice]]]:
    ordered = sorted(notices, key=lambda notice: notice.key)
    return [(tenant_id, list(group)) for tenant_id, group in groupby(ordered, key=lambda notice: notice.tenant_id)]
