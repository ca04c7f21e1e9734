"""Reads from the ledger's daily sums what tenants and keys have used this month, for when Redis has lost these figures."""

import asyncio
import functools
from collections.abc import Mapping, Sequence

from lmaas.scheduling.client import Seed
from lmaas.store.database import Database
from lmaas.store.usage_days import month_total


class Months:
    """Reads each figure once for all requests that need it: after a loss of Redis, many do at the same time."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._asking: dict[tuple[str, int], asyncio.Task[Seed]] = {}

    async def seeds(self, tenant_id: str, scopes: Sequence[str], month: int) -> Mapping[str, Seed]:
        """Return what the tenant or its keys have used in a month (year x 100 + month). Raises Unavailable."""
        return {scope: await asyncio.shield(self._ask(tenant_id, scope, month)) for scope in scopes}

    def _ask(self, tenant_id: str, scope: str, month: int) -> "asyncio.Task[Seed]":
        key = (scope, month)
        asking = self._asking.get(key)
        if asking is None:
            asking = asyncio.create_task(self._total(tenant_id, scope, month), name=f"month-{scope}")
            self._asking[key] = asking
            asking.add_done_callback(functools.partial(self._answered, key))
        return asking

    def _answered(self, key: tuple[str, int], asking: "asyncio.Task[Seed]") -> None:
        del self._asking[key]
        if not asking.cancelled():
            asking.exception()  # requests that still wait receive it

    async def _total(self, tenant_id: str, scope: str, month: int) -> Seed:
        key_id = None if scope == tenant_id else scope
        return Seed(month, *await month_total(self._db, tenant_id, month // 100, month % 100, key_id=key_id))
