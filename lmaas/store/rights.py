"""Database roles, their rights, and the rows that each of them sees. `lmaas migrate` changes a database to match this module.

A table that is not listed here cannot be used by any process. A new table with a tenant needs an entry whose grants name the tenant's rows;
a test fails without one. docs/concepts/tenancy.md explains the roles.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum

from lmaas.types import Limits


class DatabaseRole(StrEnum):
    """A role's name after the prefix of the service, `lmaas_` by default."""

    #: Owns every table, and never logs in.
    OWNER = "owner"
    #: Runs migrations, as a member of the owner.
    MIGRATOR = "migrator"
    #: Gateways. Sees the tenant that its transaction names.
    GATEWAY = "gateway"
    #: An operator's requests: gateways assume it for one transaction. Sees all tenants.
    OPERATOR = "operator"
    #: Looks up one key by its hash. Gateways assume it for one transaction.
    AUTHENTICATOR = "authenticator"
    #: Renews the running idempotency claims of all tenants. Gateways assume it for one transaction.
    CLAIMS = "claims"
    #: Leases durable work of all tenants, without reading it. Job runners assume it for one transaction.
    LEASES = "leases"
    CONTROLLER = "controller"
    #: Supervisors of replicas.
    REPLICA = "replica"
    #: Job runners. Sees the tenant that its transaction names.
    JOBS = "jobs"
    CONSOLE = "console"


(OWNER, MIGRATOR, GATEWAY, OPERATOR, AUTHENTICATOR, CLAIMS, LEASES, CONTROLLER, REPLICA, JOBS, CONSOLE) = DatabaseRole

#: The roles that processes log in as. The others never log in.
LOGINS = (
    MIGRATOR,
    GATEWAY,
    CONTROLLER,
    REPLICA,
    JOBS,
    CONSOLE,
)
#: Roles that a role may assume for a transaction. It does not inherit their rights: without `SET LOCAL ROLE` it has none of them.
ASSUMES: Mapping[DatabaseRole, tuple[DatabaseRole, ...]] = {GATEWAY: (OPERATOR, AUTHENTICATOR, CLAIMS), JOBS: (LEASES,)}
#: Roles whose rights a role inherits.
INHERITS: Mapping[DatabaseRole, tuple[DatabaseRole, ...]] = {MIGRATOR: (OWNER,)}

#: The conditions on rows. `current_setting` is stable, so the planner evaluates it once and can use an index.
TENANT = "current_setting('lmaas.tenant', true)"
OWN = f"tenant_id = {TENANT}"
ITSELF = f"id = {TENANT}"
THE_KEY = "hash = current_setting('lmaas.key_hash', true)"
ITS_TENANT = "id = (SELECT api_keys.tenant_id FROM api_keys WHERE api_keys.hash = current_setting('lmaas.key_hash', true))"
A_SESSION = "parent_id IS NOT NULL"
ENDED_BATCH = "status IN ('failed', 'completed', 'expired', 'cancelled')"
ALL = "true"
NONE = "false"


@dataclass(frozen=True, slots=True)
class Grant:
    """One command on one table: for existing `rows`, for new ones that pass `check`, and for `columns` (none means all)."""

    command: str
    rows: str = ALL
    columns: tuple[str, ...] = ()
    check: str | None = None


def lock(column: str, rows: str = ALL) -> Grant:
    """Grant row locks (`SELECT … FOR SHARE` and stronger) without any change of a row. Postgres allows locks only with the UPDATE right."""
    return Grant("UPDATE", rows, (column,), NONE)


