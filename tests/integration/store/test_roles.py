"""Roles, rights and policies come into databases of all kinds: new ones, older ones, a superuser's and others'."""

import asyncio
import itertools
import os
import sys
from collections.abc import Callable, Iterator

import psycopg
import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, make_url, text

from lmaas.errors import SettingsError
from lmaas.store import adapters, tenants, usage
from lmaas.store.database import Database, driver_url
from lmaas.store.migrate import MIGRATIONS, upgrade
from lmaas.store.rights import DatabaseRole
from lmaas.store.scopes import OPERATOR, SYSTEM
from tests.support.catalogue import faults
from tests.support.databases import ROLE_PASSWORD, login_url

#: The newest schema of the release before roles.
BEFORE = "0007"
#: Two tenants, as that release has written them.
ROWS = """
    INSERT INTO tenants (id, name, tier, max_queued, max_adapters) VALUES ('ten_a', 'a', 'standard', 1, 5),
      ('ten_b', 'b', 'standard', 1, 5);
    INSERT INTO base_models (id, name, source, dtype, linears, max_lora_rank, max_loras, max_cpu_loras, max_num_seqs, max_model_len,
      kv_cache_bytes, engine_args) VALUES ('mod_1', 'base', '/m', 'float32', '{}', 1, 1, 1, 1, 1, 1, '');
    INSERT INTO api_keys (id, tenant_id, role, name, hash, prefix) VALUES ('key_a', 'ten_a', 'inference', '', 'hash-a', ''),
      ('key_b', 'ten_b', 'inference', '', 'hash-b', ''), ('key_o', NULL, 'operator', '', 'hash-o', '');
    INSERT INTO adapters (id, tenant_id, name, base_model_id, live_version) VALUES ('ada_a', 'ten_a', 'bot', 'mod_1', 1),
      ('ada_b', 'ten_b', 'bot', 'mod_1', 1);
    INSERT INTO adapter_versions (adapter_id, version, content_hash, rank, target_modules, size_bytes) VALUES
      ('ada_a', 1, 'content-a', 1, '[]', 1), ('ada_b', 1, 'content-b', 1, '[]', 1);
    INSERT INTO usage_events (request_id, tenant_id, base_model, model, status, stream, prompt_tokens, cached_tokens, completion_tokens,
      queue_ms, load_ms, run_ms, created_at) SELECT 'r' || id, id, 'base', 'base', 'completed', false, 1, 0, 1, 1, 1, 1, now() FROM tenants;
    INSERT INTO audit_log (tenant_id, action, target) VALUES ('ten_a', 'x', 'y'), (NULL, 'x', 'y');
"""
#: Since this version of Postgres, each membership has its own option for inheritance.
PER_MEMBER = 160_000
_numbers = itertools.count()

NewDatabase = Callable[..., str]


@pytest.fixture
def new_database(postgres_url: str) -> Iterator[NewDatabase]:
    """Makes empty databases: a superuser's, or with `rights` those of a login of that kind."""
    made: list[str] = []

    def make(rights: str | None = None) -> str:
        name = f"roles_{next(_numbers)}"
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            if rights is None:
                connection.execute(f"CREATE DATABASE {name}")
            else:
                connection.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{ROLE_PASSWORD}' {rights}")
                connection.execute(f"CREATE DATABASE {name} OWNER {name}")
        made.append(name)
        url = make_url(driver_url(postgres_url)).set(database=name)
        if rights is not None:
            url = url.set(username=name, password=ROLE_PASSWORD)
        return url.set(drivername="postgresql").render_as_string(hide_password=False)

    yield make
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        for name in made:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def as_before(url: str) -> None:
    """Bring a database to the state of the release before roles: tables of the login, no roles."""
    engine = create_engine(driver_url(url))
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, BEFORE)
        connection.commit()
    engine.dispose()
    with psycopg.connect(url) as older:
        older.execute(ROWS)


