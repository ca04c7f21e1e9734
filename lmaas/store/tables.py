"""The tables in SQLAlchemy's form. Migrations create them."""

from dataclasses import fields

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Date,
    DateTime,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from lmaas.types import Limits

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "fk": "%(table_name)s_%(column_0_name)s_fkey",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
    }
)


def _created() -> Column[object]:
    return Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now())


def _limits() -> list[Column[int]]:
    return [Column(field.name, BigInteger) for field in fields(Limits)]


tenants = Table(
    "tenants",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("tier", Text, nullable=False),
    Column("max_queued", Integer, nullable=False),
    Column("max_adapters", Integer, nullable=False),
    # Null: the limit of the tier.
    *_limits(),
    _created(),
    Column("deleted_at", DateTime(timezone=True)),
    Index("tenants_name_key", "name", unique=True, postgresql_where=text("deleted_at IS NULL")),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    # Operator keys belong to no tenant.
    Column("tenant_id", ForeignKey("tenants.id")),
    Column("role", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("hash", Text, nullable=False, unique=True),
    Column("prefix", Text, nullable=False),
    # Null: no limit of its own.
    *_limits(),
    _created(),
    Column("revoked_at", DateTime(timezone=True)),
    # Null: never.
    Column("expires_at", DateTime(timezone=True)),
    # Of a session: the key that it was made from, with which it ends.
    Column("parent_id", ForeignKey("api_keys.id")),
    Index(None, "tenant_id"),
    Index("api_keys_sessions", "parent_id", "created_at", postgresql_where=text("parent_id IS NOT NULL")),
)

base_models = Table(
    "base_models",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    # A folder or a hub id, as the engine takes it.
    Column("source", Text, nullable=False),
    # A PoolKind. It never changes.
    Column("kind", Text, nullable=False, server_default=text("'generate'")),
    Column("dtype", Text, nullable=False),
    # Module path → [out_features, in_features], against which adapters are validated.
    Column("linears", JSONB, nullable=False),
    Column("max_lora_rank", Integer, nullable=False),
    Column("max_loras", Integer, nullable=False),
    Column("max_cpu_loras", Integer, nullable=False),
    Column("max_num_seqs", Integer, nullable=False),
    Column("max_model_len", Integer, nullable=False),
    Column("kv_cache_bytes", BigInteger, nullable=False),
    # An operator's own values. Null means the value of the setting.
    Column("min_replicas", Integer),
    Column("max_replicas", Integer),
    Column("idle_timeout_s", Float),
    # The resources that a replica takes from its machine.
    Column("cpus", Float),
    Column("accelerators", Integer),
    # Micro-dollars per million tokens, and per hour of an engine.
    Column("prompt_price", BigInteger, nullable=False, server_default=text("0")),
    Column("cached_price", BigInteger, nullable=False, server_default=text("0")),
    Column("completion_price", BigInteger, nullable=False, server_default=text("0")),
    Column("engine_price", BigInteger, nullable=False, server_default=text("0")),
    Column("engine_args", Text, nullable=False),
    _created(),
    # A deleted base model stays for usage reports.
    Column("deleted_at", DateTime(timezone=True)),
    Index("base_models_name_key", "name", unique=True, postgresql_where=text("deleted_at IS NULL")),
)

# Written only by the controller.
pool_states = Table(
    "pool_states",
    metadata,
    Column("base_model_id", ForeignKey("base_models.id"), primary_key=True),
    # The last decision, in the form in which it is shown.
    Column("decision", JSONB, nullable=False),
    # Pairs of bin and count: the history with which a new controller starts.
    Column("idle_times", JSONB, nullable=False),
    Column("decided_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)

adapters = Table(
    "adapters",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("base_model_id", ForeignKey("base_models.id"), nullable=False),
    # Null until a version is activated.
    Column("live_version", Integer),
    # The role of the key that made that version live. Null before migration 0010, and where no key did.
    Column("activated_by", Text),
    _created(),
    UniqueConstraint("tenant_id", "name"),
    # The target of the foreign key of versions.
    UniqueConstraint("id", "tenant_id"),
)

adapter_versions = Table(
    "adapter_versions",
    metadata,
    Column("adapter_id", Text, nullable=False),
    # The adapter's tenant, repeated here so that a policy needs no other table.
    Column("tenant_id", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("content_hash", Text, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("target_modules", JSONB, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    _created(),
    PrimaryKeyConstraint("adapter_id", "version"),
    ForeignKeyConstraint(["adapter_id", "tenant_id"], ["adapters.id", "adapters.tenant_id"], ondelete="CASCADE"),
)

replicas = Table(
    "replicas",
    metadata,
    Column("id", Text, primary_key=True),
    Column("base_model_id", ForeignKey("base_models.id"), nullable=False),
    Column("desired", Text, nullable=False),
    Column("observed", Text, nullable=False),
    Column("url", Text),
    Column("reason", Text),
    _created(),
    Column("ready_at", DateTime(timezone=True)),
    Column("ended_at", DateTime(timezone=True)),
    # The duration of each stage of its start (lmaas/replica/start.py), once it is ready.
    Column("start", JSONB),
    Index(None, "base_model_id", "observed"),
)

# The time of each engine by phase. Written only by its supervisor.
engine_time = Table(
    "engine_time",
    metadata,
    Column("replica_id", ForeignKey("replicas.id"), nullable=False),
    Column("base_model_id", ForeignKey("base_models.id"), nullable=False),
    # UTC.
    Column("day", Date, nullable=False),
    Column("phase", Text, nullable=False),
    # Micro-dollars per engine-hour. Part of the key, because it may change while the engine runs.
    Column("price", BigInteger, nullable=False),
    Column("ms", BigInteger, nullable=False),
    PrimaryKeyConstraint("replica_id", "day", "phase", "price"),
    Index(None, "day"),
)

usage_events = Table(
    "usage_events",
    metadata,
    # Idempotent on the request id.
    Column("request_id", Text, primary_key=True),
    # Null for probes, which belong to no tenant.
    Column("tenant_id", ForeignKey("tenants.id")),
    Column("key_id", Text),
    Column("base_model", Text, nullable=False),
    # The name that the client requested.
    Column("model", Text, nullable=False),
    Column("adapter", Text),
    Column("adapter_version", Integer),
    Column("status", Text, nullable=False),
    Column("code", Text),
    Column("stream", Boolean, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("queue_ms", BigInteger, nullable=False),
    Column("load_ms", BigInteger, nullable=False),
    Column("run_ms", BigInteger, nullable=False),
    Column("replica_id", Text),
    # When the request arrived.
    Column("created_at", DateTime(timezone=True), nullable=False),
    # Picodollars, at the prices of that time.
    Column("charge_picousd", BigInteger, nullable=False, server_default=text("0")),
    # `interactive` or `background`.
    Column("work", Text, nullable=False, server_default=text("'interactive'")),
    Index(None, "tenant_id", "created_at"),
    Index(None, "created_at"),
)

# The ledger's sums, from which reports are made. Triggers on `usage_events` keep both tables exact in the transaction that stores an event,
# and nothing else writes them (migration 0019). A group has a row for each `slot`, whose sum counts: writers that lock rows in different
# orders use different slots.
usage_days = Table(
    "usage_days",
    metadata,
    # Null for probes.
    Column("tenant_id", Text),
    # The day of arrival (UTC).
    Column("day", Date, nullable=False),
    Column("key_id", Text),
    Column("base_model", Text, nullable=False),
    # The adapter's name without a version. Null: the base model itself.
    Column("adapter", Text),
    Column("work", Text, nullable=False),
    Column("status", Text, nullable=False),
    # Why an attempt was wasted. Null for other statuses.
    Column("code", Text),
    Column("slot", SmallInteger, nullable=False),
    Column("requests", BigInteger, nullable=False),
    # Requests of a charged status that used tokens and cost nothing, because no price was set.
    Column("unpriced", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("run_ms", BigInteger, nullable=False),
    # The sum of events may exceed 64 bits.
    Column("charge_picousd", Numeric, nullable=False),
    Index(
        "usage_days_key",
        *("tenant_id", "day", "key_id", "base_model", "adapter", "work", "status", "code", "slot"),
        unique=True,
        postgresql_nulls_not_distinct=True,
    ),
    Index(None, "day"),
)

# The work of tenants' requests on each replica, for the allocation of engine time.
work_days = Table(
    "work_days",
    metadata,
    Column("replica_id", Text, nullable=False),
    # The day (UTC) on which the requests started to run.
    Column("day", Date, nullable=False),
    Column("tenant_id", Text, nullable=False),
    Column("base_model", Text, nullable=False),
    Column("adapter", Text),
    Column("work", Text, nullable=False),
    Column("slot", SmallInteger, nullable=False),
    Column("run_ms", BigInteger, nullable=False),
    Column("load_ms", BigInteger, nullable=False),
    Index(
        "work_days_key",
        *("replica_id", "day", "tenant_id", "base_model", "adapter", "work", "slot"),
        unique=True,
        postgresql_nulls_not_distinct=True,
    ),
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    # The client's own value.
    Column("key", Text, nullable=False),
    # SHA-256 of the endpoint and the request's body.
    Column("body_hash", LargeBinary, nullable=False),
    # The request that holds the claim.
    Column("request_id", Text, nullable=False),
    Column("state", Text, nullable=False),
    # While the request runs, the last renewal by its gateway; afterwards, its end.
    Column("seen_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    # The response, once there is one, without its body if it was too large.
    Column("status", Integer),
    Column("content_type", Text),
    Column("answer", LargeBinary),
    _created(),
    PrimaryKeyConstraint("tenant_id", "key"),
    Index(None, "state", "seen_at"),
)

# JSON is kept as bytes, which Postgres does not parse: a stored text may contain what `jsonb` cannot hold.
responses = Table(
    "responses",
    metadata,
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("id", Text, nullable=False),
    # The response that this one continues. It may have been deleted since.
    Column("previous_id", Text),
    # The conversation to which it belongs, and the position of its first item there.
    Column("conversation_id", Text),
    Column("conversation_start", BigInteger),
    # A JSON list: the items of its own request, without those that it continued.
    Column("input", LargeBinary, nullable=False),
    # The response object, as the client received it, and where in it the list of its output is.
    Column("body", LargeBinary, nullable=False),
    Column("output_start", Integer, nullable=False),
    Column("output_bytes", Integer, nullable=False),
    # Of the whole row, about. A column of its own, so that controllers can count bytes that they may not read.
    Column("size_bytes", BigInteger, nullable=False),
    _created(),
    Column("expires_at", DateTime(timezone=True), nullable=False),
    PrimaryKeyConstraint("tenant_id", "id"),
    Index(None, "expires_at"),
)

conversations = Table(
    "conversations",
    metadata,
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("id", Text, nullable=False),
    # A JSON object.
    Column("metadata", LargeBinary, nullable=False),
    # The position of the next item. It never decreases.
    Column("next_position", BigInteger, nullable=False),
    Column("item_count", BigInteger, nullable=False),
    # Of the row and its items, about.
    Column("size_bytes", BigInteger, nullable=False),
    _created(),
    # Every change of the conversation moves this into the future.
    Column("expires_at", DateTime(timezone=True), nullable=False),
    PrimaryKeyConstraint("tenant_id", "id"),
    Index(None, "expires_at"),
)

conversation_items = Table(
    "conversation_items",
    metadata,
    Column("tenant_id", Text, nullable=False),
    Column("conversation_id", Text, nullable=False),
    Column("position", BigInteger, nullable=False),
    Column("id", Text, nullable=False),
    # A JSON object, with the id.
    Column("body", LargeBinary, nullable=False),
    PrimaryKeyConstraint("tenant_id", "conversation_id", "position"),
    ForeignKeyConstraint(["tenant_id", "conversation_id"], ["conversations.tenant_id", "conversations.id"], ondelete="CASCADE"),
    Index(None, "tenant_id", "id"),
)

# Uploaded files, and those that the service writes. The bytes are in the object store, by the hash of their content.
files = Table(
    "files",
    metadata,
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("id", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("filename", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    # SHA-256 of the content, in hex. Files with the same content share its bytes.
    Column("sha256", Text, nullable=False),
    _created(),
    # Null: it is kept until it is deleted.
    Column("expires_at", DateTime(timezone=True)),
    PrimaryKeyConstraint("tenant_id", "id"),
    Index(None, "tenant_id", "sha256"),
    Index(None, "tenant_id", "created_at", "id"),
    Index(None, "expires_at"),
)

# Contents that may be in the object store without a file that has them (lmaas/store/files.py).
content_checks = Table(
    "content_checks",
    metadata,
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("id", Text, nullable=False),
    Column("sha256", Text, nullable=False),
    # When a controller deletes the content, unless a file has it.
    Column("due_at", DateTime(timezone=True), nullable=False),
    PrimaryKeyConstraint("tenant_id", "id"),
    Index(None, "due_at"),
)

# The processes of `lmaas jobs`. What a runner has leased is free again when it has not been seen for a while.
job_runners = Table(
    "job_runners",
    metadata,
    Column("id", Text, primary_key=True),
    Column("seen_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)


def _lease() -> list[Column[object]]:
    """The columns of a leased row. Each lease has a number of its own, and a write must name the lease that it belongs to."""
    return [Column("runner_id", Text), Column("attempt", Integer, nullable=False, server_default=text("0"))]


batches = Table(
    "batches",
    metadata,
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("id", Text, nullable=False),
    # The API that created it: `openai` or `anthropic`.
    Column("dialect", Text, nullable=False),
    Column("endpoint", Text, nullable=False),
    # The key that created it, with whose rights and limits its lines run.
    Column("key_id", Text, nullable=False),
    Column("input_file_id", Text),
    Column("completion_window", Text, nullable=False),
    # A JSON object.
    Column("metadata", LargeBinary, nullable=False),
    Column("output_expires_after_s", Integer),
    Column("status", Text, nullable=False),
    # A JSON list: what is wrong with the input file.
    Column("errors", LargeBinary),
    # Lines in all, and by how they ended.
    Column("total", Integer, nullable=False, server_default=text("0")),
    Column("completed", Integer, nullable=False, server_default=text("0")),
    Column("failed", Integer, nullable=False, server_default=text("0")),
    Column("cancelled", Integer, nullable=False, server_default=text("0")),
    Column("expired", Integer, nullable=False, server_default=text("0")),
    # The usage of lines that ended.
    Column("prompt_tokens", BigInteger, nullable=False, server_default=text("0")),
    Column("cached_tokens", BigInteger, nullable=False, server_default=text("0")),
    Column("completion_tokens", BigInteger, nullable=False, server_default=text("0")),
    # Why lines that are still pending will not run. Null: they will, unless the batch is cancelled.
    Column("stop_code", Text),
    Column("stop_message", Text),
    # The bytes of its lines' answers, which are bounded.
    Column("answer_bytes", BigInteger, nullable=False, server_default=text("0")),
    Column("output_file_id", Text),
    Column("error_file_id", Text),
    _created(),
    # The deadline of its lines.
    Column("expires_at", DateTime(timezone=True), nullable=False),
    Column("in_progress_at", DateTime(timezone=True)),
    Column("finalizing_at", DateTime(timezone=True)),
    Column("completed_at", DateTime(timezone=True)),
    Column("failed_at", DateTime(timezone=True)),
    Column("expired_at", DateTime(timezone=True)),
    Column("cancelling_at", DateTime(timezone=True)),
    Column("cancelled_at", DateTime(timezone=True)),
    # The lease of the runner that validates or finalizes it, and how many runners were lost while they leased it.
    *_lease(),
    Column("losses", Integer, nullable=False, server_default=text("0")),
    PrimaryKeyConstraint("tenant_id", "id"),
    Index(None, "status"),
    Index(None, "tenant_id", "created_at"),
)

# One row for each line of a batch that has not ended. They are deleted when the output files are written.
batch_lines = Table(
    "batch_lines",
    metadata,
    Column("tenant_id", Text, nullable=False),
    Column("batch_id", Text, nullable=False),
    # Its place in the order in which the lines run, from 0.
    Column("position", Integer, nullable=False),
    # Its number in the input file, from 1, and where its bytes are.
    Column("line", Integer, nullable=False),
    Column("byte_offset", BigInteger, nullable=False),
    Column("byte_length", Integer, nullable=False),
    Column("custom_id", Text, nullable=False),
    # The base model that serves it. Null if its model is unknown.
    Column("pool_id", Text),
    # An estimate, for the backlog.
    Column("tokens", BigInteger, nullable=False),
    # A LineState.
    Column("state", Text, nullable=False),
    *_lease(),
    # The number of its leases that were given back. The others, apart from the last one, ended with the loss of their runner.
    Column("given_back", Integer, nullable=False, server_default=text("0")),
    # Its entry in the output file: the ledger's id of the attempt, the HTTP status, and the JSON of the answer or of the error.
    Column("request_id", Text),
    Column("status_code", Integer),
    Column("answer", LargeBinary),
    PrimaryKeyConstraint("tenant_id", "batch_id", "position"),
    ForeignKeyConstraint(["tenant_id", "batch_id"], ["batches.tenant_id", "batches.id"], ondelete="CASCADE"),
    Index("batch_lines_pending_idx", "tenant_id", "batch_id", "pool_id", "position", postgresql_where=text("state = 'pending'")),
    Index("batch_lines_running_idx", "runner_id", postgresql_where=text("state = 'running'")),
)

# The backlog: what is left of each batch in each pool, so that nothing has to count lines.
batch_pools = Table(
    "batch_pools",
    metadata,
    Column("tenant_id", Text, nullable=False),
    Column("batch_id", Text, nullable=False),
    Column("pool_id", Text, nullable=False),
    # Lines that do not run and have not ended, and the sum of their estimated tokens.
    Column("pending", Integer, nullable=False),
    Column("pending_tokens", BigInteger, nullable=False),
    # The work that engines have done: the estimated tokens of lines that are done, limited by the real ones.
    Column("done_tokens", BigInteger, nullable=False, server_default=text("0")),
    PrimaryKeyConstraint("tenant_id", "batch_id", "pool_id"),
    ForeignKeyConstraint(["tenant_id", "batch_id"], ["batches.tenant_id", "batches.id"], ondelete="CASCADE"),
)

# Responses that run without their client. When one is complete, it becomes a row of `responses` as well.
background_responses = Table(
    "background_responses",
    metadata,
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("id", Text, nullable=False),
    # The key that created it, with whose rights and limits it runs.
    Column("key_id", Text, nullable=False),
    # The response or conversation that it continues, as in `responses`.
    Column("previous_id", Text),
    Column("conversation_id", Text),
    # The client's request, the items of its input with their ids, and the response object as it was created, as JSON. All three are empty
    # once it has ended, because it is among the stored responses then.
    Column("request", LargeBinary, nullable=False),
    Column("input", LargeBinary, nullable=False),
    Column("body", LargeBinary, nullable=False),
    # A BackgroundStatus.
    Column("status", Text, nullable=False),
    # True if its events are logged.
    Column("is_streamed", Boolean, nullable=False),
    # The `sequence_number` of the first event of the present run, and that of the next event. The first two are those of the creation.
    Column("first_event", Integer, nullable=False, server_default=text("2")),
    Column("next_event", Integer, nullable=False, server_default=text("2")),
    # False once there were too many events to log.
    Column("is_log_whole", Boolean, nullable=False, server_default=text("true")),
    # Runs that failed for a reason that may pass, and runners that were lost while they leased it.
    Column("failures", Integer, nullable=False, server_default=text("0")),
    Column("losses", Integer, nullable=False, server_default=text("0")),
    # The time before which it is not tried again. Null before its first run, and while it runs.
    Column("not_before", DateTime(timezone=True)),
    # Of the whole row and its events, about.
    Column("size_bytes", BigInteger, nullable=False),
    *_lease(),
    _created(),
    # After this time it is not tried any more.
    Column("deadline_at", DateTime(timezone=True), nullable=False),
    # When the row and its events are deleted.
    Column("expires_at", DateTime(timezone=True), nullable=False),
    Column("ended_at", DateTime(timezone=True)),
    PrimaryKeyConstraint("tenant_id", "id"),
    Index("background_responses_open_idx", "tenant_id", "created_at", postgresql_where=text("ended_at IS NULL")),
    Index("background_responses_leased_idx", "runner_id", postgresql_where=text("runner_id IS NOT NULL")),
    Index(None, "expires_at"),
)

# The events of a background response, as its streaming clients receive them, in pieces of about a second.
response_events = Table(
    "response_events",
    metadata,
    Column("tenant_id", Text, nullable=False),
    Column("response_id", Text, nullable=False),
    # The `sequence_number` of the first and the last event of this piece.
    Column("first", Integer, nullable=False),
    Column("last", Integer, nullable=False),
    Column("events", LargeBinary, nullable=False),
    PrimaryKeyConstraint("tenant_id", "response_id", "first"),
    ForeignKeyConstraint(["tenant_id", "response_id"], ["background_responses.tenant_id", "background_responses.id"], ondelete="CASCADE"),
)

# The targets of a tenant's events.
webhooks = Table(
    "webhooks",
    metadata,
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("id", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("url", Text, nullable=False),
    # Null: events of all types, also those of later releases.
    Column("event_types", ARRAY(Text)),
    # The key of the signatures, and its beginning, which lists show. Only job runners read the key.
    Column("secret", LargeBinary, nullable=False),
    Column("secret_hint", Text, nullable=False),
    # The key before the last rotation, which a trigger keeps. Events are signed with it too until that time.
    Column("previous_secret", LargeBinary),
    Column("previous_until", DateTime(timezone=True)),
    # When the first of the attempts failed that have failed in a row. Null: the last one succeeded, or there was none.
    Column("failing_since", DateTime(timezone=True)),
    # Null: it is switched on.
    Column("disabled_at", DateTime(timezone=True)),
    Column("disabled_reason", Text),
    # Events that were not kept for it, because too many waited.
    Column("dropped_events", BigInteger, nullable=False, server_default=text("0")),
    _created(),
    PrimaryKeyConstraint("tenant_id", "id"),
)

# The parts of limits per month that were used, each of which is reported once a month.
budget_notices = Table(
    "budget_notices",
    metadata,
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    # The tenant or a key of it.
    Column("owner_id", Text, nullable=False),
    # The first day of the month (UTC).
    Column("month", Date, nullable=False),
    # `tokens_per_month` or `budget_per_month`.
    Column("limit", Text, nullable=False),
    Column("percent", Integer, nullable=False),
    _created(),
    PrimaryKeyConstraint("tenant_id", "owner_id", "month", "limit", "percent"),
)

# One row for each event and webhook that reports it.
webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("tenant_id", Text, nullable=False),
    Column("webhook_id", Text, nullable=False),
    # The id of the event, which is the same for each webhook and each attempt.
    Column("id", Text, nullable=False),
    # An EventType.
    Column("type", Text, nullable=False),
    # The event as it is sent, as JSON.
    Column("body", LargeBinary, nullable=False),
    # A DeliveryState.
    Column("state", Text, nullable=False, server_default=text("'pending'")),
    # The failed attempts since it was created, or since the last request to send it again.
    Column("failures", Integer, nullable=False, server_default=text("0")),
    # All attempts, and what came of the last one.
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("attempted_at", DateTime(timezone=True)),
    Column("status_code", Integer),
    Column("duration_ms", Integer),
    Column("error", Text),
    # When it is sent, while it is pending.
    Column("due_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("ended_at", DateTime(timezone=True)),
    *_lease(),
    _created(),
    PrimaryKeyConstraint("tenant_id", "webhook_id", "id"),
    ForeignKeyConstraint(["tenant_id", "webhook_id"], ["webhooks.tenant_id", "webhooks.id"], ondelete="CASCADE"),
    Index("webhook_deliveries_pending_idx", "tenant_id", "webhook_id", "due_at", postgresql_where=text("state = 'pending'")),
    Index("webhook_deliveries_due_idx", "due_at", postgresql_where=text("state = 'pending' AND runner_id IS NULL")),
    Index("webhook_deliveries_leased_idx", "runner_id", postgresql_where=text("runner_id IS NOT NULL")),
    Index(None, "tenant_id", "webhook_id", "created_at"),
    Index("webhook_deliveries_ended_idx", "ended_at", postgresql_where=text("ended_at IS NOT NULL")),
)

# Triggers increase the sum of these numbers with every change of a tenant, a key, a base model or an adapter (migration 0005).
changes = Table(
    "changes",
    metadata,
    Column("slot", BigInteger, primary_key=True, autoincrement=True),
    Column("number", BigInteger, nullable=False),
)

audit_log = Table(
    "audit_log",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=True),
    Column("tenant_id", Text),
    # The role of the key, or `system`. Null in records of releases that did not write it. The same holds for `request_id`.
    Column("actor", Text),
    Column("key_id", Text),
    Column("request_id", Text),
    Column("action", Text, nullable=False),
    Column("target", Text, nullable=False),
    _created(),
    Index(None, "tenant_id", "created_at"),
)
