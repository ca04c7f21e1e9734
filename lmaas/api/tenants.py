"""Handlers for tenants and keys."""

from dataclasses import asdict, fields
from datetime import UTC, datetime, timedelta
from typing import Any

from msgspec import UNSET, Struct

from lmaas.admission.tiers import DEFAULT_TIER, effective
from lmaas.api.context import Api, ApiCall, WithStatus
from lmaas.api.operation import page_of
from lmaas.api.shapes import tenants as shapes
from lmaas.api.shapes.common import DryRun, Page, Paging
from lmaas.api.shapes.tenants import (
    CreatedKey,
    DeletedTenant,
    Key,
    KeyChange,
    NewKey,
    NewLimits,
    NewOperatorKey,
    NewTenant,
    Revocation,
    Tenant,
    TenantChange,
)
from lmaas.errors import Conflict, InvalidRequest, NotFound, Unavailable
from lmaas.keys import hash_key, new_key, shown_prefix
from lmaas.store import tenants as rows
from lmaas.store.paging import Part
from lmaas.types import Limits, Role

_LIMITS = tuple(field.name for field in fields(Limits))
_EXPIRY = "expires_in_s"
#: The values of a new tenant unless the operator gives others. Null restores them.
DEFAULTS: dict[str, Any] = {"tier": DEFAULT_TIER, "max_queued": 64, "max_adapters": 20}


def shown_tenant(tenant: rows.Tenant) -> Tenant:
    """Return a tenant as the API shows it."""
    return Tenant(
        id=tenant.id,
        name=tenant.name,
        tier=tenant.tier,  # type: ignore[arg-type]  # the database has only names of tiers
        max_queued=tenant.max_queued,
        max_adapters=tenant.max_adapters,
        effective_limits=shapes.Limits(**asdict(effective(tenant.limits, tenant.tier))),
        created_at=tenant.created_at,
        **asdict(tenant.limits),
    )


def _key_values(key: rows.ApiKey) -> dict[str, Any]:
    names = ("id", "role", "name", "prefix", "created_at", "revoked_at", "expires_at")
    return {name: getattr(key, name) for name in names} | asdict(key.limits)


def _given(body: Struct) -> dict[str, Any]:
    """Return the values that a body gives, with defaults in place of null. A limit of 0 or null is none of its own: None."""
    given = {name: getattr(body, name) for name in body.__struct_fields__ if getattr(body, name) is not UNSET}
    return {name: (value or None) if name in _LIMITS else DEFAULTS.get(name) if value is None else value for name, value in given.items()}


def _limits(body: NewLimits) -> Limits:
    return Limits(**{name: value for name, value in _given(body).items() if name in _LIMITS})


def _expiry(expires_in_s: int | None) -> datetime | None:
    return datetime.now(UTC) + timedelta(seconds=expires_in_s) if expires_in_s else None


async def list_tenants(api: Api, call: ApiCall[None, Paging]) -> Page[Tenant]:
    """Return a page of tenants, by name."""
    found = await rows.list_tenants(api.db, Part(call.query.limit, call.query.after))
    return page_of([shown_tenant(tenant) for tenant in found], [tenant.id for tenant in found], call.query.limit)


async def create_tenant(api: Api, call: ApiCall[NewTenant, DryRun]) -> Tenant | WithStatus:
    """Create a tenant; a dry run has the status 200."""
    values = DEFAULTS | _given(call.body)
    given = (values["name"], values["tier"], values["max_queued"], values["max_adapters"], _limits(call.body))
    tenant = await rows.create_tenant(api.db, *given, dry_run=call.query.dry_run, audit=call.audit)
    shown = shown_tenant(tenant)
    return WithStatus(shown, 200) if call.query.dry_run else shown


async def get_tenant(api: Api, call: ApiCall[None, None]) -> Tenant:
    """Return one tenant, by id or name."""
    return shown_tenant(await rows.get_tenant(api.db, call.path["tenant"]))


async def get_own_tenant(api: Api, call: ApiCall[None, None]) -> Tenant:
    """Return the tenant of the key."""
    return shown_tenant(await rows.get_own_tenant(api.db, call.tenant_id))


