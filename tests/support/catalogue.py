"""Compares tenancy in a database's catalogue with `lmaas.store.rights`."""

from collections.abc import Iterator

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from lmaas.store.rights import ASSUMES, GUARDED, INHERITS, SHARED, TABLES, TENANTS, DatabaseRole, policies, privileges, role_name

#: The roles that may see rows of all tenants, with the reasons.
OF_ALL_TENANTS = {
    "owner": "data migrations and foreign keys",
    "operator": "an operator's requests",
    "controller": "writes the ledger, deletes old answers",
    "claims": "signs of life of running claims",
    "leases": "leases of durable work, without its content",
}

_TABLES = """
    SELECT relname, pg_get_userbyid(relowner), relrowsecurity, relrowsecurity AND relforcerowsecurity,
      EXISTS (SELECT FROM pg_attribute WHERE attrelid = pg_class.oid AND attname = 'tenant_id' AND NOT attisdropped)
    FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'v', 'm', 'f')
"""
_POLICIES = "SELECT tablename, policyname, permissive, roles[1], cardinality(roles), cmd, qual, with_check FROM pg_policies"
_PRIVILEGES = """
    SELECT relname, CASE grantee WHEN 0 THEN 'public' ELSE pg_get_userbyid(grantee) END, privilege_type, ''
    FROM pg_class, aclexplode(relacl) WHERE relnamespace = 'public'::regnamespace
    UNION SELECT relname, pg_get_userbyid(grantee), privilege_type, attname
    FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid, aclexplode(attacl) WHERE relnamespace = 'public'::regnamespace
"""
_ROLES = "SELECT rolname, rolsuper OR rolbypassrls OR rolcreaterole OR rolcreatedb OR rolreplication FROM pg_roles"
_OWNED = """
    SELECT pg_get_userbyid(refobjid), pg_describe_object(classid, objid, objsubid) FROM pg_shdepend
    WHERE deptype = 'o' AND refclassid = 'pg_authid'::regclass AND dbid = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
_MEMBERS = """
    SELECT granted.rolname, member.rolname, pg_has_role(member.oid, granted.oid, 'USAGE') FROM pg_auth_members
    JOIN pg_roles AS granted ON granted.oid = roleid JOIN pg_roles AS member ON member.oid = member
"""


async def faults(connection: AsyncConnection, prefix: str = "lmaas") -> list[str]:
    """Return the differences from `lmaas.store.rights` as sentences. Empty if tenancy is correct."""
    return [fault async for fault in _faults(connection, prefix)]


async def _faults(connection: AsyncConnection, prefix: str):  # type: ignore[no-untyped-def]
    ours = {role_name(prefix, role): role for role in DatabaseRole}
    owner = role_name(prefix, DatabaseRole.OWNER)
    rows = (await connection.execute(text(_TABLES))).all()
    for table, table_owner, enabled, forced, has_tenant in rows:
        if table not in TABLES:
            yield f"the table {table} is not in lmaas.store.rights"
        if has_tenant and table not in TENANTS:
            yield f"the table {table} has a tenant and is not among TENANTS"
        if not forced and (has_tenant or table in GUARDED):
            yield f"the table {table} has no forced row-level security"
        if enabled and table in TABLES and table not in GUARDED:
            yield f"the table {table} has row-level security and no policies"
        if table_owner != owner:
            yield f"the table {table} belongs to {table_owner}"
    for table in TABLES.keys() - {row[0] for row in rows}:
        yield f"the table {table} of lmaas.store.rights does not exist"
    found: dict[str, set[str]] = {}
    for table, name, permissive, role, count, command, qual, check in (await connection.execute(text(_POLICIES))).all():
        found.setdefault(table, set()).add(name)
        process = ours.get(role)
        if permissive != "PERMISSIVE" or count != 1 or process is None:
            yield f"the policy {name} of {table} is not for one of our roles"
        elif table in TENANTS and process not in OF_ALL_TENANTS:
            for clause in filter(None, (qual, check)):
                if "lmaas.tenant" not in clause and "lmaas.key_hash" not in clause and clause != "false":
                    yield f"the policy {name} of {table} lets {process} see other tenants: {clause}"
        if command not in name.upper():
            yield f"the policy {name} of {table} is for {command}"
    for table in TABLES:
        if found.get(table, set()) != set(policies(prefix, table)):
            yield f"the policies of {table} are {sorted(found.get(table, ()))}"
    granted = {tuple(row) for row in (await connection.execute(text(_PRIVILEGES))).all() if row[1] != owner}
    for verb, rights in (("has gained", granted - privileges(prefix)), ("lacks", privileges(prefix) - granted)):
        for table, role, command, column in sorted(rights):
            yield f"{role} {verb} {command} on {table} {column}".rstrip()
    for role, powerful in (await connection.execute(text(_ROLES))).all():
        if role in ours and powerful:
            yield f"{role} may do more than a process needs"
    for role, thing in (await connection.execute(text(_OWNED))).all():
        if role in ours and role != owner:
            yield f"{role} owns {thing}"
    for fault in _wrong_members([tuple(row) for row in (await connection.execute(text(_MEMBERS))).all()], ours, prefix):
        yield fault


def _wrong_members(members: list[tuple[str, str, bool]], ours: dict[str, DatabaseRole], prefix: str) -> Iterator[str]:
    known = {(granted, member): inherits for granted, member, inherits in members if granted in ours and member in ours}
    wanted = {(granted, role): False for role, several in ASSUMES.items() for granted in several}
    wanted |= {(granted, role): True for role, several in INHERITS.items() for granted in several}
    named = {(role_name(prefix, granted), role_name(prefix, role)): inherits for (granted, role), inherits in wanted.items()}
    for pair in known.keys() | named.keys():
        if known.get(pair) != named.get(pair):
            yield f"{pair[1]} is a member of {pair[0]}: {known.get(pair)}, not {named.get(pair)}"


assert not set(SHARED) & set(TENANTS)
