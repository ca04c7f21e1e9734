"""Tenants and keys over HTTP."""

from dataclasses import asdict, fields
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from lmaas.admission.tiers import DEFAULT_TIER, TIERS, effective
from lmaas.api.context import Api, audited, in_range, is_dry_run, json_body
from lmaas.audit import Action
from lmaas.errors import InvalidRequest, NotFound
from lmaas.http import JsonResponse
from lmaas.keys import hash_key, new_key, shown_prefix
from lmaas.store import tenants as rows
from lmaas.types import NAME_PATTERN, Limits, Principal, Role

#: Null: as the tier has it, or for a key, no limit.
LIMITS: dict[str, type] = {field.name: int for field in fields(Limits)}
FIELDS: dict[str, type] = {"tier": str, "max_queued": int, "max_adapters": int} | LIMITS
#: What a new tenant gets unless the operator gives other values, and what null puts back.
DEFAULTS: dict[str, Any] = {"tier": DEFAULT_TIER, "max_queued": 64, "max_adapters": 20}
MAX_LIMIT = 10**15


def shown_tenant(tenant: rows.Tenant) -> dict[str, Any]:
    """A tenant as the API shows it."""
    return {
        "object": "tenant",
        "id": tenant.id,
        "name": tenant.name,
        "tier": tenant.tier,
        "max_queued": tenant.max_queued,
        "max_adapters": tenant.max_adapters,
        **asdict(tenant.limits),
        "effective_limits": asdict(effective(tenant.limits, tenant.tier)),
        "created_at": tenant.created_at.isoformat(),
    }


def shown_key(key: rows.ApiKey) -> dict[str, Any]:
    """A key as the API shows it: never the secret."""
    return {
        "object": "key",
        "id": key.id,
        "role": key.role,
        "name": key.name,
        "prefix": key.prefix,
        "created_at": key.created_at.isoformat(),
        "revoked_at": key.revoked_at.isoformat() if key.revoked_at else None,
        **asdict(key.limits),
    }


def _check_limits(body: dict[str, Any]) -> None:
    for name in LIMITS:
        in_range(body, name, 1, MAX_LIMIT)


def _check_fields(body: dict[str, Any]) -> None:
    if body.get("tier", DEFAULT_TIER) not in TIERS:
        raise InvalidRequest(f"'tier' must be one of: {', '.join(TIERS)}.", code="out_of_range", param="tier")
    in_range(body, "max_queued", 1, 100_000)
    in_range(body, "max_adapters", 0, 100_000)
    _check_limits(body)


def _with_defaults(body: dict[str, Any]) -> dict[str, Any]:
    """Return the body with defaults in place of null. A limit that is null stays so: the tier's holds."""
    return {name: DEFAULTS.get(name) if value is None else value for name, value in body.items()}


def _limits(body: dict[str, Any]) -> Limits:
    return Limits(**{name: body[name] for name in LIMITS if name in body})


async def list_tenants(api: Api, request: Request) -> Response:
    """Every tenant."""
    await api.operator(request)
    return JsonResponse({"object": "list", "data": [shown_tenant(tenant) for tenant in await rows.list_tenants(api.db)]})


async def create_tenant(api: Api, request: Request) -> Response:
    """A new tenant, without keys yet."""
    principal = await api.operator(request)
    dry_run = is_dry_run(request)
    body = DEFAULTS | _with_defaults(await json_body(request, {"name": str, **FIELDS}, ("name",), FIELDS))
    if NAME_PATTERN.fullmatch(body["name"]) is None:
        raise InvalidRequest("A tenant's name has 1 to 63 lower-case letters, digits, '.', '_' or '-'.", code="invalid_name", param="name")
    _check_fields(body)
    audit = audited(request, principal, Action.TENANT_CREATE)
    given = (body["name"], body["tier"], body["max_queued"], body["max_adapters"], _limits(body))
    tenant = await rows.create_tenant(api.db, *given, dry_run=dry_run, audit=audit)
    return JsonResponse(shown_tenant(tenant), status_code=200 if dry_run else 201)


async def get_tenant(api: Api, request: Request) -> Response:
    """One tenant, by id or name."""
    await api.operator(request)
    return JsonResponse(shown_tenant(await rows.get_tenant(api.db, request.path_params["tenant"])))


