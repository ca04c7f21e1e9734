"""Webhooks, and the deliveries of events to them."""

from datetime import datetime
from typing import Annotated, Literal

from msgspec import UNSET, Meta, UnsetType

from lmaas.api.shapes.common import Paging, Shape

#: The types that a webhook may name. `webhook.test` is sent on request only.
EventName = Literal[
    "batch.completed",
    "batch.failed",
    "batch.expired",
    "batch.cancelled",
    "response.completed",
    "response.incomplete",
    "response.failed",
    "response.cancelled",
    "budget.threshold",
]
State = Literal["pending", "delivered", "failed"]
MAX_NAME = 100
_MAX_SECONDS = 7 * 86400

WebhookName = Annotated[str, Meta(max_length=MAX_NAME, description="For people, to tell webhooks apart.")]
WebhookUrl = Annotated[str, Meta(min_length=1, max_length=2048, description="An `https://` URL with a public address.")]
EventNames = Annotated[
    list[EventName], Meta(min_length=1, max_length=20, description="The types of events to send. Null: all, also those of later releases.")
]


class Webhook(Shape, tag_field="object", tag="webhook", frozen=True, kw_only=True):
    """A webhook without its secret."""

    id: str
    name: str
    url: str
    event_types: list[str] | None
    enabled: bool
    disabled_at: datetime | None
    disabled_reason: Annotated[str | None, Meta(description="Why it is switched off.")]
    failing_since: Annotated[datetime | None, Meta(description="When the first of the attempts failed that have failed in a row.")]
    dropped_events: Annotated[int, Meta(description="Events that it did not get, because 10,000 others waited for it.")]
    signing_secret_hint: Annotated[str, Meta(description="The beginning of the secret.")]
    previous_secret_until: Annotated[datetime | None, Meta(description="Until then, events are signed with the earlier secret too.")]
    created_at: datetime


class WebhookWithSecret(Webhook, tag_field="object", tag="webhook", frozen=True, kw_only=True):
    """A webhook with its secret, which is not shown again."""

    signing_secret: Annotated[str, Meta(description="For a client library: `whsec_` and the key of the signatures in base64.")]


class NewWebhook(Shape, frozen=True, kw_only=True):
    """A webhook to create."""

    url: WebhookUrl
    name: WebhookName = ""
    event_types: EventNames | None = None


class WebhookChange(Shape, frozen=True, kw_only=True):
    """Values to set. One that is not given stays as it is."""

    url: WebhookUrl | UnsetType = UNSET
    name: WebhookName | UnsetType = UNSET
    event_types: EventNames | UnsetType | None = UNSET
    enabled: Annotated[bool, Meta(description="False switches it off: what waits for it is not sent.")] | UnsetType = UNSET


class SecretRotation(Shape, frozen=True, kw_only=True):
    """The replacement of a secret."""

    overlap_s: Annotated[
        int, Meta(ge=0, le=_MAX_SECONDS, description="Seconds for which events are signed with the earlier secret too.")
    ] = 86_400


class DeletedWebhook(Shape, tag_field="object", tag="webhook.deleted", frozen=True, kw_only=True):
    """A webhook that has been deleted."""

    id: str
    deleted: bool


class Delivery(Shape, tag_field="object", tag="webhook.delivery", frozen=True, kw_only=True):
    """The delivery of an event to a webhook. `id` is the event's, and the same in every attempt (`webhook-id`)."""

    id: str
    type: Annotated[str, Meta(description="The type of the event.")]
    state: State
    attempts: int
    last_attempt_at: datetime | None
    status_code: Annotated[int | None, Meta(description="The HTTP status of the last attempt.")]
    duration_ms: Annotated[int | None, Meta(description="The duration of the last attempt.")]
    error: Annotated[str | None, Meta(description="What was wrong with the last attempt.")]
    next_attempt_at: datetime | None
    ended_at: datetime | None
    created_at: datetime


class DeliveryQuery(Paging, frozen=True, kw_only=True):
    """The requested deliveries."""

    state: Annotated[State, Meta(description="Only those in this state.")] | None = None
