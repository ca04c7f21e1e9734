"""What the audit log records: the actions, and who took one. The store writes a record in the transaction of the change."""

from dataclasses import dataclass
from enum import StrEnum

#: The actor of what no API key asked for, such as the base model that `lmaas up` registers.
SYSTEM_ACTOR = "system"


class Action(StrEnum):
    """A change that leaves a record."""

    TENANT_CREATE = "tenant.create"
    TENANT_CHANGE = "tenant.change"
    TENANT_DELETE = "tenant.delete"
    KEY_CREATE = "key.create"
    KEY_CHANGE = "key.change"
    KEY_REVOKE = "key.revoke"
    ADAPTER_UPLOAD = "adapter.upload"
    ADAPTER_ACTIVATE = "adapter.activate"
    ADAPTER_DELETE = "adapter.delete"
    BASE_MODEL_CREATE = "base_model.create"
    BASE_MODEL_CHANGE = "base_model.change"
    BASE_MODEL_DELETE = "base_model.delete"
    BASE_MODEL_REGISTER = "base_model.register"
    REPLICA_STOP = "replica.stop"


@dataclass(frozen=True, slots=True)
class Audit:
    """One action and its actor: the role of the key that asked, with the key's id and the request's; or the system, which has neither.

    A function of the store that changes something takes one and writes the record together with the change. A request that changes
    nothing, because everything is already as it asks, leaves no record.
    """

    action: Action
    actor: str = SYSTEM_ACTOR
    key_id: str | None = None
    request_id: str | None = None
