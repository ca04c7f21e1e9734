"""Creates the database roles, and changes ownership, rights and row-level policies to match `lmaas.store.rights`.

Everything here may be repeated at any time. It changes only what differs, so a correct database is not locked. Roles belong to a whole
cluster, so services that share a cluster need different prefixes.
"""

import hashlib
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from psycopg.sql import Literal
from sqlalchemy import Connection, text
from sqlalchemy.exc import IntegrityError, InternalError, ProgrammingError

from lmaas.errors import SettingsError
from lmaas.store.rights import ASSUMES, GUARDED, INHERITS, LOGINS, SEQUENCES, TABLES, DatabaseRole, policies, privileges, role_name

#: Postgres' code for an action that the login is not allowed.
_FORBIDDEN = "42501"
#: Texts in Postgres' errors about two concurrent changes of one role or membership, which have no code.
_CONCURRENTLY = ("tuple concurrently updated", "pg_auth_members")
ATTEMPTS = 20

#: The tables and sequences to manage. Other objects in the schema are not changed.
_OURS = [*TABLES, *SEQUENCES]
#: The functions of triggers.
_FUNCTIONS = ["note_change", "count_usage", "recount_usage"]

_ROLES = text("SELECT rolname, rolcanlogin, rolinherit, rolsuper OR rolbypassrls FROM pg_roles WHERE rolname = ANY(:names)")
#: Since Postgres 16, the creator of a role is a member of it, but may not act as it.
_MAY_ACT_AS = text(
    "SELECT pg_has_role(:member, :role, CASE WHEN current_setting('server_version_num')::int >= 160000 THEN 'SET' ELSE 'MEMBER' END)"
)
_OBJECTS = text(
    """
    SELECT CASE relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, quote_ident(relname) FROM pg_class
    WHERE relnamespace = 'public'::regnamespace AND relname = ANY(:names) AND pg_get_userbyid(relowner) <> :owner
      -- A column's own sequence follows its table.
      AND NOT (relkind = 'S' AND EXISTS (SELECT FROM pg_depend WHERE objid = pg_class.oid AND deptype IN ('a', 'i')))
    UNION ALL
    SELECT 'FUNCTION', quote_ident(proname) || '(' || pg_get_function_identity_arguments(oid) || ')' FROM pg_proc
    WHERE pronamespace = 'public'::regnamespace AND proname = ANY(:functions) AND pg_get_userbyid(proowner) <> :owner
    ORDER BY 1, 2
    """
)
_PRIVILEGES = text(
    """
    SELECT relname, CASE grantee WHEN 0 THEN 'public' ELSE pg_get_userbyid(grantee) END, privilege_type, ''
    FROM pg_class, aclexplode(relacl) WHERE relnamespace = 'public'::regnamespace AND relname = ANY(:names)
    UNION ALL
    SELECT relname, CASE grantee WHEN 0 THEN 'public' ELSE pg_get_userbyid(grantee) END, privilege_type, attname
    FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid, aclexplode(attacl)
    WHERE relnamespace = 'public'::regnamespace AND relname = ANY(:names) AND NOT attisdropped
    """
)
_POLICIES = text(
    """
    SELECT relname, relrowsecurity, relforcerowsecurity, polname, obj_description(pg_policy.oid, 'pg_policy')
    FROM pg_class LEFT JOIN pg_policy ON polrelid = pg_class.oid
    WHERE relnamespace = 'public'::regnamespace AND relname = ANY(:names)
    """
)


def prepare_roles(connection: Connection, prefix: str, passwords: Mapping[DatabaseRole, str]) -> None:
    """Create missing roles and their memberships, and set the given passwords.

    Raises SettingsError with the statements for an administrator if the login may not create roles.
    """
    statements = list(_missing(connection, prefix))
    for role, password in passwords.items():
        # Passwords are encrypted here, because a cluster's log may contain the statement and be read by others.
        secret = _encrypted(connection, role_name(prefix, role), password)
        statements.append(f"ALTER ROLE {role_name(prefix, role)} LOGIN PASSWORD {Literal(secret).as_string(None)}")
    _run(connection, statements, "create or change database roles")
    _refuse_powerful(connection, prefix)