async def change_tenant(api: Api, request: Request) -> Response:
    """Another tier or other limits for a tenant. Null puts a default back."""
    principal = await api.operator(request)
    dry_run = is_dry_run(request)
    tenant = await rows.get_tenant(api.db, request.path_params["tenant"])
    body = _with_defaults(await json_body(request, FIELDS, nullable=FIELDS))
    _check_fields(body)
    if body:
        audit = audited(request, principal, Action.TENANT_CHANGE)
        tenant = await rows.update_tenant(api.db, tenant.id, body, dry_run=dry_run, audit=audit)
    return JsonResponse(shown_tenant(tenant))


async def delete_tenant(api: Api, request: Request) -> Response:
    """End a tenant: keys stop at once, adapters and their files go, usage stays for the bill."""
    principal = await api.operator(request)
    asked = request.path_params["tenant"]
    # The rows first, in one transaction with the audit record. If the files cannot be deleted then, the request fails, and the same
    # request deletes them later: a tenant that has been deleted is found as long as it has files.
    try:
        tenant = await rows.get_tenant(api.db, asked)
    except NotFound:
        tenant = await rows.get_deleted_tenant(api.db, asked)
        if not await api.adapters.delete_all(tenant.id):
            raise
    else:
        await rows.delete_tenant(api.db, tenant.id, audit=audited(request, principal, Action.TENANT_DELETE))
        await api.adapters.delete_all(tenant.id)
    return JsonResponse({"object": "tenant.deleted", "id": tenant.id, "deleted": True})


async def _owner(api: Api, request: Request) -> tuple[str | None, Principal]:
    """Return whose keys are meant, a tenant's or under `/admin/v1/keys` the operators' (None), and who asks."""
    if request.scope["path"].startswith("/admin/v1/keys"):
        return None, await api.operator(request)
    return await api.tenant(request, manage=True)


async def list_keys(api: Api, request: Request) -> Response:
    """The owner's keys, without their secrets."""
    owner, _ = await _owner(api, request)
    return JsonResponse({"object": "list", "data": [shown_key(key) for key in await rows.list_keys(api.db, owner)]})


async def create_key(api: Api, request: Request) -> Response:
    """A new key. Its secret is in this answer and nowhere else."""
    owner, asker = await _owner(api, request)
    body = await json_body(request, {"role": str, "name": str} | ({} if owner is None else LIMITS), nullable=LIMITS)
    _check_limits(body)
    allowed = [Role.OPERATOR] if owner is None else [Role.INFERENCE, Role.TENANT_ADMIN]
    role = body.get("role", allowed[0].value)
    if role not in allowed:
        raise InvalidRequest(f"'role' must be one of: {', '.join(allowed)}.", code="out_of_range", param="role")
    if len(body.get("name", "")) > 100:
        raise InvalidRequest("'name' may have 100 characters at most.", code="out_of_range", param="name")
    secret = new_key()
    given = (Role(role), body.get("name", ""), hash_key(secret), shown_prefix(secret), _limits(body))
    key = await rows.create_key(api.db, owner, *given, audit=audited(request, asker, Action.KEY_CREATE))
    return JsonResponse(shown_key(key) | {"key": secret}, status_code=201)


async def change_key(api: Api, request: Request) -> Response:
    """Other limits for a tenant's key."""
    tenant_id, principal = await api.tenant(request, manage=True)
    body = await json_body(request, LIMITS, nullable=LIMITS)
    _check_limits(body)
    if not body:
        raise InvalidRequest("Name at least one limit.", code="missing_parameter")
    audit = audited(request, principal, Action.KEY_CHANGE)
    key = await rows.change_key(api.db, tenant_id, request.path_params["key"], body, audit=audit)
    return JsonResponse(shown_key(key))


async def revoke_key(api: Api, request: Request) -> Response:
    """Revoke a key: within a second it works nowhere. The last key of the operators is refused without `?force=true`."""
    owner, asker = await _owner(api, request)
    audit = audited(request, asker, Action.KEY_REVOKE)
    force = request.query_params.get("force") == "true"
    key = await rows.revoke_key(api.db, owner, request.path_params["key"], force=force, audit=audit)
    return JsonResponse(shown_key(key))