_LIMITS = tuple(field.name for field in fields(Limits))
_KEY = ("id", "tenant_id", "role", "name", "prefix", "created_at", "revoked_at", "expires_at", "parent_id", *_LIMITS)
_KEY_CHANGES = ("revoked_at", "expires_at", *_LIMITS)
_SIZES = ("tenant_id", "id", "size_bytes", "expires_at")
_FILE_SIZES = ("tenant_id", "id", "size_bytes", "sha256", "expires_at")
_LEASE = ("runner_id", "attempt")
_BATCH = ("tenant_id", "id", "key_id", "endpoint", "input_file_id", "status", "stop_code", "total", "created_at", "expires_at", *_LEASE)
_LINE = ("ctid", "tenant_id", "batch_id", "position", "byte_offset", "byte_length", "pool_id", "tokens", "state", "given_back", *_LEASE)
_DETACHED = ("tenant_id", "id", "size_bytes", "created_at", "not_before", "deadline_at", "ended_at", "losses", *_LEASE)
_MONTHLY = ("tokens_per_month", "budget_per_month")
_WEBHOOK = ("name", "url", "event_types", "secret_hint", "failing_since", "disabled_at", "disabled_reason", "dropped_events")
_DELIVERY = ("tenant_id", "webhook_id", "id", "state", "due_at", "ended_at", *_LEASE)
_OBSERVED = ("observed", "url", "reason", "ready_at", "ended_at", "start")