async def check_tenancy(url: str, admin: Database, prefix: str) -> None:
    """Check that the rows of the older database exist and that only their readers can see them."""
    async with admin.begin(SYSTEM) as connection:
        assert await faults(connection, prefix) == []
    db = Database(url, DatabaseRole.GATEWAY, prefix=prefix)
    for tenant_id, other in (("ten_a", "ten_b"), ("ten_b", "ten_a")):
        async with db.begin(tenant_id) as connection:
            rows = (
                (await connection.execute(text("SELECT tenant_id FROM adapter_versions UNION ALL SELECT id FROM tenants"))).scalars().all()
            )
        assert set(rows) == {tenant_id}, other
        served = await adapters.find_served(db, tenant_id, "bot", None)
        assert served is not None
        assert served.content_hash == f"content-{tenant_id[-1]}"
        assert [event.request_id for event in await usage.list_events(db, tenant_id)] == [f"r{tenant_id}"]
    assert {tenant.id for tenant in await tenants.list_tenants(db)} == {"ten_a", "ten_b"}
    principals = [await tenants.find_principal(db, f"hash-{name}") for name in "abo"]
    assert [principal.tenant_id if principal else "" for principal in principals] == ["ten_a", "ten_b", None]
    async with db.begin(SYSTEM) as connection:
        assert (await connection.execute(text("SELECT count(*) FROM tenants"))).scalar_one() == 0
    await db.close()


@pytest.mark.parametrize("rights", [None, "CREATEROLE", "CREATEROLE NOINHERIT"], ids=["superuser", "owner", "owner-noinherit"])
async def test_an_older_database_is_upgraded_under_its_release(postgres_url: str, new_database: NewDatabase, rights: str | None) -> None:
    url = new_database(rights)
    with psycopg.connect(url) as connection:
        if rights == "CREATEROLE NOINHERIT" and connection.info.server_version < PER_MEMBER:
            pytest.skip("such an owner has no right on the schema public")
    # Roles belong to the cluster: a superuser made those of the other tests, and only a superuser may grant them.
    prefix = "lmaas" if rights is None else make_url(url).username or ""
    as_before(url)
    older = psycopg.connect(url, autocommit=True)
    upgrade(url, prefix=prefix)
    upgrade(url, prefix=prefix)
    if rights != "CREATEROLE NOINHERIT":
        # The release before continues: it sees everything, and does not know the new column.
        assert older.execute("SELECT count(*) FROM usage_events").fetchone() == (2,)
        older.execute(
            "INSERT INTO adapter_versions (adapter_id, version, content_hash, rank, target_modules, size_bytes) "
            "VALUES ('ada_b', 2, 'content-b2', 1, '[]', 1)"
        )
        assert older.execute("SELECT tenant_id FROM adapter_versions WHERE version = 2").fetchone() == ("ten_b",)
        older.execute("UPDATE tenants SET max_queued = 2")
        older.execute("INSERT INTO audit_log (action, target) VALUES ('x', 'y')")
    older.close()
    admin = Database(make_url(driver_url(postgres_url)).set(database=make_url(url).database).render_as_string())
    await check_tenancy(url, admin, prefix)
    await admin.close()


async def test_a_login_that_may_not_create_roles_says_what_an_administrator_does(postgres_url: str, new_database: NewDatabase) -> None:
    url = new_database("")
    prefix = make_url(url).username or ""
    as_before(url)
    with pytest.raises(SettingsError, match="administrator") as caught:
        upgrade(url, prefix=prefix, passwords={DatabaseRole.GATEWAY: "never-shown"})
    assert "never-shown" not in caught.value.message
    assert "SCRAM" not in caught.value.message
    statements = caught.value.message.partition(":\n")[2]
    assert f"CREATE ROLE {prefix}_gateway LOGIN NOINHERIT" in statements
    with psycopg.connect(postgres_url) as connection:
        connection.execute(statements)
    upgrade(url, prefix=prefix)
    admin = Database(make_url(driver_url(postgres_url)).set(database=make_url(url).database).render_as_string())
    await check_tenancy(url, admin, prefix)
    await admin.close()


async def test_the_migrators_login_is_enough_once_the_roles_exist(new_database: NewDatabase) -> None:
    url = new_database()
    as_before(url)
    upgrade(url, BEFORE)
    migrator = login_url(url, DatabaseRole.MIGRATOR)
    upgrade(migrator)
    upgrade(migrator)
    admin = Database(url)
    async with admin.begin(SYSTEM) as connection:
        assert await faults(connection) == []
    await admin.close()


