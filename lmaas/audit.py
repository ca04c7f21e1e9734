"""The actions and actors of the audit log. The store writes each record in the transaction of the change."""

from dataclasses import dataclass
from enum import StrEnum

#: The actor of changes without an API key, such as the base model that `lmaas up` registers.
SYSTEM_ACTOR = "system"


class Action(StrEnum):
    """A change that the audit log records."""

    TENANT_CREATE = "tenant.create"
    TENANT_CHANGE = "tenant.change"
    TENANT_DELETE = "tenant.delete"
    KEY_CREATE = "key.create"
    KEY_CHANGE = "key.change"
    KEY_REVOKE = "key.revoke"
    SESSION_CREATE = "session.create"
    SESSION_END = "session.end"
    ADAPTER_UPLOAD = "adapter.upload"
    ADAPTER_ACTIVATE = "adapter.activate"
    ADAPTER_DELETE = "adapter.delete"
    FILE_CREATE = "file.create"
    FILE_DELETE = "file.delete"
    BATCH_CREATE = "batch.create"
    BATCH_CANCEL = "batch.cancel"
    BATCH_DELETE = "batch.delete"
    WEBHOOK_CREATE = "webhook.create"
    WEBHOOK_CHANGE = "webhook.change"
    WEBHOOK_DELETE = "webhook.delete"
    WEBHOOK_ROTATE = "webhook.rotate_secret"
    WEBHOOK_TEST = "webhook.test"
    WEBHOOK_REDELIVER = "webhook.redeliver"
    #: The service switches a webhook off that keeps failing.
    WEBHOOK_DISABLE = "webhook.disable"
    BASE_MODEL_CREATE = "base_model.create"
    BASE_MODEL_CHANGE = "base_model.change"
    BASE_MODEL_DELETE = "base_model.delete"
    BASE_MODEL_REGISTER = "base_model.register"
    REPLICA_STOP = "replica.stop"


@dataclass(frozen=True, slots=True)
class Audit:
    """One action and its actor: the role of the requesting key, with the ids of the key and the request, or the system, which has neither.

    A function of the store that changes something takes an Audit and writes the record together with the change. A request that changes
    nothing, because the requested state already exists, leaves no record.
    """

    action: Action
    actor: str = SYSTEM_ACTOR
    key_id: str | None = None
    request_id: str | None = None