def adopt(connection: Connection, prefix: str) -> None:
    """Give every table to the owner's role."""
    owner = role_name(prefix, DatabaseRole.OWNER)
    objects = {"owner": owner, "names": _OURS, "functions": _FUNCTIONS}
    database = connection.execute(text("SELECT quote_ident(current_database())")).scalar_one()
    needs = [(name, "has_schema_privilege(:role, 'public', 'USAGE')", "USAGE ON SCHEMA public") for name in _names(prefix)]
    needs += [(owner, "has_schema_privilege(:role, 'public', 'CREATE')", "CREATE ON SCHEMA public")]
    connecting = ("has_database_privilege(:role, current_database(), 'CONNECT')", f"CONNECT ON DATABASE {database}")
    needs += [(role_name(prefix, role), *connecting) for role in LOGINS]
    statements = [
        f"GRANT {right} TO {name}" for name, has, right in needs if not connection.execute(text(f"SELECT {has}"), {"role": name}).scalar()
    ]
    statements += [f"ALTER {kind} public.{name} OWNER TO {owner}" for kind, name in connection.execute(_OBJECTS, objects)]
    _run(connection, statements, "give the tables to their owner's role")


def guard(connection: Connection, prefix: str) -> None:
    """Change policies and rights to match `lmaas.store.rights`. The connection acts as the owner's role."""
    found: dict[str, dict[str, str]] = {}
    security: dict[str, tuple[bool, bool]] = {}
    for table, enabled, forced, name, digest in connection.execute(_POLICIES, {"names": list(TABLES)}):
        security[table] = enabled, forced
        found.setdefault(table, {})
        if name is not None:
            found[table][name] = digest or ""
    connection.commit()
    for table in sorted(found):
        wanted = policies(prefix, table)
        digests = {name: hashlib.sha256(clauses.encode()).hexdigest() for name, clauses in wanted.items()}
        if digests == found[table] and security[table] == (table in GUARDED, table in GUARDED):
            continue
        # In one transaction, so that a running process never sees fewer rows than before.
        with connection.begin():
            for name in found[table]:
                connection.execute(text(f'DROP POLICY "{name}" ON {table}'))
            for name, clauses in wanted.items():
                connection.execute(text(f"CREATE POLICY {name} ON {table} {clauses}"))
                connection.execute(text(f"COMMENT ON POLICY {name} ON {table} IS '{digests[name]}'"))
            verb = ("ENABLE", "FORCE") if table in GUARDED else ("DISABLE", "NO FORCE")
            connection.execute(text(f"ALTER TABLE {table} {verb[0]} ROW LEVEL SECURITY, {verb[1]} ROW LEVEL SECURITY"))
    _grant(connection, prefix)


def _grant(connection: Connection, prefix: str) -> None:
    ours, wanted = {role_name(prefix, role) for role in DatabaseRole if role is not DatabaseRole.OWNER} | {"public"}, privileges(prefix)
    with connection.begin():
        sequences = {row[0] for row in connection.execute(text("SELECT sequencename FROM pg_sequences WHERE schemaname = 'public'"))}
        # Revoking a right on a table also revokes it on its columns, so the remaining rights are read again.
        for verb, joint in (("REVOKE", "FROM"), ("GRANT", "TO")):
            found = {tuple(row) for row in connection.execute(_PRIVILEGES, {"names": _OURS}) if row[1] in ours}
            for thing, role, command, column in sorted(found - wanted if verb == "REVOKE" else wanted - found):
                kind = "SEQUENCE" if thing in sequences else "TABLE"
                columns = f" ({column})" if column else ""
                connection.execute(text(f'{verb} {command}{columns} ON {kind} "{thing}" {joint} {role}'))


def _names(prefix: str) -> list[str]:
    return [role_name(prefix, role) for role in DatabaseRole]


