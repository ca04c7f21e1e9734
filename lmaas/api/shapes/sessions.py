"""Sessions."""

from datetime import datetime
from typing import Annotated, Literal

from msgspec import Meta

from lmaas.api.shapes.common import Shape
from lmaas.types import Role

MAX_SESSION_S = 24 * 3600
Lifetime = Annotated[int, Meta(ge=60, le=MAX_SESSION_S, description="Seconds for which the session is valid. Null: the setting's.")]


class Session(Shape, tag_field="object", tag="session", frozen=True, kw_only=True):
    """A session: a short-lived key. It ends with the key that it was made from at the latest."""

    id: str
    role: Role
    tenant: Annotated[str | None, Meta(description="The name of the tenant, null for an operator's session.")]
    name: Annotated[str, Meta(description="The person for whom an operator's key made it; otherwise empty.")]
    created_at: datetime
    expires_at: datetime


class CreatedSession(Session, tag_field="object", tag="session", frozen=True, kw_only=True):
    """A new session with its secret, which is used as an API key and not shown again."""

    key: str


class EndedSession(Shape, tag_field="object", tag="session.ended", frozen=True, kw_only=True):
    """A session that has ended."""

    id: str
    deleted: bool


class NewSession(Shape, frozen=True, kw_only=True):
    """A session to create."""

    expires_in_s: Lifetime | None = None


class NewOperatorSession(NewSession, frozen=True, kw_only=True):
    """A session to create with an operator's key: an operator's, or one of a tenant for a person."""

    role: Literal["operator", "tenant_admin", "inference"] = "operator"
    tenant: Annotated[str, Meta(max_length=200, description="The id or name of the tenant; null for a session of an operator.")] | None = (
        None
    )
    subject: Annotated[str, Meta(max_length=100, description="The name of the person, for the audit log.")] = ""
