"""The roles that a person's groups give, by the setting `LMAAS_CONSOLE_OIDC_ROLES`."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lmaas.errors import SettingsError
from lmaas.types import NAME_PATTERN, Role

SETTING = "LMAAS_CONSOLE_OIDC_ROLES"
ANY = "*"
#: The most groups of a person that are looked at.
MAX_GROUPS = 1000
_RANK = (Role.OPERATOR, Role.TENANT_ADMIN, Role.INFERENCE)


@dataclass(frozen=True, slots=True)
class Grant:
    """A role, of a tenant unless it is an operator's."""

    role: Role
    tenant: str | None


@dataclass(frozen=True, slots=True)
class Rule:
    """The grant of one group. A `*` in the group is the name of the tenant, if the tenant is `*` too."""

    group: re.Pattern[str]
    role: Role
    tenant: str | None

    def grant(self, group: str) -> Grant | None:
        """Return what this group gives by this rule."""
        found = self.group.fullmatch(group)
        if found is None:
            return None
        return Grant(self.role, found[1] if self.tenant == ANY else self.tenant)


def read_rules(text: str) -> list[Rule]:
    """Read the setting: `GROUP=ROLE` or `GROUP=ROLE@TENANT`, separated by semicolons. Raises SettingsError."""
    return [_read_rule(entry.strip()) for entry in text.split(";") if entry.strip()]


def _read_rule(entry: str) -> Rule:
    group, _, given = entry.rpartition("=")
    name, _, tenant = given.strip().partition("@")
    group = group.strip()
    if not group or name not in set(Role):
        roles = ", ".join(Role)
        raise SettingsError(f"{SETTING} has {entry!r}. Write GROUP=ROLE or GROUP=ROLE@TENANT; the roles are {roles}.")
    role = Role(name)
    if (role is Role.OPERATOR) == bool(tenant):
        raise SettingsError(f"{SETTING} has {entry!r}. An operator has no tenant, the other roles need one: GROUP=tenant_admin@TENANT.")
    if (tenant == ANY) != (ANY in group) or group.count(ANY) > 1:
        raise SettingsError(f"{SETTING} has {entry!r}. One '*' in the group goes with '*' as the tenant: team-*-admins=tenant_admin@*.")
    if tenant and tenant != ANY and NAME_PATTERN.fullmatch(tenant) is None:
        raise SettingsError(f"{SETTING} has {entry!r}. {tenant!r} cannot be the name of a tenant.")
    pattern = re.escape(group).replace(re.escape(ANY), f"({NAME_PATTERN.pattern})")
    return Rule(re.compile(pattern), role, tenant or None)


def grants_of(groups: Collection[str], rules: Collection[Rule]) -> list[Grant]:
    """Return the grants of these groups: the highest role in each tenant, an operator's first, then by the tenants' names."""
    found = {grant for group in groups for rule in rules if (grant := rule.grant(group)) is not None}
    best: dict[str | None, Grant] = {}
    for grant in sorted(found, key=lambda grant: _RANK.index(grant.role)):
        best.setdefault(grant.tenant, grant)
    return sorted(best.values(), key=lambda grant: (grant.tenant is not None, grant.tenant or ""))


def groups_in(claims: Mapping[str, Any], claim: str) -> list[str] | None:
    """Return the groups in a claim: a list of texts, or one text. None if there is no such claim. `a.b` is also the field `b` of the claim
    `a`."""
    value: Any = claims.get(claim)
    if value is None:
        value = claims
        for part in claim.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, str):
        return [value]
    return [group for group in value[:MAX_GROUPS] if isinstance(group, str)] if isinstance(value, list) else None
