"""Sessions: short-lived keys, such as that of a person who has signed in to the console.

A session has the rights of the key that it was made from, or those that an operator's key gives it for a named person. It ends with that
key at the latest, is no part of the lists of keys, and counts against that key's limits.
"""

from dataclasses import asdict, dataclass, fields
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Select, delete, func, insert, literal, select, update

from lmaas.audit import Audit
from lmaas.errors import NotFound, Unauthenticated
from lmaas.store.audit import record
from lmaas.store.database import Database, new_id
from lmaas.store.scopes import OPERATOR, scope_of
from lmaas.store.tables import api_keys, tenants
from lmaas.store.tenants import IS_SESSION, IS_VALID
from lmaas.types import Limits, Role

#: The sessions of one key for one person that are kept. A new one replaces the oldest.
MAX_SESSIONS = 20


@dataclass(frozen=True, slots=True)
class Session:
    """A session. `name` is that of its person, empty if it acts for the key that it was made from."""

    id: str
    role: str
    tenant_id: str | None
    name: str
    created_at: datetime
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class NewSession:
    """A session to create. Its key is `parent_id`, whose limits it has if both belong to the same tenant."""

    parent_id: str
    tenant_id: str | None
    role: Role
    name: str
    hash: str
    prefix: str
    lifetime: timedelta


_SESSION = tuple(api_keys.c[field.name] for field in fields(Session))
_LIMITS = [api_keys.c[field.name] for field in fields(Limits)]


def _session(row: Any) -> Session:
    return Session(*row)


async def create_session(db: Database, new: NewSession, *, by_operator: bool, audit: Audit | None = None) -> Session:
    """Store a new session, and delete the oldest ones of the same key and person beyond MAX_SESSIONS.

    Raises Unauthenticated if its key has ended meanwhile, and NotFound for a tenant that is deleted.
    """
    async with db.begin(OPERATOR if by_operator else scope_of(new.tenant_id)) as connection:
        # The lock holds back the key's revocation, which ends its sessions.
        parent = select(api_keys.c.tenant_id, api_keys.c.expires_at, *_LIMITS).where(api_keys.c.id == new.parent_id, ~IS_SESSION, IS_VALID)
        key = (await connection.execute(parent.with_for_update(read=True))).one_or_none()
        if key is None:
            raise Unauthenticated
        if new.tenant_id is not None:
            alive = select(tenants.c.id).where(tenants.c.id == new.tenant_id, tenants.c.deleted_at.is_(None))
            if (await connection.execute(alive.with_for_update(read=True))).first() is None:
                raise NotFound("The tenant does not exist.", code="tenant_not_found", param="tenant")
        limits = Limits(*key[2:]) if key.tenant_id == new.tenant_id else Limits()
        values = {
            "id": new_id("ses"),
            "parent_id": new.parent_id,
            "tenant_id": new.tenant_id,
            "role": new.role.value,
            "name": new.name,
            "hash": new.hash,
            "prefix": new.prefix,
            "expires_at": func.least(func.now() + literal(new.lifetime), key.expires_at),
        } | asdict(limits)
        row = (await connection.execute(insert(api_keys).values(values).returning(*_SESSION))).one()
        await connection.execute(delete(api_keys).where(api_keys.c.id.in_(_superfluous(new))))
        await record(connection, audit, new.tenant_id, row.id)
    return _session(row)


def _superfluous(new: NewSession) -> Select[Any]:
    of_person = (
        api_keys.c.parent_id == new.parent_id,
        api_keys.c.name == new.name,
        api_keys.c.tenant_id.is_not_distinct_from(new.tenant_id),
    )
    return select(api_keys.c.id).where(*of_person).order_by(api_keys.c.created_at.desc(), api_keys.c.id.desc()).offset(MAX_SESSIONS)


async def get_session(db: Database, tenant_id: str | None, session_id: str) -> Session:
    """Return a session of this tenant, or of the operators. Raises NotFound."""
    async with db.begin(scope_of(tenant_id)) as connection:
        row = (await connection.execute(_one(tenant_id, session_id))).one_or_none()
    if row is None:
        raise _not_found()
    return _session(row)


async def end_session(db: Database, tenant_id: str | None, session_id: str, *, audit: Audit | None = None) -> Session:
    """End a session of this tenant, or of the operators. One that has ended stays as it is. Raises NotFound."""
    async with db.begin(scope_of(tenant_id)) as connection:
        row = (await connection.execute(_one(tenant_id, session_id).with_for_update())).one_or_none()
        if row is None:
            raise _not_found()
        ending = update(api_keys).where(api_keys.c.id == session_id, api_keys.c.revoked_at.is_(None)).values(revoked_at=func.now())
        if (await connection.execute(ending.returning(api_keys.c.id))).first() is not None:
            await record(connection, audit, tenant_id, session_id)
    return _session(row)


def _one(tenant_id: str | None, session_id: str) -> Select[Any]:
    owned = api_keys.c.tenant_id.is_not_distinct_from(tenant_id)
    return select(*_SESSION).where(api_keys.c.id == session_id, owned, IS_SESSION)


def _not_found() -> NotFound:
    return NotFound("This key is not a session. POST /v1/sessions makes one.", code="session_not_found")
