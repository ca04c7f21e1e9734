"""The scope of a transaction: whose rows it may see and change. Every transaction names one."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scope:
    """A scope that belongs to no tenant."""

    name: str


#: A process's own work: tables without tenants, and what its database role may do for all tenants.
SYSTEM = Scope("system")
#: An operator's work: the rows of all tenants.
OPERATOR = Scope("operator")


@dataclass(frozen=True, slots=True)
class KeyScope:
    """The lookup of one API key, before its tenant is known: that key and its tenant."""

    key_hash: str


#: A tenant's id stands for the scope of this tenant.
AnyScope = str | Scope | KeyScope


def scope_of(tenant_id: str | None) -> AnyScope:
    """Return the scope of a tenant, or the operators' for None, to which operators' keys and actions belong."""
    return OPERATOR if tenant_id is None else tenant_id