#: Tables whose rows belong to tenants.
TENANTS: Mapping[str, Mapping[DatabaseRole, tuple[Grant, ...]]] = {
    "tenants": {
        GATEWAY: (Grant("SELECT", ITSELF), lock("id", ITSELF)),
        AUTHENTICATOR: (Grant("SELECT", ITS_TENANT),),
        OPERATOR: (Grant("SELECT"), Grant("INSERT"), Grant("UPDATE")),
        JOBS: (Grant("SELECT", ITSELF), lock("id", ITSELF)),
        # Events of budgets.
        CONTROLLER: (Grant("SELECT", ALL, ("id", "tier", "deleted_at", *_MONTHLY)),),
    },
    "api_keys": {
        GATEWAY: (
            # A tenant's own request cannot read a hash or create an operator.
            Grant("SELECT", OWN, _KEY),
            Grant("INSERT", check=f"{OWN} AND role <> 'operator'"),
            Grant("UPDATE", OWN, _KEY_CHANGES),
            Grant("DELETE", f"{OWN} AND {A_SESSION}"),
        ),
        AUTHENTICATOR: (Grant("SELECT", THE_KEY),),
        OPERATOR: (Grant("SELECT", ALL, _KEY), Grant("INSERT"), Grant("UPDATE", ALL, _KEY_CHANGES), Grant("DELETE", A_SESSION)),
        JOBS: (Grant("SELECT", OWN, _KEY),),
        CONTROLLER: (Grant("SELECT", ALL, ("id", "tenant_id", "revoked_at", *_MONTHLY)),),
    },
    "adapters": {
        GATEWAY: (
            Grant("SELECT", OWN),
            Grant("INSERT", check=OWN),
            Grant("UPDATE", OWN, ("live_version", "activated_by")),
            Grant("DELETE", OWN),
        ),
        OPERATOR: (Grant("SELECT"), Grant("DELETE")),
        JOBS: (Grant("SELECT", OWN),),
    },
    "adapter_versions": {
        GATEWAY: (Grant("SELECT", OWN), Grant("INSERT", check=OWN)),
        OPERATOR: (Grant("SELECT"),),
        JOBS: (Grant("SELECT", OWN),),
    },
    "usage_events": {
        GATEWAY: (Grant("SELECT", OWN),),
        OPERATOR: (Grant("SELECT"),),
        # An event changes only if it replaces a stand-in.
        CONTROLLER: (Grant("SELECT"), Grant("INSERT"), Grant("UPDATE", "status IN ('lost', 'wasted')", check=ALL)),
        JOBS: (Grant("SELECT", OWN), Grant("INSERT", check=OWN), Grant("UPDATE", f"{OWN} AND status IN ('lost', 'wasted')", check=OWN)),
    },
    # The ledger's sums. Only triggers write them, as the owner.
    "usage_days": {
        GATEWAY: (Grant("SELECT", OWN),),
        JOBS: (Grant("SELECT", OWN),),
        OPERATOR: (Grant("SELECT"),),
        CONTROLLER: (Grant("SELECT"),),
    },
    "work_days": {GATEWAY: (Grant("SELECT", OWN),), OPERATOR: (Grant("SELECT"),)},
    "idempotency": {
        GATEWAY: (Grant("SELECT", OWN), Grant("INSERT", check=OWN), Grant("UPDATE", OWN), Grant("DELETE", OWN)),
        CLAIMS: (Grant("SELECT", ALL, ("tenant_id", "key", "request_id", "state")), Grant("UPDATE", ALL, ("seen_at",))),
        OPERATOR: (Grant("SELECT", ALL, ("tenant_id",)), Grant("DELETE")),
        CONTROLLER: (Grant("SELECT"), Grant("DELETE"), lock("key")),
    },
    # Operators delete a tenant's responses and conversations with the tenant, and controllers expired ones. Neither can read them.
    "responses": {
        GATEWAY: (Grant("SELECT", OWN), Grant("INSERT", check=OWN), Grant("DELETE", OWN)),
        JOBS: (Grant("SELECT", OWN), Grant("INSERT", check=OWN)),
        OPERATOR: (Grant("SELECT", ALL, _SIZES), Grant("DELETE")),
        CONTROLLER: (Grant("SELECT", ALL, _SIZES), Grant("DELETE")),
    },
    "conversations": {
        GATEWAY: (
            Grant("SELECT", OWN),
            Grant("INSERT", check=OWN),
            Grant("UPDATE", OWN, ("metadata", "next_position", "item_count", "size_bytes", "expires_at")),
            Grant("DELETE", OWN),
        ),
        JOBS: (Grant("SELECT", OWN), Grant("UPDATE", OWN, ("next_position", "item_count", "size_bytes", "expires_at"))),
        OPERATOR: (Grant("SELECT", ALL, (*_SIZES, "item_count")), Grant("DELETE")),
        CONTROLLER: (Grant("SELECT", ALL, (*_SIZES, "item_count")), Grant("DELETE")),
    },
    # They go with their conversation.
    "conversation_items": {
        GATEWAY: (Grant("SELECT", OWN), Grant("INSERT", check=OWN), Grant("DELETE", OWN)),
        JOBS: (Grant("SELECT", OWN), Grant("INSERT", check=OWN)),
    },
    # Operators delete a tenant's files with the tenant, and controllers expired ones. Neither can read their names.
    "files": {
        GATEWAY: (Grant("SELECT", OWN), Grant("INSERT", check=OWN), Grant("DELETE", OWN)),
        JOBS: (Grant("SELECT", OWN), Grant("INSERT", check=OWN), Grant("DELETE", OWN)),
        OPERATOR: (Grant("SELECT", ALL, _FILE_SIZES), Grant("UPDATE", ALL, ("expires_at",)), Grant("DELETE")),
        CONTROLLER: (Grant("SELECT", ALL, _FILE_SIZES), Grant("DELETE")),
    },
    "content_checks": {
        GATEWAY: (Grant("SELECT", OWN), Grant("INSERT", check=OWN), Grant("DELETE", OWN)),
        JOBS: (Grant("SELECT", OWN), Grant("INSERT", check=OWN), Grant("DELETE", OWN)),
        OPERATOR: (Grant("SELECT"), Grant("INSERT"), Grant("DELETE")),
        CONTROLLER: (Grant("SELECT"), Grant("INSERT"), Grant("UPDATE", ALL, ("due_at",)), Grant("DELETE")),
    },
    # Runners lease the work of all tenants. What it is, and its results, they see only in the scope of its tenant.
    "batches": {
        GATEWAY: (Grant("SELECT", OWN), Grant("INSERT", check=OWN), Grant("UPDATE", OWN), Grant("DELETE", OWN)),
        JOBS: (Grant("SELECT", OWN), Grant("UPDATE", OWN)),
        LEASES: (Grant("SELECT", ALL, (*_BATCH, "finalizing_at", "losses")), Grant("UPDATE", ALL, ("losses", *_LEASE))),
        OPERATOR: (Grant("SELECT", ALL, ("tenant_id", "id", "status")), Grant("DELETE")),
        CONTROLLER: (Grant("SELECT", ALL, ("tenant_id", "id", "status", "expires_at", "created_at")), Grant("DELETE", ENDED_BATCH)),
    },
    "batch_lines": {
        GATEWAY: (Grant("SELECT", OWN),),
        JOBS: (Grant("SELECT", OWN), Grant("INSERT", check=OWN), Grant("UPDATE", OWN), Grant("DELETE", OWN)),
        LEASES: (Grant("SELECT", ALL, _LINE), Grant("UPDATE", ALL, ("state", "given_back", *_LEASE))),
    },
    "batch_pools": {
        GATEWAY: (Grant("SELECT", OWN),),
        JOBS: (Grant("SELECT", OWN), Grant("INSERT", check=OWN), Grant("UPDATE", OWN), Grant("DELETE", OWN)),
        LEASES: (Grant("SELECT"), Grant("UPDATE", ALL, ("pending", "pending_tokens"))),
        CONTROLLER: (Grant("SELECT"),),
    },
    "background_responses": {
        GATEWAY: (Grant("SELECT", OWN), Grant("INSERT", check=OWN), Grant("UPDATE", OWN), Grant("DELETE", OWN)),
        JOBS: (Grant("SELECT", OWN), Grant("UPDATE", OWN)),
        LEASES: (Grant("SELECT", ALL, _DETACHED), Grant("UPDATE", ALL, ("losses", *_LEASE))),
        OPERATOR: (Grant("SELECT", ALL, _SIZES), Grant("DELETE")),
        CONTROLLER: (Grant("SELECT", ALL, (*_SIZES, "runner_id")), Grant("DELETE")),
    },
    # They go with their response.
    "response_events": {
        GATEWAY: (Grant("SELECT", OWN), Grant("INSERT", check=OWN), Grant("DELETE", OWN)),
        JOBS: (Grant("SELECT", OWN), Grant("INSERT", check=OWN), Grant("DELETE", OWN)),
    },
    # The keys of signatures are read by job runners alone.
    "webhooks": {
        GATEWAY: (
            Grant("SELECT", OWN, ("tenant_id", "id", "created_at", "previous_until", *_WEBHOOK)),
            Grant("INSERT", check=OWN),
            Grant("UPDATE", OWN, ("secret", "previous_until", *_WEBHOOK)),
            Grant("DELETE", OWN),
        ),
        JOBS: (Grant("SELECT", OWN), Grant("UPDATE", OWN, ("failing_since", "disabled_at", "disabled_reason", "dropped_events"))),
        LEASES: (Grant("SELECT", ALL, ("tenant_id", "id", "failing_since")),),
        CONTROLLER: (
            Grant("SELECT", ALL, ("tenant_id", "id", "event_types", "disabled_at", "dropped_events")),
            Grant("UPDATE", ALL, ("dropped_events",)),
        ),
        OPERATOR: (Grant("SELECT", ALL, ("tenant_id", "id")), Grant("DELETE")),
    },
    "webhook_deliveries": {
        GATEWAY: (Grant("SELECT", OWN), Grant("INSERT", check=OWN), Grant("UPDATE", OWN)),
        JOBS: (Grant("SELECT", OWN), Grant("INSERT", check=OWN), Grant("UPDATE", OWN), Grant("DELETE", OWN)),
        LEASES: (Grant("SELECT", ALL, _DELIVERY), Grant("UPDATE", ALL, _LEASE)),
        CONTROLLER: (Grant("SELECT", ALL, _DELIVERY), Grant("INSERT"), Grant("DELETE", "state <> 'pending'")),
    },
    "budget_notices": {
        GATEWAY: (Grant("SELECT", OWN),),
        OPERATOR: (Grant("SELECT", ALL, ("tenant_id",)), Grant("DELETE")),
        CONTROLLER: (Grant("SELECT"), Grant("INSERT"), Grant("DELETE")),
    },
    "audit_log": {
        # Records can be added, and never changed.
        GATEWAY: (Grant("INSERT", check=OWN), Grant("SELECT", OWN, ("id",))),
        JOBS: (Grant("INSERT", check=OWN), Grant("SELECT", OWN, ("id",))),
        OPERATOR: (Grant("SELECT"), Grant("INSERT")),
    },
}

