"""Tenants and their API keys."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from lmaas.audit import Audit
from lmaas.errors import Conflict, NotFound
from lmaas.store.audit import record
from lmaas.store.batches import delete_batches
from lmaas.store.database import Database, new_id
from lmaas.store.files import expire_files
from lmaas.store.paging import Part, rows_of
from lmaas.store.retention import delete_state
from lmaas.store.scopes import OPERATOR, AnyScope, KeyScope, scope_of
from lmaas.store.tables import adapters, api_keys, budget_notices, idempotency, tenants, webhooks
from lmaas.types import Limits, Principal, Role

NO_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Tenant:
    """Billing and isolation boundary. `max_queued` counts waiting requests, `max_adapters` adapter names."""

    id: str
    name: str
    tier: str
    max_queued: int
    max_adapters: int
    created_at: datetime
    limits: Limits


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A credential, without its secret: only the hash is stored."""

    id: str
    tenant_id: str | None
    role: str
    name: str
    prefix: str
    created_at: datetime
    revoked_at: datetime | None
    expires_at: datetime | None
    limits: Limits


_TENANT = (tenants.c.id, tenants.c.name, tenants.c.tier, tenants.c.max_queued, tenants.c.max_adapters, tenants.c.created_at)
_KEY = (
    api_keys.c.id,
    api_keys.c.tenant_id,
    api_keys.c.role,
    api_keys.c.name,
    api_keys.c.prefix,
    api_keys.c.created_at,
    api_keys.c.revoked_at,
    api_keys.c.expires_at,
)
IS_SESSION = api_keys.c.parent_id.is_not(None)
IS_VALID = and_(api_keys.c.revoked_at.is_(None), or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > func.now()))
_TENANT_LIMITS = [tenants.c[field.name] for field in fields(Limits)]
_KEY_LIMITS = [api_keys.c[field.name] for field in fields(Limits)]


def _not_found() -> NotFound:
    return NotFound("The tenant does not exist.", code="tenant_not_found")


def _split(row: Sequence[Any], count: int) -> list[Any]:
    return [*row[:count], Limits(*row[count:])]


def _tenant(row: Sequence[Any]) -> Tenant:
    return Tenant(*_split(row, len(_TENANT)))


def _key(row: Sequence[Any]) -> ApiKey:
    return ApiKey(*_split(row, len(_KEY)))


async def create_tenant(
    db: Database,
    name: str,
    tier: str,
    max_queued: int,
    max_adapters: int,
    limits: Limits = NO_LIMITS,
    *,
    dry_run: bool = False,
    audit: Audit | None = None,
) -> Tenant:
    """Add a tenant and return it; with `dry_run`, return what it would be and store nothing.

    Raises Conflict if a live tenant has that name.
    """
    values = {"id": new_id("ten"), "name": name, "tier": tier, "max_queued": max_queued, "max_adapters": max_adapters} | asdict(limits)
    try:
        async with db.begin(OPERATOR) as connection:
            row = (await connection.execute(insert(tenants).values(values).returning(*_TENANT, *_TENANT_LIMITS))).one()
            await record(connection, audit, row.id, name)
            if dry_run:
                await connection.rollback()
    except IntegrityError as error:
        raise Conflict(f"A tenant named '{name}' exists already. Choose another name.", code="tenant_exists", param="name") from error
    return _tenant(row)


async def update_tenant(
    db: Database, tenant_id: str, changes: dict[str, Any], *, dry_run: bool = False, audit: Audit | None = None
) -> Tenant:
    """Change `tier`, `max_queued`, `max_adapters` or a limit (None: as the tier has it) and return the tenant.

    With `dry_run`, return what it would be and store nothing. Raises NotFound.
    """
    one = select(*_TENANT, *_TENANT_LIMITS).where(tenants.c.id == tenant_id, tenants.c.deleted_at.is_(None)).with_for_update()
    query = update(tenants).where(tenants.c.id == tenant_id).values(changes).returning(*_TENANT, *_TENANT_LIMITS)
    async with db.begin(OPERATOR) as connection:
        row = (await connection.execute(one)).one_or_none()
        if row is None:
            raise _not_found()
        if any(getattr(row, name) != value for name, value in changes.items()):
            row = (await connection.execute(query)).one()
            await record(connection, audit, tenant_id, row.name)
        if dry_run:
            await connection.rollback()
    return _tenant(row)


