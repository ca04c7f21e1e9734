"""The audit log in the database."""

from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from lmaas.audit import Action, Audit
from lmaas.store.database import Database
from lmaas.store.scopes import OPERATOR
from lmaas.store.tables import audit_log


async def record(connection: AsyncConnection, audit: Audit | None, tenant_id: str | None, target: str) -> None:
    """Write the record of a change on the connection that makes the change, so that both are committed or neither is.

    `tenant_id` is the tenant that the change concerns, None for changes that concern only operators. `target` names the changed object.
    Without an `audit` nothing is written: routine changes by the service, such as stopping a replica, are not recorded.
    """
    if audit is not None:
        values = {"actor": audit.actor, "key_id": audit.key_id, "request_id": audit.request_id}
        await connection.execute(insert(audit_log).values(tenant_id=tenant_id, action=audit.action.value, target=target, **values))


async def targets(db: Database, action: Action, actor: str) -> set[str]:
    """Return what an actor did an action to, among what belongs to the operators."""
    query = select(audit_log.c.target).where(
        audit_log.c.tenant_id.is_(None), audit_log.c.action == action.value, audit_log.c.actor == actor
    )
    async with db.begin(OPERATOR) as connection:
        return set((await connection.execute(query)).scalars())