async def change_tenant(api: Api, call: ApiCall[TenantChange, DryRun]) -> Tenant:
    """Change values of a tenant. Null puts a default back."""
    tenant = await rows.get_tenant(api.db, call.path["tenant"])
    changes = _given(call.body)
    if changes:
        tenant = await rows.update_tenant(api.db, tenant.id, changes, dry_run=call.query.dry_run, audit=call.audit)
    return shown_tenant(tenant)


async def delete_tenant(api: Api, call: ApiCall[None, None]) -> DeletedTenant:
    """Delete a tenant and then its files.

    The rows go first, in one transaction with the audit record. If the files cannot be deleted then, the request fails, and a request with
    the tenant's id deletes them later: a deleted tenant is found as long as it has files. One with its name does too, unless another tenant
    has that name by now: then it is refused, since it may be the repeat of the first.
    """
    given = call.path["tenant"]
    try:
        tenant = await rows.get_tenant(api.db, given)
    except NotFound:
        tenant = await rows.get_deleted_tenant(api.db, given)
        if not await _delete_files(api, tenant.id):
            raise
    else:
        if given != tenant.id:
            await _refuse_repeat(api, tenant)
        await rows.delete_tenant(api.db, tenant.id, audit=call.audit)
        await _delete_files(api, tenant.id)
    return DeletedTenant(id=tenant.id, deleted=True)


async def _delete_files(api: Api, tenant_id: str) -> bool:
    """Delete the files of a deleted tenant, and return whether there were any of its adapters. Raises Unavailable, whose message has the
    tenant's id, for those of adapters; others that cannot be deleted now are left to the controller."""
    await api.files.delete_all(tenant_id)
    try:
        return await api.adapters.delete_all(tenant_id)
    except Unavailable as error:
        raise Unavailable(
            f"The tenant is deleted, but not all of its files are: {error.message} Repeat the request with the tenant's id, {tenant_id}: "
            "another tenant may get its name.",
            code=error.error_code,
            retry_after_s=error.retry_after_s,
        ) from error


async def _refuse_repeat(api: Api, tenant: rows.Tenant) -> None:
    """Raises Conflict if the last deleted tenant of this name still has files: the request may have been sent for that one."""
    try:
        earlier = await rows.get_deleted_tenant(api.db, tenant.name)
    except NotFound:
        return
    if await api.adapters.has_files(earlier.id):
        raise Conflict(
            f"A tenant named '{tenant.name}' was deleted before, and some of its files are left. Delete the tenant by its id: {earlier.id} "
            f"for the files of the deleted one, {tenant.id} for the one that has this name now.",
            code="tenant_ambiguous",
        )


async def list_keys(api: Api, call: ApiCall[None, Paging]) -> Page[Key]:
    """Return a page of the owner's keys, newest first, without their secrets."""
    found = await rows.list_keys(api.db, call.owner, Part(call.query.limit, call.query.after))
    return page_of([Key(**_key_values(key)) for key in found], [key.id for key in found], call.query.limit)


async def create_key(api: Api, call: ApiCall[NewKey | NewOperatorKey, None]) -> CreatedKey:
    """Create a key of the owner. The answer has its secret."""
    limits = Limits() if isinstance(call.body, NewOperatorKey) else _limits(call.body)
    secret = new_key()
    given = (Role(call.body.role), call.body.name, hash_key(secret), shown_prefix(secret), limits)
    key = await rows.create_key(api.db, call.owner, *given, expires_at=_expiry(call.body.expires_in_s), audit=call.audit)
    return CreatedKey(key=secret, **_key_values(key))


async def change_key(api: Api, call: ApiCall[KeyChange, None]) -> Key:
    """Change limits and expiry of a tenant's key."""
    changes = _given(call.body)
    if not changes:
        raise InvalidRequest(f"Give at least one limit, or the expiry: {', '.join((*_LIMITS, _EXPIRY))}.", code="missing_parameter")
    if _EXPIRY in changes:
        changes["expires_at"] = _expiry(changes.pop(_EXPIRY))
    return Key(**_key_values(await rows.change_key(api.db, call.tenant_id, call.path["key"], changes, audit=call.audit)))


async def revoke_key(api: Api, call: ApiCall[None, Revocation | None]) -> Key:
    """Revoke a key of the owner."""
    force = call.query is not None and call.query.force
    return Key(**_key_values(await rows.revoke_key(api.db, call.owner, call.path["key"], force=force, audit=call.audit)))
