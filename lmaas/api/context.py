"""The arguments of a handler: the services, and one call with its decoded body and query, its tenant and its actor."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar

from msgspec import Raw, Struct
from starlette.requests import Request
from starlette.responses import Response

from lmaas.adapters.service import Adapters
from lmaas.api.operation import Permission, Place
from lmaas.audit import Audit
from lmaas.config import Settings
from lmaas.errors import Forbidden
from lmaas.files.service import Files
from lmaas.http import PRINCIPAL, Authenticate, api_key
from lmaas.protocols.responses.event_log import EventLogs
from lmaas.protocols.responses.stored import StoredState
from lmaas.store.database import Database
from lmaas.store.tenants import get_tenant
from lmaas.types import Principal, Role

Body = TypeVar("Body")
Asked = TypeVar("Asked")


@dataclass(frozen=True, slots=True)
class Api:
    """The services of the handlers, handed down from the composition root."""

    settings: Settings
    db: Database
    authenticate: Authenticate
    adapters: Adapters
    files: Files
    #: The stored responses and conversations.
    state: StoredState
    #: The events of responses in the background.
    logs: EventLogs

    @property
    def kept_for(self) -> timedelta:
        """The time for which a conversation is stored after its last change."""
        return timedelta(seconds=self.settings.response_retention_s)

    async def allowed(self, place: Place, request: Request) -> tuple[str | None, Principal]:
        """Authenticate a request and check its permission. Returns the id of the tenant whose resources it is about, None for an operation
        on no tenant's, and the principal.

        Raises Unauthenticated, Forbidden, or NotFound for a tenant that does not exist.
        """
        principal = request.scope[PRINCIPAL] = await self.authenticate(api_key(request.scope["headers"]))
        if place.permission is Permission.OPERATOR:
            if principal.role is not Role.OPERATOR:
                raise Forbidden("This needs an operator's key.")
            if place.operation.permission is Permission.OPERATOR:
                return None, principal
            return (await get_tenant(self.db, request.path_params["tenant"])).id, principal
        if principal.tenant_id is None:
            raise Forbidden("An operator's key belongs to no tenant. Use /admin/v1/tenants/{tenant}/… instead.")
        if place.permission is Permission.TENANT_ADMIN and principal.role is not Role.TENANT_ADMIN:
            raise Forbidden("This needs a key of the role tenant_admin.")
        return principal.tenant_id, principal


@dataclass(frozen=True, slots=True)
class ApiCall(Generic[Body, Asked]):
    """One call of an operation. `owner` is the tenant whose resources it is about, None for an operator's own. `audit` is for the store
    function that makes the change, None for an operation that makes none."""

    owner: str | None
    principal: Principal
    path: Mapping[str, str]
    body: Body
    query: Asked
    audit: Audit | None
    request: Request

    @property
    def tenant_id(self) -> str:
        """The tenant of an operation on a tenant's resources."""
        if self.owner is None:
            raise TypeError("this operation is about no tenant's resources")
        return self.owner


@dataclass(frozen=True, slots=True)
class WithStatus:
    """An answer with another status than the operation's usual one."""

    answer: Struct
    status: int


Handler = Callable[[Api, ApiCall[Any, Any]], Awaitable[Struct | Raw | WithStatus | Response]]