async def get_tenant(db: Database, id_or_name: str) -> Tenant:
    """Return a tenant by id or by name. Raises NotFound."""
    is_id = tenants.c.id == id_or_name
    is_name = (tenants.c.name == id_or_name) & tenants.c.deleted_at.is_(None)
    # A name of an older release may be the id of another tenant, or of a deleted one. The id counts more.
    query = select(*_TENANT, *_TENANT_LIMITS, tenants.c.deleted_at).where(is_id | is_name).order_by(is_id.desc()).limit(1)
    async with db.begin(OPERATOR) as connection:
        row = (await connection.execute(query)).one_or_none()
    if row is None or row.deleted_at is not None:
        raise _not_found()
    return _tenant(row[:-1])


async def get_own_tenant(db: Database, tenant_id: str) -> Tenant:
    """Return the tenant whose scope it is. Raises NotFound if it was deleted."""
    async with db.begin(tenant_id) as connection:
        row = (
            await connection.execute(select(*_TENANT, *_TENANT_LIMITS).where(tenants.c.id == tenant_id, tenants.c.deleted_at.is_(None)))
        ).one_or_none()
    if row is None:
        raise _not_found()
    return _tenant(row)


async def get_deleted_tenant(db: Database, id_or_name: str) -> Tenant:
    """Return a deleted tenant by its id, or the last deleted one of this name. Raises NotFound."""
    is_id = tenants.c.id == id_or_name
    query = (
        select(*_TENANT, *_TENANT_LIMITS)
        .where(is_id | (tenants.c.name == id_or_name), tenants.c.deleted_at.is_not(None))
        .order_by(is_id.desc(), tenants.c.deleted_at.desc())
        .limit(1)
    )
    async with db.begin(OPERATOR) as connection:
        row = (await connection.execute(query)).one_or_none()
    if row is None:
        raise _not_found()
    return _tenant(row)


async def list_tenants(db: Database, part: Part | None = None) -> list[Tenant]:
    """Return the live tenants, or a part of them, by name. Raises InvalidRequest for a part after an unknown one."""
    query = select(*_TENANT, *_TENANT_LIMITS).where(tenants.c.deleted_at.is_(None))
    async with db.begin(OPERATOR) as connection:
        return [_tenant(row) for row in await rows_of(connection, query, part, tenants.c.name, tenants.c.id)]


async def delete_tenant(db: Database, tenant_id: str, *, audit: Audit | None = None) -> None:
    """Delete a tenant, its keys, its webhooks, its adapters' rows and all stored responses, conversations and batches, and let its files
    expire. Its usage stays in the ledger.

    Raises NotFound, and Unavailable if Postgres is away. If not all responses and conversations could be deleted then, no key can read the
    rest, and it is deleted when it expires.
    """
    async with db.begin(OPERATOR) as connection:
        gone = await connection.execute(
            update(tenants)
            .where(tenants.c.id == tenant_id, tenants.c.deleted_at.is_(None))
            .values(deleted_at=func.now())
            .returning(tenants.c.name)
        )
        row = gone.first()
        if row is None:
            raise _not_found()
        await connection.execute(
            update(api_keys).where(api_keys.c.tenant_id == tenant_id, api_keys.c.revoked_at.is_(None)).values(revoked_at=func.now())
        )
        await connection.execute(delete(adapters).where(adapters.c.tenant_id == tenant_id))
        await connection.execute(delete(idempotency).where(idempotency.c.tenant_id == tenant_id))
        # Their deliveries go with them.
        for table in (webhooks, budget_notices):
            await connection.execute(delete(table).where(table.c.tenant_id == tenant_id))
        await expire_files(connection, tenant_id)
        await record(connection, audit, tenant_id, row.name)
    # In transactions of their own, because there may be millions. None is added any more.
    while await delete_state(db, tenant_id):
        pass
    while await delete_batches(db, tenant_id):
        pass


