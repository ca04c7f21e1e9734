"""What the API's handlers share: their services, authorization, and checks of bodies and queries."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import date
from typing import Any

from starlette.requests import Request

from lmaas.adapters.service import Adapters
from lmaas.audit import Action, Audit
from lmaas.config import Settings
from lmaas.errors import Forbidden, InvalidRequest
from lmaas.http import Authenticate, api_key, limited, parse_json
from lmaas.store.database import Database
from lmaas.store.tenants import get_tenant
from lmaas.types import Principal, Role

MAX_JSON_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Api:
    """The services of the handlers, handed down from the composition root."""

    settings: Settings
    db: Database
    authenticate: Authenticate
    adapters: Adapters

    async def operator(self, request: Request) -> Principal:
        """Authenticate an operator. Raises Forbidden for a tenant's key."""
        principal = await self.authenticate(api_key(request.scope["headers"]))
        if principal.role is not Role.OPERATOR:
            raise Forbidden("This needs an operator's key.")
        return principal

    async def tenant(self, request: Request, *, manage: bool) -> tuple[str, Principal]:
        """Authenticate a request and return the id of the tenant that it is about: the key's own, or for an operator the one in the path.

        Raises Forbidden if `manage` and the key is for inference only.
        """
        if "tenant" in request.path_params:
            principal = await self.operator(request)
            return (await get_tenant(self.db, request.path_params["tenant"])).id, principal
        principal = await self.authenticate(api_key(request.scope["headers"]))
        if principal.tenant_id is None:
            raise Forbidden("An operator's key belongs to no tenant. Use /admin/v1/tenants/{tenant}/… instead.")
        if manage and principal.role is not Role.TENANT_ADMIN:
            raise Forbidden("This needs a key of the role tenant_admin.")
        return principal.tenant_id, principal


def audited(request: Request, principal: Principal, action: Action) -> Audit:
    """Return what the audit log records of a request."""
    return Audit(action, principal.role.value, principal.key_id, request.scope["request_id"])


async def json_body(
    request: Request, fields: dict[str, type], required: tuple[str, ...] = (), nullable: Collection[str] = ()
) -> dict[str, Any]:
    """Read the body's fields, each of its type, or null if `nullable`. Raises InvalidRequest for unknown or missing fields."""
    receive = limited(request.receive, request.scope, MAX_JSON_BYTES)
    text = await Request(request.scope, receive).body()
    body = parse_json(text) if text.strip() else {}
    check_body(body, fields, required, nullable)
    return body


def check_body(body: dict[str, Any], fields: dict[str, type], required: tuple[str, ...] = (), nullable: Collection[str] = ()) -> None:
    """Check that a body has fields of these types only, or null if `nullable`. Raises InvalidRequest for unknown or missing fields."""
    for name, value in body.items():
        if name not in fields:
            raise InvalidRequest(f"The field '{name[:100]}' is not known.", code="unsupported_parameter", param=name[:100])
        if value is None and name in nullable:
            continue
        kind = fields[name]
        wrong = isinstance(value, bool) if kind in (int, float) else False
        if wrong or not isinstance(value, (int, float) if kind is float else kind):
            raise InvalidRequest(f"'{name}' must be of the type {kind.__name__}.", code="invalid_type", param=name)
    for name in required:
        if name not in body:
            raise InvalidRequest(f"'{name}' is required.", code="missing_parameter", param=name)


def is_dry_run(request: Request) -> bool:
    """Return whether the query string has `dry_run=true`: the request is checked and answered, and nothing is stored. Raises
    InvalidRequest for a value other than true or false."""
    value = request.query_params.get("dry_run", "false")
    if value not in ("true", "false"):
        raise InvalidRequest("'dry_run' must be 'true' or 'false'.", code="invalid_type", param="dry_run")
    return value == "true"


def in_range(body: dict[str, Any], name: str, low: float, high: float) -> None:
    """Raises InvalidRequest `out_of_range` if the field is present and not within the bounds."""
    if body.get(name) is not None and not low <= body[name] <= high:
        raise InvalidRequest(f"'{name}' must be between {low:g} and {high:g}.", code="out_of_range", param=name)


def query_date(request: Request, name: str) -> date | None:
    """Read a day of the query string, such as `2026-11-22`. Raises InvalidRequest."""
    text = request.query_params.get(name)
    if text is None:
        return None
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise InvalidRequest(f"'{name}' must be a day such as 2026-11-22.", code="invalid_type", param=name) from None
