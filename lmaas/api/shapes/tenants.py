"""Tenants and API keys."""

from datetime import datetime
from typing import Annotated, Literal

from msgspec import UNSET, Meta, UnsetType

from lmaas.api.shapes.common import Name, NewLimit, Query, Shape, TenantName
from lmaas.types import Role

Tier = Literal["free", "standard", "premium"]


class Limits(Shape, frozen=True, kw_only=True):
    """Limits; null is none. The budget is in micro-dollars, months are calendar months (UTC)."""

    requests_per_minute: int | None
    tokens_per_minute: int | None
    max_concurrent: int | None
    tokens_per_month: int | None
    budget_per_month: int | None


class NewLimits(Shape, frozen=True, kw_only=True):
    """Limits to set. One that is not given stays as it is."""

    requests_per_minute: NewLimit | UnsetType | None = UNSET
    tokens_per_minute: NewLimit | UnsetType | None = UNSET
    max_concurrent: NewLimit | UnsetType | None = UNSET
    tokens_per_month: NewLimit | UnsetType | None = UNSET
    budget_per_month: NewLimit | UnsetType | None = UNSET


class Tenant(Limits, tag_field="object", tag="tenant", frozen=True, kw_only=True):
    """A tenant. Its own limits that are null are those of its tier."""

    id: str
    name: Name
    tier: Tier
    max_queued: Annotated[int, Meta(description="Requests that may wait at once.")]
    max_adapters: Annotated[int, Meta(description="Names of adapters.")]
    effective_limits: Annotated[Limits, Meta(description="The tenant's own limits, otherwise those of its tier.")]
    created_at: datetime


class TenantChange(NewLimits, frozen=True, kw_only=True):
    """Values to set. Null puts the default back; one that is not given stays as it is."""

    tier: Tier | UnsetType | None = UNSET
    max_queued: Annotated[int, Meta(ge=1, le=100_000)] | UnsetType | None = UNSET
    max_adapters: Annotated[int, Meta(ge=0, le=100_000)] | UnsetType | None = UNSET


class NewTenant(TenantChange, frozen=True, kw_only=True):
    """A tenant to create. A value that is null or not given is the default."""

    name: TenantName


class DeletedTenant(Shape, tag_field="object", tag="tenant.deleted", frozen=True, kw_only=True):
    """A tenant that has been deleted."""

    id: str
    deleted: bool


class Key(Limits, tag_field="object", tag="key", frozen=True, kw_only=True):
    """An API key without its secret. `prefix` is the secret's beginning, by which people distinguish keys."""

    id: str
    role: Role
    name: str
    prefix: str
    created_at: datetime
    revoked_at: datetime | None
    expires_at: Annotated[datetime | None, Meta(description="When the key stops working; null: never.")]


class CreatedKey(Key, tag_field="object", tag="key", frozen=True, kw_only=True):
    """A new API key with its secret, which is not shown again."""

    key: str


ExpiresIn = Annotated[
    int,
    Meta(ge=0, le=10 * 365 * 86400, description="Seconds from now, after which the key stops working. 0 or null: it does not expire."),
]
KeyName = Annotated[str, Meta(max_length=100, description="For people, to tell keys apart.")]


class NewKey(NewLimits, frozen=True, kw_only=True):
    """A key of a tenant to create."""

    role: Literal["inference", "tenant_admin"] = "inference"
    name: KeyName = ""
    expires_in_s: ExpiresIn | None = None


class NewOperatorKey(Shape, frozen=True, kw_only=True):
    """A key of an operator to create."""

    role: Literal["operator"] = "operator"
    name: KeyName = ""
    expires_in_s: ExpiresIn | None = None


class KeyChange(NewLimits, frozen=True, kw_only=True):
    """Limits and expiry of a key to set. At least one must be given."""

    expires_in_s: ExpiresIn | UnsetType | None = UNSET


class Revocation(Query, frozen=True, kw_only=True):
    """The query of a revocation."""

    force: Annotated[bool, Meta(description="Revoke the key even if it is the last one of the operators.")] = False
