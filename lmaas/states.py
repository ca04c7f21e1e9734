"""State machines as data."""

from enum import StrEnum


class Desired(StrEnum):
    """The desired state of a replica. The controller decides it, and an operator may request a stop."""

    RUNNING = "running"
    STOPPED = "stopped"


class Observed(StrEnum):
    """The observed state of a replica. Its supervisor writes it. Without a supervisor, the controller does: FAILED for a replica that could
    not be started, LOST for one that has disappeared."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"
    LOST = "lost"


TERMINAL = frozenset({Observed.STOPPED, Observed.FAILED, Observed.LOST})

TRANSITIONS: dict[Observed, frozenset[Observed]] = {
    # Ready only after it has generated or embedded a token. Stopped if it is no longer desired before that.
    Observed.STARTING: frozenset({Observed.READY, Observed.STOPPED, Observed.FAILED, Observed.LOST}),
    # Stopped directly if Postgres was unavailable while it drained.
    Observed.READY: frozenset({Observed.DRAINING, Observed.STOPPED, Observed.FAILED, Observed.LOST}),
    Observed.DRAINING: frozenset({Observed.STOPPED, Observed.FAILED, Observed.LOST}),
    Observed.STOPPED: frozenset(),
    Observed.FAILED: frozenset(),
    Observed.LOST: frozenset(),
}


def sources(target: Observed) -> list[Observed]:
    """Return the states from which `target` can be reached, for the WHERE of its UPDATE."""
    return [state for state, targets in TRANSITIONS.items() if target in targets]


#: The phases of a replica's start, in ms, beside `by` ("zygote" or "plain") in its record; `adapter_ms` runs beside `first_token_ms`.
START_PHASES = ("spawn_ms", "zygote_ms", "import_ms", "weights_ms", "kv_ms", "warmup_ms", "first_token_ms", "adapter_ms", "total_ms")


class EnginePhase(StrEnum):
    """The phases of an engine's time, from its launch to its end, as its supervisor observes them. Only tenants' requests count."""

    #: The engine is not ready yet.
    STARTING = "starting"
    #: Nothing runs, but requests wait for an adapter that is being loaded.
    LOADING = "loading"
    #: At least one request runs, and not only background work.
    BUSY = "busy"
    #: Only background work runs: time in which the engine would otherwise be idle, or would not exist.
    BACKGROUND = "background"
    IDLE = "idle"


class Dimension(StrEnum):
    """The fields by which the lines of a cost report may be grouped. An adapter is named within its tenant. Days and months are UTC.
    `work` is interactive or background."""

    DAY = "day"
    MONTH = "month"
    TENANT = "tenant"
    MODEL = "model"
    ADAPTER = "adapter"
    WORK = "work"


class UsageDimension(StrEnum):
    """The fields by which the lines of a usage report may be grouped, in the order of their columns."""

    DAY = "day"
    MONTH = "month"
    TENANT = "tenant"
    KEY = "key"
    MODEL = "model"
    ADAPTER = "adapter"
    WORK = "work"


class UsageStatus(StrEnum):
    """The end of a request. Every accepted request has exactly one."""

    COMPLETED = "completed"
    #: The client closed the connection.
    ABORTED = "aborted"
    #: The engine, the adapter or the request itself failed.
    FAILED = "failed"
    #: No capacity was available before the deadline.
    EXPIRED = "expired"
    #: The gateway died. The request is charged at its last checkpoint. A later event of that gateway replaces this one.
    LOST = "lost"
    #: An attempt of durable work without a result, because its slot was taken back or its process died. It is not charged, and the work
    #: runs again. If the attempt did have a result, the event of that replaces this one.
    WASTED = "wasted"
    #: A token that a supervisor made its engine generate or embed as a check. It belongs to no tenant.
    PROBE = "probe"


#: Statuses of events that stand for the end of a request until its own event comes.
STAND_INS = frozenset({UsageStatus.LOST, UsageStatus.WASTED})


class WorkClass(StrEnum):
    """The class of a request. Background work runs only on slots that interactive work leaves free."""

    INTERACTIVE = "interactive"
    BACKGROUND = "background"


class ClaimState(StrEnum):
    """The state of a claim on an idempotency key. A claim whose response is not kept is deleted."""

    RUNNING = "running"
    #: The response is kept.
    DONE = "done"


class BackgroundStatus(StrEnum):
    """The state of a response in the background. All but the first two are ends."""

    #: No engine has begun with it.
    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    #: The answer was cut off by a limit of tokens.
    INCOMPLETE = "incomplete"
    FAILED = "failed"
    CANCELLED = "cancelled"
    #: It was deleted before its end. Clients do not see it any more.
    DELETED = "deleted"


class PoolKind(StrEnum):
    """The work of a pool's engines: generate text, or embed it."""

    GENERATE = "generate"
    EMBED = "embed"


