"""The roles that groups give."""

from typing import Any

import pytest

from lmaas.console.grants import Grant, grants_of, groups_in, read_rules
from lmaas.errors import SettingsError
from lmaas.types import Role

RULES = read_rules(
    "platform=operator; acme-admins=tenant_admin@acme;acme-users=inference@acme ; "
    "cn=globex,ou=teams=tenant_admin@globex; team-*-admins=tenant_admin@*;"
)
ACME, GLOBEX = Grant(Role.TENANT_ADMIN, "acme"), Grant(Role.TENANT_ADMIN, "globex")


@pytest.mark.parametrize(
    ("groups", "grants"),
    [
        ([], []),
        (["unknown", "PLATFORM", "acme-admins ", "platform2"], []),
        (["platform"], [Grant(Role.OPERATOR, None)]),
        (["acme-users"], [Grant(Role.INFERENCE, "acme")]),
        (["acme-users", "acme-admins"], [ACME]),
        (["cn=globex,ou=teams", "acme-admins", "platform"], [Grant(Role.OPERATOR, None), ACME, GLOBEX]),
        (["team-globex-admins", "cn=globex,ou=teams"], [GLOBEX]),
        (["team-a.b_c-1-admins"], [Grant(Role.TENANT_ADMIN, "a.b_c-1")]),
        (["team--admins", "team-A-admins", "team-a/b-admins", "team-a\n-admins"], []),
    ],
)
def test_groups_give(groups: list[str], grants: list[Grant]) -> None:
    assert grants_of(groups, RULES) == grants


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("platform", "Write GROUP=ROLE"),
        ("=operator", "Write GROUP=ROLE"),
        ("platform=root", "the roles are operator, tenant_admin, inference"),
        ("platform=operator@acme", "An operator has no tenant"),
        ("acme=tenant_admin", "the other roles need one"),
        ("acme=tenant_admin@Acme Inc", "cannot be the name of a tenant"),
        ("team-*=tenant_admin@acme", "goes with"),
        ("team=tenant_admin@*", "goes with"),
        ("*-*=tenant_admin@*", "goes with"),
        ("*=operator", "goes with"),
    ],
)
def test_a_wrong_setting_is_explained(text: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        read_rules(f"fine=operator; {text}")


@pytest.mark.parametrize(
    ("claims", "claim", "groups"),
    [
        ({"groups": ["a", "b"]}, "groups", ["a", "b"]),
        ({"groups": "a"}, "groups", ["a"]),
        ({"groups": ["a", 1, None, {"x": "y"}]}, "groups", ["a"]),
        ({"groups": {}}, "groups", None),
        ({"groups": 7}, "groups", None),
        ({}, "groups", None),
        ({"realm_access": {"roles": ["a"]}}, "realm_access.roles", ["a"]),
        ({"https://acme.test/groups": ["a"]}, "https://acme.test/groups", ["a"]),
        ({"realm_access": "x"}, "realm_access.roles", None),
        ({"groups": [str(number) for number in range(5000)]}, "groups", [str(number) for number in range(1000)]),
    ],
)
def test_groups_in_claims(claims: dict[str, Any], claim: str, groups: list[str] | None) -> None:
    assert groups_in(claims, claim) == groups