def _missing(connection: Connection, prefix: str) -> Iterator[str]:
    """Return the statements that create the missing roles and memberships."""
    names = _names(prefix)
    known = {row[0]: row for row in connection.execute(_ROLES, {"names": names})}
    login, is_super = connection.execute(text("SELECT session_user, rolsuper FROM pg_roles WHERE rolname = session_user")).one()
    for role in DatabaseRole:
        name = role_name(prefix, role)
        inherit = "INHERIT" if role in INHERITS else "NOINHERIT"
        if name not in known:
            yield f"CREATE ROLE {name} {'LOGIN' if role in LOGINS else 'NOLOGIN'} {inherit}"
        elif role in (*ASSUMES, *INHERITS) and known[name][2] != (role in INHERITS):
            yield f"ALTER ROLE {name} {inherit}"
    for role, granted in [(role, one) for table in (ASSUMES, INHERITS) for role, several in table.items() for one in several]:
        if not _may_act_as(connection, known, role_name(prefix, role), role_name(prefix, granted)):
            yield f"GRANT {role_name(prefix, granted)} TO {role_name(prefix, role)}"
    if is_super or login in names:
        return
    # If one login serves everything, it assumes the roles. It keeps the owner's rights for the release that is still running.
    quoted = connection.execute(text("SELECT quote_ident(session_user)")).scalar_one()
    for role in DatabaseRole:
        if role is not DatabaseRole.MIGRATOR and not _may_act_as(connection, {*known, login}, login, role_name(prefix, role)):
            yield f"GRANT {role_name(prefix, role)} TO {quoted}"


def _may_act_as(connection: Connection, known: Collection[str], member: str, role: str) -> bool:
    pair = {"member": member, "role": role}
    return member in known and role in known and bool(connection.execute(_MAY_ACT_AS, pair).scalar_one())


def _run(connection: Connection, statements: list[str], what: str) -> None:
    connection.commit()
    for number, statement in enumerate(statements):
        try:
            _execute(connection, statement)
        except ProgrammingError as error:
            if getattr(error.orig, "sqlstate", None) != _FORBIDDEN:
                raise
            rest = ";\n".join(each.partition(" PASSWORD ")[0] for each in statements[number:])
            raise SettingsError(
                f"The database login may not {what} ({str(error.orig).splitlines()[0]}). Run these statements as an administrator of the "
                f"database, then `lmaas migrate` again (docs/concepts/tenancy.md explains them):\n{rest};"
            ) from error


def _execute(connection: Connection, statement: str) -> None:
    """Execute a statement about roles, which another database's migration may change at the same time."""
    for attempt in range(ATTEMPTS):
        try:
            with connection.begin():
                connection.exec_driver_sql(_quietly(statement))
        except (InternalError, IntegrityError) as error:
            if not any(words in str(error.orig) for words in _CONCURRENTLY) or attempt == ATTEMPTS - 1:
                raise
            time.sleep(0.05)
        else:
            return


def _quietly(statement: str) -> str:
    """Return a `CREATE ROLE` that is no error if another migration of the cluster creates the role at the same time."""
    if not statement.startswith("CREATE ROLE "):
        return statement
    return f"DO $$ BEGIN {statement}; EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL; END $$"


def _refuse_powerful(connection: Connection, prefix: str) -> None:
    """Raise SettingsError if a role could bypass the policies, because an administrator may have granted it more than it should have."""
    names = _names(prefix)
    for name, _, _, powerful in connection.execute(_ROLES, {"names": names}):
        if powerful:
            raise SettingsError(f"The database role {name} is a superuser or has BYPASSRLS: no policy holds for it. Take that from it.")
    for role, several in ASSUMES.items():
        for granted in several:
            pair = {"role": role_name(prefix, role), "granted": role_name(prefix, granted)}
            if connection.execute(text("SELECT pg_has_role(:role, :granted, 'USAGE')"), pair).scalar():
                raise SettingsError(
                    f"The database role {pair['role']} inherits {pair['granted']}, so it would see all tenants at all times. As an "
                    f"administrator: ALTER ROLE {pair['role']} NOINHERIT; REVOKE {pair['granted']} FROM {pair['role']}; "
                    f"GRANT {pair['granted']} TO {pair['role']};"
                )
    connection.commit()


def _encrypted(connection: Connection, role: str, password: str) -> str:
    driver: Any = connection.connection.driver_connection
    secret: bytes = driver.pgconn.encrypt_password(password.encode(), role.encode(), b"scram-sha-256")
    return secret.decode()