class BatchStatus(StrEnum):
    """The state of a batch, as OpenAI names it."""

    #: Its input file is to be checked.
    VALIDATING = "validating"
    #: Its input file is not valid.
    FAILED = "failed"
    #: Its lines wait or run.
    IN_PROGRESS = "in_progress"
    #: Every line has ended. Its files are to be written.
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    #: Some lines had not ended at its deadline.
    EXPIRED = "expired"
    #: It was cancelled. Lines that run are still to end, and its files are to be written.
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


BATCH_TRANSITIONS: dict[BatchStatus, frozenset[BatchStatus]] = {
    # Finalizing at once if every line names an unknown model.
    BatchStatus.VALIDATING: frozenset({BatchStatus.FAILED, BatchStatus.IN_PROGRESS, BatchStatus.FINALIZING, BatchStatus.CANCELLING}),
    BatchStatus.IN_PROGRESS: frozenset({BatchStatus.FINALIZING, BatchStatus.CANCELLING}),
    BatchStatus.FINALIZING: frozenset({BatchStatus.COMPLETED, BatchStatus.EXPIRED}),
    BatchStatus.CANCELLING: frozenset({BatchStatus.CANCELLED}),
    BatchStatus.FAILED: frozenset(),
    BatchStatus.COMPLETED: frozenset(),
    BatchStatus.EXPIRED: frozenset(),
    BatchStatus.CANCELLED: frozenset(),
}
#: The states of a batch that has not ended.
OPEN_BATCHES = tuple(status for status, targets in BATCH_TRANSITIONS.items() if targets)


def batch_sources(target: BatchStatus) -> list[BatchStatus]:
    """Return the states from which `target` can be reached, for the WHERE of its UPDATE."""
    return [status for status, targets in BATCH_TRANSITIONS.items() if target in targets]


class EventType(StrEnum):
    """The type of an event that webhooks report. All but the last two are OpenAI's."""

    BATCH_COMPLETED = "batch.completed"
    BATCH_FAILED = "batch.failed"
    BATCH_EXPIRED = "batch.expired"
    BATCH_CANCELLED = "batch.cancelled"
    #: Of responses in the background.
    RESPONSE_COMPLETED = "response.completed"
    RESPONSE_INCOMPLETE = "response.incomplete"
    RESPONSE_FAILED = "response.failed"
    RESPONSE_CANCELLED = "response.cancelled"
    #: A part of a limit per month is used.
    BUDGET_THRESHOLD = "budget.threshold"
    #: Sent on request, to one webhook, whatever its event types.
    WEBHOOK_TEST = "webhook.test"


class DeliveryState(StrEnum):
    """The state of the delivery of an event to a webhook. One that has ended may be sent again on request."""

    #: It is to be sent, now or later.
    PENDING = "pending"
    #: The target has accepted it.
    DELIVERED = "delivered"
    #: Every attempt failed, or the webhook was switched off.
    FAILED = "failed"


class Dialect(StrEnum):
    """The API with which a batch was created, and which alone shows it."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"


class LineState(StrEnum):
    """The state of a line of a batch. A line that had not begun when its batch stopped stays pending."""

    PENDING = "pending"
    RUNNING = "running"
    #: It has a response.
    DONE = "done"
    #: It has a response that is an error, or an error instead of a response.
    FAILED = "failed"