async def test_databases_of_one_cluster_are_migrated_at_once(new_database: NewDatabase) -> None:
    urls = [new_database() for _ in range(3)]
    prefix = f"many_{next(_numbers)}"
    variables = os.environ | {"LMAAS_DATABASE_ROLE_PREFIX": prefix, "LMAAS_DATABASE_PASSWORDS": "gateway=secret,controller=secret"}
    command = [sys.executable, "-m", "lmaas", "migrate"]
    processes = [await asyncio.create_subprocess_exec(*command, env=variables | {"LMAAS_DATABASE_URL": url}) for url in urls]
    assert [await process.wait() for process in processes] == [0, 0, 0]
    for url in urls:
        admin = Database(url)
        async with admin.begin(SYSTEM) as connection:
            assert await faults(connection, prefix) == []
        await admin.close()


def test_tables_of_others_are_left_alone(new_database: NewDatabase) -> None:
    url = new_database()
    look = "SELECT relacl::text, relowner, relrowsecurity FROM pg_class WHERE relname = 'theirs'"
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE theirs (id int, tenant_id int)")
        connection.execute("GRANT ALL ON theirs TO PUBLIC")
        before = connection.execute(look).fetchone()
    upgrade(url)
    with psycopg.connect(url) as connection:
        assert connection.execute(look).fetchone() == before


def test_a_process_login_cannot_migrate(new_database: NewDatabase) -> None:
    url = new_database()
    upgrade(url)
    with pytest.raises(SettingsError, match="lmaas_migrator"):
        upgrade(login_url(url, DatabaseRole.GATEWAY))


async def test_what_was_changed_by_hand_is_put_right(new_database: NewDatabase) -> None:
    url = new_database()
    upgrade(url)
    admin = Database(url)
    async with admin.begin(SYSTEM) as connection:
        for change in (
            "GRANT ALL ON usage_events TO lmaas_gateway, PUBLIC",
            "GRANT SELECT ON api_keys TO lmaas_gateway",
            "REVOKE SELECT ON base_models FROM lmaas_gateway",
            "GRANT USAGE ON SEQUENCE audit_log_id_seq TO lmaas_jobs",
            "ALTER TABLE tenants NO FORCE ROW LEVEL SECURITY",
            "DROP POLICY gateway_select ON adapters",
            "CREATE POLICY more ON adapters TO lmaas_jobs USING (true)",
            "ALTER TABLE replicas ENABLE ROW LEVEL SECURITY",
            "ALTER TABLE changes OWNER TO postgres",
        ):
            await connection.execute(text(change))
        assert len(await faults(connection)) > 8
    upgrade(url)
    async with admin.begin(SYSTEM) as connection:
        assert await faults(connection) == []
    await admin.close()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("ALTER ROLE {prefix}_gateway BYPASSRLS", "BYPASSRLS"),
        ("ALTER ROLE {prefix}_controller SUPERUSER", "superuser"),
        (
            "GRANT {prefix}_operator TO {prefix}_gateway WITH INHERIT TRUE",
            "would see all tenants",
        ),
    ],
)
def test_a_role_that_passes_by_the_policies_is_refused(new_database: NewDatabase, change: str, complaint: str) -> None:
    url = new_database()
    prefix = f"odd_{next(_numbers)}"
    upgrade(url, prefix=prefix)
    with psycopg.connect(url) as connection:
        if "INHERIT" in change and connection.info.server_version < PER_MEMBER:
            pytest.skip("a member inherits all of its roles or none")
        connection.execute(change.format(prefix=prefix).encode())
    with pytest.raises(SettingsError, match=complaint):
        upgrade(url, prefix=prefix)


async def test_a_login_that_may_not_act_as_its_role_says_so(new_database: NewDatabase) -> None:
    for prefix, complaint in (("lmaas", "permission denied to set role"), ("none", "does not exist")):
        db = Database(new_database(""), DatabaseRole.GATEWAY, prefix=prefix)
        for scope in (SYSTEM, OPERATOR, "ten_a"):
            with pytest.raises(SettingsError, match=complaint):
                async with db.begin(scope):
                    pytest.fail("it has no rights")
        await db.close()
