"""The scope of a transaction: whose rows it may see and change. Every transaction names one."""

from dataclasses import dataclass

from psycopg.sql import Literal

from lmaas.store.rights import DatabaseRole, role_name


@dataclass(frozen=True, slots=True)
class Scope:
    """A scope that belongs to no tenant. `role` is what the transaction acts as instead of the process's own role."""

    name: str
    role: DatabaseRole | None = None


#: A process's own work: tables without tenants, and what its database role may do for all tenants.
SYSTEM = Scope("system")
#: An operator's work: the rows of all tenants.
OPERATOR = Scope("operator", DatabaseRole.OPERATOR)
#: Signs of life for the running idempotency claims of all tenants.
CLAIMS = Scope("claims", DatabaseRole.CLAIMS)


@dataclass(frozen=True, slots=True)
class KeyScope:
    """The lookup of one API key, before its tenant is known: that key and its tenant."""

    key_hash: str


#: A tenant's id stands for the scope of this tenant.
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


def _quoted(value: str) -> str:
    return Literal(value).as_string(None)