#: Tables without tenants. Those with row-level security have it because of their locks.
SHARED: Mapping[str, Mapping[DatabaseRole, tuple[Grant, ...]]] = {
    "base_models": {
        GATEWAY: (Grant("SELECT"), lock("id")),
        OPERATOR: (Grant("SELECT"), Grant("INSERT"), Grant("UPDATE")),
        CONTROLLER: (Grant("SELECT"), lock("id")),
        REPLICA: (Grant("SELECT"),),
        JOBS: (Grant("SELECT"),),
        CONSOLE: (Grant("SELECT"),),
    },
    "pool_states": {
        GATEWAY: (Grant("SELECT"),),
        OPERATOR: (Grant("SELECT"),),
        CONTROLLER: (Grant("SELECT"), Grant("INSERT"), Grant("UPDATE")),
        JOBS: (Grant("SELECT"),),
    },
    "replicas": {
        GATEWAY: (Grant("SELECT"),),
        JOBS: (Grant("SELECT"),),
        OPERATOR: (Grant("SELECT"), Grant("UPDATE", ALL, ("desired",))),
        CONTROLLER: (Grant("SELECT"), Grant("INSERT"), Grant("UPDATE", ALL, ("desired", *_OBSERVED))),
        REPLICA: (Grant("SELECT"), Grant("UPDATE", ALL, _OBSERVED)),
    },
    "engine_time": {
        OPERATOR: (Grant("SELECT"),),
        CONTROLLER: (Grant("SELECT"),),
        REPLICA: (Grant("SELECT"), Grant("INSERT"), Grant("UPDATE", ALL, ("ms",))),
    },
    "job_runners": {
        JOBS: (Grant("SELECT"), Grant("INSERT"), Grant("UPDATE", ALL, ("seen_at",)), Grant("DELETE")),
        # A row is locked while what its runner leases changes.
        LEASES: (Grant("SELECT"), Grant("UPDATE", ALL, ("seen_at",)), Grant("DELETE")),
        CONTROLLER: (Grant("SELECT", ALL, ("id", "seen_at")),),
    },
    # Written only by triggers, as the owner.
    "changes": {GATEWAY: (Grant("SELECT"),), JOBS: (Grant("SELECT"),)},
    "alembic_version": {},
}
#: Tables without tenants that have row-level security, because some roles may lock their rows but not change them.
LOCKED_ONLY = frozenset({"base_models"})
#: Sequences behind the columns that these roles insert into.
SEQUENCES: Mapping[str, tuple[DatabaseRole, ...]] = {"audit_log_id_seq": (GATEWAY, OPERATOR, JOBS)}

