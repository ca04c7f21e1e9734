"""Handlers for sessions: short-lived keys, with which people use the console."""

from datetime import timedelta
from typing import Any

from lmaas.api.context import Api, ApiCall
from lmaas.api.shapes.sessions import CreatedSession, EndedSession, NewOperatorSession, NewSession, Session
from lmaas.errors import Forbidden, InvalidRequest
from lmaas.keys import hash_key, new_key, shown_prefix
from lmaas.store import sessions as rows
from lmaas.store.tenants import get_tenant
from lmaas.types import Principal, Role


async def create_session(api: Api, call: ApiCall[NewSession, None]) -> CreatedSession:
    """Create a session with the rights of the calling key of a tenant."""
    return await _created(api, call, call.owner, call.principal.role, "", call.principal.tenant_name)


async def create_operator_session(api: Api, call: ApiCall[NewOperatorSession, None]) -> CreatedSession:
    """Create a session of an operator, or with a tenant, one of that tenant for the person that `subject` names."""
    body = call.body
    role = Role(body.role)
    if (role is Role.OPERATOR) != (body.tenant is None):
        raise InvalidRequest(
            "A session of the role operator has no tenant, and one of another role needs one. Give 'tenant' and 'role' together.",
            code="missing_parameter" if body.tenant is None else "unsupported_parameter",
            param="tenant",
        )
    if body.tenant is None:
        return await _created(api, call, None, role, body.subject, None)
    if not body.subject:
        raise InvalidRequest(
            "'subject' is required for a session of a tenant. Give the person's name.", code="missing_parameter", param="subject"
        )
    tenant = await get_tenant(api.db, body.tenant)
    return await _created(api, call, tenant.id, role, body.subject, tenant.name)


async def _created(api: Api, call: ApiCall[Any, None], tenant_id: str | None, role: Role, name: str, tenant: str | None) -> CreatedSession:
    if call.principal.session_id is not None:
        raise Forbidden("A session cannot make another session. Use an API key.")
    lifetime = timedelta(seconds=call.body.expires_in_s or api.settings.session_lifetime_s)
    secret = new_key()
    new = rows.NewSession(call.principal.key_id, tenant_id, role, name, hash_key(secret), shown_prefix(secret), lifetime)
    made = await rows.create_session(api.db, new, by_operator=call.principal.role is Role.OPERATOR, audit=call.audit)
    return CreatedSession(
        key=secret, id=made.id, role=role, tenant=tenant, name=name, created_at=made.created_at, expires_at=made.expires_at
    )


def _id_of(principal: Principal) -> str:
    return principal.session_id or principal.key_id


async def show_session(api: Api, call: ApiCall[None, None]) -> Session:
    """Return the session that the request is made with."""
    found = await rows.get_session(api.db, call.principal.tenant_id, _id_of(call.principal))
    return Session(
        id=found.id,
        role=Role(found.role),
        tenant=call.principal.tenant_name,
        name=found.name,
        created_at=found.created_at,
        expires_at=found.expires_at,
    )


async def end_session(api: Api, call: ApiCall[None, None]) -> EndedSession:
    """End the session that the request is made with."""
    ended = await rows.end_session(api.db, call.principal.tenant_id, _id_of(call.principal), audit=call.audit)
    return EndedSession(id=ended.id, deleted=True)