async def create_key(
    db: Database,
    tenant_id: str | None,
    role: Role,
    name: str,
    key_hash: str,
    prefix: str,
    limits: Limits = NO_LIMITS,
    *,
    expires_at: datetime | None = None,
    audit: Audit | None = None,
) -> ApiKey:
    """Store a new key's hash. `tenant_id` is None for operators only.

    Raises Conflict for a hash that exists or was revoked, and NotFound for a tenant that is deleted.
    """
    values = {"id": new_id("key"), "tenant_id": tenant_id, "role": role.value, "name": name, "hash": key_hash, "prefix": prefix}
    values |= {"expires_at": expires_at} | asdict(limits)
    try:
        async with db.begin(scope_of(tenant_id)) as connection:
            if tenant_id is not None:
                # A deletion of the tenant waits for this transaction and then revokes the key, or this one waits for the deletion.
                alive = select(tenants.c.id).where(tenants.c.id == tenant_id, tenants.c.deleted_at.is_(None)).with_for_update(read=True)
                if (await connection.execute(alive)).first() is None:
                    raise _not_found()
            row = (await connection.execute(insert(api_keys).values(values).returning(*_KEY, *_KEY_LIMITS))).one()
            await record(connection, audit, tenant_id, row.id)
    except IntegrityError as error:
        raise Conflict("This key exists already or was revoked. Use another key.", code="key_exists") from error
    return _key(row)


async def list_keys(db: Database, tenant_id: str | None, part: Part | None = None) -> list[ApiKey]:
    """Return the keys of a tenant (or of the operators), or a part of them, newest first, revoked ones among them. Sessions are no part.

    Raises InvalidRequest for a part after an unknown one.
    """
    owned = and_(api_keys.c.tenant_id.is_not_distinct_from(tenant_id), ~IS_SESSION)
    query = select(*_KEY, *_KEY_LIMITS).where(owned)
    async with db.begin(scope_of(tenant_id)) as connection:
        rows = await rows_of(connection, query, part, api_keys.c.created_at, api_keys.c.id, owned, newest_first=True)
    return [_key(row) for row in rows]


def _one_key(tenant_id: str | None, key_id: str) -> Select[Any]:
    owned = api_keys.c.tenant_id.is_not_distinct_from(tenant_id)
    return select(*_KEY, *_KEY_LIMITS).where(api_keys.c.id == key_id, owned, ~IS_SESSION).with_for_update()


async def revoke_key(db: Database, tenant_id: str | None, key_id: str, *, force: bool = False, audit: Audit | None = None) -> ApiKey:
    """Revoke a key of this tenant, or of the operators, and end its sessions. A key that has been revoked stays as it is.

    Raises NotFound, and unless `force`, Conflict `last_operator_key` if no operator's key would be left.
    """
    async with db.begin(scope_of(tenant_id)) as connection:
        if tenant_id is None and not force:
            # All of them are locked, in one order. Of two requests that revoke the last two keys, the second waits here for the first,
            # and then reads what the first has left.
            working = select(api_keys.c.id).where(api_keys.c.tenant_id.is_(None), ~IS_SESSION, IS_VALID).order_by(api_keys.c.id)
            if list((await connection.execute(working.with_for_update())).scalars()) == [key_id]:
                raise Conflict(
                    "This is the last key of an operator: without it, the service cannot be managed. Make another key first, or set "
                    "force=true to revoke it all the same.",
                    code="last_operator_key",
                )
        row = (await connection.execute(_one_key(tenant_id, key_id))).one_or_none()
        if row is None:
            raise NotFound("The key does not exist.", code="key_not_found")
        if row.revoked_at is None:
            query = update(api_keys).where(api_keys.c.id == key_id).values(revoked_at=func.now()).returning(*_KEY, *_KEY_LIMITS)
            row = (await connection.execute(query)).one()
            sessions = update(api_keys).where(api_keys.c.parent_id == key_id, api_keys.c.revoked_at.is_(None))
            await connection.execute(sessions.values(revoked_at=func.now()))
            await record(connection, audit, tenant_id, key_id)
    return _key(row)