TABLES: Mapping[str, Mapping[DatabaseRole, tuple[Grant, ...]]] = {**TENANTS, **SHARED}
GUARDED = frozenset({*TENANTS, *LOCKED_ONLY})


def role_name(prefix: str, role: DatabaseRole) -> str:
    """Return the name of a role in the database cluster."""
    return f"{prefix}_{role.value}"


def privileges(prefix: str) -> set[tuple[str, str, str, str]]:
    """Return every right as table or sequence, role's name, command, and column (empty: all)."""
    found = {
        (table, role_name(prefix, role), grant.command, column)
        for table, roles in TABLES.items()
        for role, grants in roles.items()
        for grant in grants
        for column in grant.columns or ("",)
    }
    return found | {(sequence, role_name(prefix, role), "USAGE", "") for sequence, roles in SEQUENCES.items() for role in roles}


def policies(prefix: str, table: str) -> dict[str, str]:
    """Return the row-level policies of a table by their names, each as what follows `CREATE POLICY name ON table`."""
    if table not in GUARDED:
        return {}
    # Data migrations and foreign keys need all rows. No process runs as the owner.
    found = {"owner_all": f"FOR ALL TO {role_name(prefix, OWNER)} USING (true) WITH CHECK (true)"}
    for role, grants in TABLES[table].items():
        for grant in grants:
            clauses = f"FOR {grant.command} TO {role_name(prefix, role)}"
            if grant.command != "INSERT":
                clauses += f" USING ({grant.rows})"
            if grant.command in ("INSERT", "UPDATE"):
                clauses += f" WITH CHECK ({grant.check if grant.check is not None else grant.rows})"
            found[f"{role.value}_{grant.command.lower()}"] = clauses
    return found
