"""The scope of a transaction: the rows that it may see and change. Every transaction names one."""

from collections.abc import Sequence
from dataclasses import dataclass

from psycopg.sql import Literal

from lmaas.store.rights import DatabaseRole, role_name


@dataclass(frozen=True, slots=True)
class Scope:
    """A scope that belongs to no tenant. `role` is the database role of the transaction, instead of the process's own."""

    name: str
    role: DatabaseRole | None = None


#: The scope of a process's own work: tables without tenants, and what its database role may do for all tenants.
SYSTEM = Scope("system")
#: The scope of an operator's work: the rows of all tenants.
OPERATOR = Scope("operator", DatabaseRole.OPERATOR)
#: The scope for renewing the running idempotency claims of all tenants.
CLAIMS = Scope("claims", DatabaseRole.CLAIMS)
#: The scope for leasing the durable work of all tenants.
LEASES = Scope("leases", DatabaseRole.LEASES)


@dataclass(frozen=True, slots=True)
class KeyScope:
    """The scope for looking up one API key before its tenant is known: that key and its tenant."""

    key_hash: str


#: A string is a tenant's id and means the scope of this tenant.
AnyScope = str | Scope | KeyScope


def scope_of(tenant_id: str | None) -> AnyScope:
    """Return the scope of a tenant, or the operators' for None, to which operators' keys and actions belong."""
    return OPERATOR if tenant_id is None else tenant_id


def begin_statement(scope: AnyScope, prefix: str, acts_as: DatabaseRole | None) -> str:
    """Return the SQL that begins a transaction in `scope`: one message, whose settings end with the transaction.

    `acts_as` is the process's role if its login is another one. Raises ValueError for an empty id.
    """
    setting, role = "", acts_as
    if isinstance(scope, Scope):
        role = scope.role or acts_as
    elif isinstance(scope, KeyScope):
        role, setting = DatabaseRole.AUTHENTICATOR, f"; SET LOCAL lmaas.key_hash = {_quoted(scope.key_hash)}"
    elif scope == "":
        raise ValueError("A tenant's id is empty.")
    else:
        setting = f"; SET LOCAL lmaas.tenant = {_quoted(scope)}"
    become = f"; SET LOCAL ROLE {role_name(prefix, role)}" if role is not None else ""
    return "BEGIN" + become + setting


def tenant_settings(tenant_id: str, prefix: str, acts_as: DatabaseRole | None) -> tuple[str, Sequence[str]]:
    """Return the statement that puts the rest of a transaction into the scope of a tenant, and its values. It can be prepared, unlike
    that of `begin_statement`. Raises ValueError for an empty id."""
    if not tenant_id:
        raise ValueError("A tenant's id is empty.")
    if acts_as is None:
        return "SELECT set_config('lmaas.tenant', %s, true)", (tenant_id,)
    return "SELECT set_config('role', %s, true), set_config('lmaas.tenant', %s, true)", (role_name(prefix, acts_as), tenant_id)


def _quoted(value: str) -> str:
    return Literal(value).as_string(None)
