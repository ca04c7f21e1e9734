"""The limits per month of tenants and keys, what they have used of them, and the events of the parts that were used.

Controllers read all tenants here, from the daily sums of the ledger. An event and its notice are added in one transaction, so each comes
once.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import date

from sqlalchemy import delete, func, literal, or_, select, union_all
from sqlalchemy.dialects.postgresql import insert

from lmaas.states import EventType, UsageStatus
from lmaas.store.database import Database
from lmaas.store.events import add_event
from lmaas.store.scopes import SYSTEM
from lmaas.store.tables import api_keys, budget_notices, tenants, usage_days


@dataclass(frozen=True, slots=True)
class Owner:
    """A tenant or one of its keys with its own limits per month. `tier` is None for a key."""

    tenant_id: str
    id: str
    tier: str | None
    tokens_per_month: int | None
    budget_per_month: int | None


@dataclass(frozen=True, slots=True)
class Notice:
    """A part of a limit that was used in a month. `used` and `allowed` are tokens or micro-dollars."""

    tenant_id: str
    owner_id: str
    month: date
    limit: str
    percent: int
    used: int
    allowed: int

    @property
    def key(self) -> tuple[str, str, str, int]:
        """The key of which there is only one notice in a month."""
        return self.tenant_id, self.owner_id, self.limit, self.percent


async def list_owners(db: Database, tiers: Collection[str]) -> list[Owner]:
    """Return the tenants and keys with limits per month of their own, and the tenants of these tiers."""
    own = or_(tenants.c.tokens_per_month.is_not(None), tenants.c.budget_per_month.is_not(None), tenants.c.tier.in_(tiers))
    of_tenants = select(tenants.c.id, tenants.c.id, tenants.c.tier, tenants.c.tokens_per_month, tenants.c.budget_per_month).where(
        tenants.c.deleted_at.is_(None), own
    )
    own = or_(api_keys.c.tokens_per_month.is_not(None), api_keys.c.budget_per_month.is_not(None))
    of_keys = select(*(api_keys.c.tenant_id, api_keys.c.id, literal(None)), api_keys.c.tokens_per_month, api_keys.c.budget_per_month).where(
        api_keys.c.revoked_at.is_(None), api_keys.c.tenant_id.is_not(None), own
    )
    async with db.begin(SYSTEM) as connection:
        return [Owner(*row) for query in (of_tenants, of_keys) for row in await connection.execute(query)]


async def month_use(db: Database, owners: Sequence[Owner], month: date) -> dict[str, tuple[int, int]]:
    """Return the tokens and picodollars that these owners have used in a month, by their ids. Its first day names the month."""
    ids = [owner.id for owner in owners]
    following = date(month.year + month.month // 12, month.month % 12 + 1, 1)
    tokens = func.sum(usage_days.c.prompt_tokens + usage_days.c.completion_tokens)
    days = (usage_days.c.day >= month, usage_days.c.day < following, usage_days.c.status != UsageStatus.WASTED)
    sums = [
        select(column, tokens, func.sum(usage_days.c.charge_picousd)).where(column.in_(ids), *days).group_by(column)
        for column in (usage_days.c.tenant_id, usage_days.c.key_id)
    ]
    async with db.begin(SYSTEM) as connection:
        return {row[0]: (int(row[1]), int(row[2])) for row in await connection.execute(union_all(*sums))}


async def known_notices(db: Database, month: date) -> set[tuple[str, str, str, int]]:
    """Return the keys of a month's notices."""
    columns = budget_notices.c
    query = select(columns.tenant_id, columns.owner_id, columns["limit"], columns.percent).where(columns.month == month)
    async with db.begin(SYSTEM) as connection:
        return {tuple(row) for row in await connection.execute(query)}


async def add_notices(db: Database, tenant_id: str, notices: Sequence[Notice]) -> int:
    """Add notices of one tenant with their events. Returns the number of those that were new."""
    new = 0
    async with db.begin(SYSTEM) as connection:
        for each in notices:
            values = {"tenant_id": tenant_id, "owner_id": each.owner_id, "month": each.month, "limit": each.limit, "percent": each.percent}
            adding = insert(budget_notices).values(values).on_conflict_do_nothing().returning(budget_notices.c.percent)
            if (await connection.execute(adding)).first() is None:
                continue
            data = {
                "id": each.owner_id,
                "object": "tenant" if each.owner_id == tenant_id else "key",
                "month": f"{each.month:%Y-%m}",
                "limit": each.limit,
                "threshold_percent": each.percent,
                "used": each.used,
                "allowed": each.allowed,
            }
            await add_event(connection, tenant_id, EventType.BUDGET_THRESHOLD, data)
            new += 1
    return new


async def delete_old_notices(db: Database, before: date) -> None:
    """Delete the notices of the months before this one."""
    async with db.begin(SYSTEM) as connection:
        await connection.execute(delete(budget_notices).where(budget_notices.c.month < before))