async def change_key(db: Database, tenant_id: str | None, key_id: str, changes: dict[str, Any], *, audit: Audit | None = None) -> ApiKey:
    """Change limits of a key of this tenant (None: no limit of its own), and its `expires_at` (None: never). Its sessions get the same
    limits, and end with it at the latest. Raises NotFound."""
    async with db.begin(scope_of(tenant_id)) as connection:
        row = (await connection.execute(_one_key(tenant_id, key_id))).one_or_none()
        if row is None:
            raise NotFound("The key does not exist.", code="key_not_found")
        if any(getattr(row, name) != value for name, value in changes.items()):
            query = update(api_keys).where(api_keys.c.id == key_id).values(changes).returning(*_KEY, *_KEY_LIMITS)
            row = (await connection.execute(query)).one()
            of_sessions = {name: value for name, value in changes.items() if name != "expires_at"}
            end = func.least(api_keys.c.expires_at, row.expires_at)
            await connection.execute(update(api_keys).where(api_keys.c.parent_id == key_id).values(of_sessions | {"expires_at": end}))
            await record(connection, audit, tenant_id, key_id)
    return _key(row)


async def find_principal(db: Database, key_hash: str) -> Principal | None:
    """Return the principal of the key with this hash, or None if there is none."""
    return await _principal(db, KeyScope(key_hash), and_(api_keys.c.hash == key_hash, IS_VALID))


async def principal_of_key(db: Database, tenant_id: str, key_id: str) -> Principal | None:
    """Return the principal of a tenant's key, whose durable work runs, or None if the key is not valid any more. What a session has begun
    goes on after its end."""
    query = and_(api_keys.c.tenant_id == tenant_id, api_keys.c.id == key_id, or_(IS_SESSION, IS_VALID))
    principal = await _principal(db, tenant_id, query)
    return principal if principal is None or principal.session_id is None else replace(principal, expires_at=None)


async def _principal(db: Database, scope: AnyScope, is_key: ColumnElement[bool]) -> Principal | None:
    query = (
        select(
            api_keys.c.id,
            api_keys.c.parent_id,
            api_keys.c.name.label("person"),
            api_keys.c.expires_at,
            api_keys.c.role,
            api_keys.c.tenant_id,
            tenants.c.name,
            tenants.c.max_queued,
            tenants.c.tier,
            *(column.label(f"tenant_{column.name}") for column in _TENANT_LIMITS),
            *_KEY_LIMITS,
        )
        .join_from(api_keys, tenants, api_keys.c.tenant_id == tenants.c.id, isouter=True)
        .where(is_key, tenants.c.deleted_at.is_(None))
    )
    async with db.begin(scope) as connection:
        row = (await connection.execute(query)).first()
    if row is None:
        return None
    count = len(_KEY_LIMITS)
    limits, key_limits = Limits(*row[-2 * count : -count]), Limits(*row[-count:])
    # A session of a named person acts for itself, because its key is the console's.
    key_id = row.id if row.parent_id is None or row.person else row.parent_id
    return Principal(
        key_id,
        Role(row.role),
        row.tenant_id,
        row.name,
        row.max_queued or 0,
        row.tier or "",
        limits,
        key_limits,
        None if row.expires_at is None else row.expires_at.timestamp(),
        None if row.parent_id is None else row.id,
    )
