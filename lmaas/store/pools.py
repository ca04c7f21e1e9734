"""The last decision for each pool, and its idle times. Only the controller writes them."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert

from lmaas.store.database import Database, Writes
from lmaas.store.scopes import SYSTEM
from lmaas.store.tables import pool_states


@dataclass(frozen=True, slots=True)
class PoolState:
    """The stored state of a pool. `decision` is for display: see `lmaas.control.controller`. `idle_times` are pairs of bin and count."""

    base_model_id: str
    decision: dict[str, Any]
    idle_times: list[list[float]]
    decided_at: datetime


_COLUMNS = [pool_states.c[name] for name in PoolState.__slots__]


async def save_pool_state(db: Writes, base_model_id: str, decision: dict[str, Any], idle_times: Sequence[tuple[int, float]]) -> None:
    """Replace the pool's last decision."""
    values = {"decision": decision, "idle_times": [list(pair) for pair in idle_times], "decided_at": func.now()}
    query = insert(pool_states).values(base_model_id=base_model_id, **values)
    async with db.begin(SYSTEM) as connection:
        await connection.execute(query.on_conflict_do_update(index_elements=["base_model_id"], set_=values))


async def pool_states_by_id(db: Database) -> dict[str, PoolState]:
    """Return every pool's last decision by the base model's id. A new pool has none."""
    async with db.begin(SYSTEM) as connection:
        return {row.base_model_id: PoolState(*row) for row in await connection.execute(select(*_COLUMNS))}


async def is_blocked(db: Database, base_model_id: str) -> bool:
    """Return whether the pool waits for a machine, by the controller's last decision."""
    query = select(pool_states.c.decision["blocked"].as_boolean()).where(pool_states.c.base_model_id == base_model_id)
    async with db.begin(SYSTEM) as connection:
        return bool((await connection.execute(query)).scalar_one_or_none())
